"What is committed under outputs/: rows of one schema, tables and notebooks that belong together, findings that the README repeats and no other."
import json
import math
import re

import nbformat
import pytest

from latentrefine.core import ROOT, ROW_FIELDS
from latentrefine.report import COLUMNS, TITLES, base_column, findings, published
from latentrefine.reproduce import nodes
from latentrefine.study import GIVEN, MAIN_RATE, PEERS, REALIGNED, REPORTED, Study, load_preset

RUNS = sorted(path.parent.name for path in (ROOT / "outputs").glob("*/report.html"))
FACTS = {"notebook": str, "preset": str, "seconds": (int, float), "commit": str, "versions": str, "hardware": str,
         "system": str, "encoder": str, "stories": str, "precision": str, "vocabulary": str, "length": str, "reduced": bool, "seed": int, "train_stories": int}
SHARES = ("target_probability", "top1", "aligned_probability", "aligned_top1", "distinct1", "distinct2", "repetition", "mauve")


def rows_of(run, table): return json.loads((ROOT / "outputs" / run / "tables" / f"{table}.json").read_text(encoding="utf-8"))


def test_there_are_runs(): assert {"quick", "cpu"} <= set(RUNS)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("table", TITLES)
def test_schema(run, table):
    rows = rows_of(run, table)
    assert rows
    for number, row in enumerate(rows):
        assert not [f for f in ROW_FIELDS if f not in row], (table, number)
        for field, kind in FACTS.items(): assert isinstance(row.get(field), kind), (table, number, field, row.get(field))
        assert row["preset"] == run and re.fullmatch(r"[0-9a-f]{12}", row["commit"]), (table, number, row["commit"])
        assert row["split"] in ("train", "validation", "test", None) and (row["n"] is None or row["n"] > 0)
        for field, value in row.items():
            if isinstance(value, float): assert math.isfinite(value), (table, number, field)
            if field in SHARES and value is not None: assert 0 <= value <= 1 + 1e-9, (table, number, field, value)


@pytest.mark.parametrize("run", RUNS)
def test_one_machine(run):
    "Each table of a run was made by one commit on one machine, all with one set of packages; later tables may come from another machine."
    for table in TITLES: assert len({(row["commit"], re.sub(r"\d+ of", "of", row["hardware"])) for row in rows_of(run, table)}) == 1, table
    assert len({row["versions"] for table in TITLES for row in rows_of(run, table)}) == 1


SEEDED = {"table2": ("system", "width", "dropout"), "table3": ("system",), "table4": ("system", "share"), "table5": ("system", "steps"), "gaussian_start": ("system",),
          "figure1": ("training_step",), "gpt2_comparison": ("system",), "misalignment": ("part", "draft", "dropout", "system"), "realign": ("part", "draft", "dropout", "system", "length", "group"), "basin": ("direction", "at"), "systems": ("system", "mode", "draft", "dropout"), "spaces": ("part", "space", "centre", "direction", "at", "reading"),
          "cosmos": ("part", "system", "mode", "latents", "beta", "sigma", "mu"), "cola": ("part", "system", "steps", "guidance", "noise", "given", "mode"), "claims": ("claim", "system", "width", "scale", "reading", "layers")}
TEXTS = ("draft", "real targets", "other targets")      # rows of text that nothing was trained for


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("table", SEEDED)
def test_every_trained_row_has_its_seeds(run, table):
    seeds, groups = {row["seed"] for row in rows_of(run, "table2")}, {}
    for row in rows_of(run, table):
        if row["system"] in TEXTS or row.get("part") in ("slots", "cost", "learning", "leave"): continue      # of the first seed alone
        key = (*(str(row.get(k)) for k in SEEDED[table]), row["relative_norm"] if row.get("at") == "grid" else None)
        groups.setdefault(key, []).append(row["seed"])
    for key, found in groups.items(): assert sorted(found) == sorted(seeds), (table, key, found)
    assert groups and (run == "quick" or len(seeds) >= 3 and rows_of(run, "table2")[0]["n"] >= 2000)


@pytest.mark.parametrize("run", RUNS)
def test_no_system_and_no_rate_is_missing(run):
    study, systems = Study(run), {*REPORTED, "oracle"} - {"long DraftPrior"}
    assert {row["system"] for row in rows_of(run, "table3")} == systems
    read = {(row["system"], row["width"], row["dropout"]) for row in rows_of(run, "table2")}
    assert {(name, width, rate) for name in ("no-op", "DraftPrior") for width in (study.full, study.narrow) for rate in study.preset["dropouts"]} <= read
    assert {row["steps"] for row in rows_of(run, "table5") if row["system"] == "full"} == set(published("table5").steps)
    main = {(row["system"], row["length"]) for row in rows_of(run, "realign") if row["part"] == "main"}
    assert {(name, "unknown") for name in (*(name for name, way in REALIGNED.items() if way != "masked LM"), "no-op", "DraftPrior", "full", "parallel transformer")} | {(name, "known") for name in ("re-aligned", "re-aligned, tokens", "parallel transformer")} <= main
    assert {row["length"] for row in rows_of(run, "realign")} <= {"unknown", "known", GIVEN, "withheld"}
    assert {row["dropout"] for row in rows_of(run, "realign") if row["part"] == "curve" and row["system"] == "re-aligned"} == {0., .01, .02, .03, .05, .075, .10, .15, .20}
    assert {row["system"] for row in rows_of(run, "misalignment")} >= {"null model", "no-op", "DraftPrior", "long DraftPrior", "full", "oracle"}


@pytest.mark.parametrize("run", RUNS)
def test_every_system_is_read_in_every_mode(run):
    "Drafts with dropped tokens at four rates, and with [MASK]; texts at 5 % and from the prompt alone; what a peer's row cost."
    rows = rows_of(run, "systems")
    found = {(row["system"], row["mode"], row["draft"], row["dropout"]) for row in rows}
    kinds = [("drop", 0.), ("drop", .03), ("drop", .05), ("drop", .10), ("mask", .05)]
    assert {(name, mode, *kind) for kind in kinds for name, mode in (("no-op", "START"), ("full", "START"), ("re-aligned", "START"), ("KL-Flow", "START"), *((name, "COND") for name in PEERS))} <= found
    assert {(name, "START", "mask", .05) for name in PEERS} <= found
    assert {(name, "PROMPT", "none", None) for name in (*PEERS, "Gaussian start", "GPT-2")} | {(name, "ORACLE", "none", None) for name in ("oracle", *PEERS)} <= found
    for row in rows:
        if row["mode"] in ("PROMPT", "text") or (row["draft"], row["dropout"]) == ("drop", MAIN_RATE): assert {"mauve", "mauve_floor", "ppl", "ppl_model", "distinct1", "diversity", "memorised", "repetition", "samples"} <= row.keys(), row["system"]
        if row["system"] in PEERS and row["seed"] == min(r["seed"] for r in rows): assert {"training_seconds", "training_stories", "run_parameters", "nfe", *(("ms_at_one", "ms_at_many") if row["mode"] == "COND" else ())} <= row.keys()
    lrd, base = (next(row["nfe"] for row in rows if (row["system"], row["mode"], row["dropout"]) == (name, "PROMPT", None)) for name in ("LRD", "masked diffusion"))
    assert base == 32 and lrd <= 1 + 8 + 32


@pytest.mark.parametrize("run", RUNS)
def test_an_executed_notebook_for_every_table(run):
    folder = ROOT / "outputs" / run
    for table in TITLES:
        notebook = rows_of(run, table)[0]["notebook"]
        assert (folder / "notebooks" / f"{notebook}.ipynb").is_file()
        for kind in ("csv", "md"): assert (folder / "tables" / f"{table}.{kind}").stat().st_size > 20
    seeds = len({row["seed"] for row in rows_of(run, "table2")})
    assert {path.stem for path in (folder / "notebooks").glob("*.ipynb")} == set(nodes(Study(run, out=str(folder), seeds=seeds)))


@pytest.mark.parametrize("run", RUNS)
def test_links_of_executed_notebooks_lead_somewhere(run):
    for path in (ROOT / "outputs" / run / "notebooks").glob("*.ipynb"):
        links = {link for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown" for link in re.findall(r"\]\(([^)#:]+)\)", cell.source)}
        assert not [link for link in links if not (path.parent / link).exists()], path.name


@pytest.mark.parametrize("run", RUNS)
def test_nothing_else_is_committed(run):
    known = {"tables", "figures", "notebooks", "samples", "models", "logs", "evaluations", "report.html", ".snakemake"}
    assert {path.name for path in (ROOT / "outputs" / run).iterdir()} <= known
    for path in [*(ROOT / "outputs" / run / "tables").iterdir(), ROOT / "outputs" / run / "report.html"]:
        assert not re.search(r"/(?:root|home|Users|tmp|work)/", path.read_text(encoding="utf-8")), path


def test_samples_recompute_the_text_metrics():
    "Anybody can have Table 5's distinct-1 again from the samples; those of real stories are not committed."
    from latentrefine.textmetrics import distinct_n
    scored = [row for table in ("table5", "gpt2_comparison", "systems") for row in rows_of("quick", table) if row.get("samples")]
    assert {row["samples"] for row in scored} == {f"samples/{path.name}" for path in (ROOT / "outputs" / "quick" / "samples").iterdir()}
    for row in scored:
        texts = [json.loads(line)["output"] for line in (ROOT / "outputs" / "quick" / row["samples"]).read_text(encoding="utf-8").splitlines()]
        assert len(texts) == row["n"] <= 1000 and distinct_n(texts, 1) == pytest.approx(row["distinct1"], abs=1e-9), row["samples"]


@pytest.mark.parametrize("run", RUNS)
def test_text_and_speed_rows_say_how_they_were_measured(run):
    for table in ("table5", "gpt2_comparison"):
        for row in rows_of(run, table):
            assert {"mauve_floor", "mauve_features", "ppl_model", "samples"} <= row.keys() and row["ppl"] > 1, (table, row["system"])
            assert row["samples"].startswith(f"samples/{table}-")
    rows = rows_of(run, "speed")
    assert {row["system"] for row in rows} >= {"no-op", "full", "autoregressive"} and {row["batch"] for row in rows} == set(load_preset(run)["timing_batches"])
    assert all(row["repeats"] >= 1 and row["ms_per_sample"] > 0 and row["model"] for row in rows)


def test_the_null_model_agrees_with_the_no_op():
    "On the test stories of the cpu run, at every rate."
    rows = [row for row in rows_of("cpu", "misalignment") if row["part"] == "curve"]
    def mean(system, dropout):
        values = [row["target_probability"] for row in rows if row["system"] == system and row["dropout"] == dropout]
        return sum(values) / len(values)
    rates = {row["dropout"] for row in rows if row["system"] == "no-op"}
    assert {0., .01, .02, .03, .05, .075, .10, .15, .20} <= rates
    for dropout in rates: assert abs(mean("null model", dropout) - mean("no-op", dropout)) < .02, dropout


def test_readme_and_index_repeat_the_findings():
    readme, index = (ROOT / "README.md").read_text(encoding="utf-8"), nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    shown = [output.data.get("text/markdown") for cell in index.cells if cell.cell_type == "code" for output in cell.outputs if "data" in output]
    found = findings(ROOT / "outputs" / "cpu")
    assert found in shown, "the index shows other findings than those of outputs/cpu: run nbs/index.ipynb"
    assert found in readme, "the README's findings are not those of outputs/cpu: copy them from nbs/index.ipynb"


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("table", TITLES)
def test_every_column_is_explained(run, table):
    header = (ROOT / "outputs" / run / "tables" / f"{table}.csv").read_text(encoding="utf-8").partition("\n")[0].split(",")
    assert not {base_column(name) for name in header} - set(COLUMNS)
