"What is committed under outputs/: rows of one schema; tables, answers, figures and notebooks that belong together."
import json
import math
import re
from functools import lru_cache

import nbformat
import pandas as pd
import pytest

from latentrefine.core import ROOT, ROW_FIELDS
from latentrefine.measure import TARGET_LENGTH, notebook_source, published, results, results_of, source_digest, systems_of
from latentrefine.presets import load_preset
from latentrefine.registry import MAIN_RATE, load_chapters
from latentrefine.report import base_column, columns
from latentrefine.reproduce import nodes, with_needs
from latentrefine.study import Study
from latentrefine.textmetrics import distinct_n

load_chapters()
OUTPUTS, RESULTS = ROOT / "outputs", results()
RUNS = sorted(path.parent.name for path in OUTPUTS.glob("*/report.html"))
WITHOUT_DIGEST = ("cpu",)      # measured before rows carried the digest of their measurement; results added since are not made
MADE = {run: {name: entry for name, entry in results_of(load_preset(run)).items()
              if run not in WITHOUT_DIGEST or (OUTPUTS / run / "tables" / f"{name}.json").exists()}
        for run in RUNS}      # the results of each run
NUMBER = (int, float)
FACTS = {"notebook": str, "preset": str, "seconds": NUMBER, "commit": str, "versions": str, "hardware": str, "system": str,
         "encoder": str, "stories": str, "precision": str, "vocabulary": str, "length": str, "reduced": bool, "seed": int,
         "train_stories": int}
FRACTIONS = ("target_probability", "top1", "aligned_probability", "aligned_top1", "distinct1", "distinct2", "repetition", "mauve")

every_run = pytest.mark.parametrize("run", RUNS)
every_result = pytest.mark.parametrize("run, name", [(run, name) for run in RUNS for name in MADE[run]])


@lru_cache
def rows_of(run, name): return json.loads((OUTPUTS / run / "tables" / f"{name}.json").read_text(encoding="utf-8"))


@lru_cache
def answer_of(run, name): return json.loads((OUTPUTS / run / "answers" / f"{name}.json").read_text(encoding="utf-8"))


def seeds_of(run): return sorted({row["seed"] for row in rows_of(run, "table2")})


def test_there_are_runs(): assert {"quick", "cpu"} <= set(RUNS)


# Rows

@every_result
def test_schema(run, name):
    rows = rows_of(run, name)
    facts = FACTS if run in WITHOUT_DIGEST else {**FACTS, "digest": str, "source": str}
    assert rows and len({row.get("digest") for row in rows}) == 1
    for number, row in enumerate(rows):
        assert not [f for f in ROW_FIELDS if f not in row], number
        for field, kind in facts.items(): assert isinstance(row.get(field), kind), (number, field, row.get(field))
        assert row["preset"] == run and re.fullmatch(r"[0-9a-f]{12}", row["commit"]), (number, row["commit"])
        assert row["split"] in ("train", "validation", "test", None) and (row["n"] is None or row["n"] > 0)
        for field, value in row.items():
            if isinstance(value, float): assert math.isfinite(value), (number, field)
            if field in FRACTIONS and value is not None: assert 0 <= value <= 1 + 1e-9, (number, field, value)


@every_result
def test_rows_are_those_of_the_present_code(run, name):
    "The digest of the code that measured and trained, and of the preset, is that of a table's notebook today."
    if run in WITHOUT_DIGEST: pytest.skip("measured before rows carried it")
    digest = source_digest(Study(run), RESULTS[name], notebook_source(name))
    stale = f"{run}/{name} is stale: latentrefine reproduce {name} --preset {run}, then latentrefine publish"
    assert rows_of(run, name)[0]["source"] == digest, stale


@every_run
def test_one_machine(run):
    "Each table of a run was made by one commit on one machine, all with one set of packages; other tables may come from another machine."
    for name in MADE[run]:
        assert len({(row["commit"], re.sub(r"\d+ of", "of", row["hardware"])) for row in rows_of(run, name)}) == 1, name
    assert len({row["versions"] for name in MADE[run] for row in rows_of(run, name)}) == 1


SEEDED = {"table2": ("system", "width", "dropout"), "table3": ("system",), "table4": ("system", "share"), "table5": ("system", "steps"),
          "gaussian_start": ("system",), "figure1": ("training_step",), "gpt2_comparison": ("system",),
          "misalignment": ("part", "draft", "dropout", "system"), "realign": ("part", "draft", "dropout", "system", "length", "group", "shift"),
          "basin": ("direction", "at"), "systems": ("system", "mode", "draft", "dropout"),
          "failures": ("system", "draft"),
          "external": ("draft", "system"),
          "spaces": ("part", "space", "centre", "direction", "at", "reading"),
          "cosmos": ("part", "system", "mode", "latents", "beta", "sigma", "mu"),
          "cola": ("part", "system", "steps", "guidance", "noise", "given", "mode"),
          "claims": ("claim", "system", "width", "scale", "reading", "layers")}
TEXTS = ("draft", "real targets", "other targets")      # rows of text that nothing was trained for
FIRST_SEED_PARTS = ("slots", "cost", "learning", "leave", "latents")


@pytest.mark.parametrize("run, name", [(run, name) for run in RUNS for name in SEEDED if name in MADE[run]])
def test_every_trained_row_has_its_seeds(run, name):
    groups = {}
    for row in rows_of(run, name):
        if row["system"] in TEXTS or row.get("part") in FIRST_SEED_PARTS: continue
        key = (*(str(row.get(k)) for k in SEEDED[name]), row["relative_norm"] if row.get("at") == "grid" else None)
        groups.setdefault(key, []).append(row["seed"])
    for key, found in groups.items(): assert sorted(found) == seeds_of(run), (key, found)
    assert groups and (run == "quick" or len(seeds_of(run)) >= 3 and rows_of(run, "table2")[0]["n"] >= 2000)


# Completeness

def names_in(run, name, **where):
    return {row["system"] for row in rows_of(run, name) if all(row.get(k) == v for k, v in where.items())}


def without_masked_head(entries):
    "The systems that an encoder without a masked-language head can serve; `minilm` has none."
    return {entry.name for entry in entries} - {"re-aligned, masked LM"}


def asked_of(run, systems, result):
    "The systems that a run must show: all, but for older runs those that it has."
    return systems & names_in(run, result) if run in WITHOUT_DIGEST else systems


@every_run
def test_no_system_and_no_rate_is_missing(run):
    study = Study(run)
    opened = {name: systems_of(entry) for name, entry in RESULTS.items()}
    expected = {*(entry.name for entry in opened["table3"]), "oracle"}
    assert names_in(run, "table3") == expected or run in WITHOUT_DIGEST and names_in(run, "table3") < expected
    read = {(row["system"], row["width"], row["dropout"]) for row in rows_of(run, "table2")}
    systems = {system for system, *_ in read} - {"oracle"}
    assert len(systems) == 2
    assert {(name, width, rate) for name in systems for width in study.preset.widths for rate in study.preset.dropouts} <= read
    steps = [{row["steps"] for row in rows_of(run, "table5") if row["system"] == entry.name} for entry in opened["table5"]]
    assert set(published("table5").steps) in steps
    assert names_in(run, "misalignment") >= {"null model", "oracle", *(entry.name for entry in opened["misalignment"])}


CURVE = {0., .01, .02, .03, .05, .075, .10, .15, .20}


@every_run
def test_realign_is_complete(run):
    entries, lengths = systems_of(RESULTS["realign"]), {row["length"] for row in rows_of(run, "realign")}
    assert asked_of(run, without_masked_head(entries), "realign") <= names_in(run, "realign", part="main", length="unknown")
    uses = {entry.name for entry in entries if "length" in entry.uses and entry.compared}
    assert uses and uses <= names_in(run, "realign", part="main", length="known")
    assert lengths <= {"unknown", "known", TARGET_LENGTH, "withheld", "hidden"}
    curve = [row for row in rows_of(run, "realign") if row["part"] == "curve"]
    main = next(entry.name for entry in entries if entry.family == "re-aligned" and entry.compared)
    assert {row["dropout"] for row in curve if row["system"] == main} == CURVE


DRAFTS = {("drop", 0.), ("drop", .03), ("drop", .05), ("drop", .10), ("mask", .05)}
TEXT_FIELDS = {"mauve", "mauve_floor", "ppl", "ppl_model", "distinct1", "diversity", "memorised", "repetition", "samples"}
COST_FIELDS = {"training_seconds", "training_stories", "run_parameters", "nfe"}


@every_run
def test_every_compared_system_is_read_in_its_modes(run):
    "In its first mode on all drafts, in others at least on drafts with [MASK]; those with a choice of modes also without a draft."
    rows = rows_of(run, "systems")
    found = {(row["system"], row["mode"], row["draft"], row["dropout"]) for row in rows}
    entries = systems_of(RESULTS["systems"], load_preset(run))
    asked = asked_of(run, {entry.name for entry in entries}, "systems")
    for entry in entries:
        if entry.name not in asked: continue
        for mode in entry.modes:
            kinds = {("none", None)} if mode == "PROMPT" else DRAFTS if mode == entry.modes[0] else {("mask", .05)}
            assert {(entry.name, mode, *kind) for kind in kinds} <= found, entry.name
        if len(entry.modes) > 1: assert {(entry.name, mode, "none", None) for mode in ("PROMPT", "ORACLE")} <= found, entry.name
    assert {("oracle", "ORACLE", "none", None), ("GPT-2", "PROMPT", "none", None)} <= found
    first = {entry.name: entry.modes[0] for entry in systems_of(RESULTS["systems"])}
    for row in rows:
        main = (row["draft"], row["dropout"]) == ("drop", MAIN_RATE) and row["mode"] == first[row["system"]]
        if main or row["mode"] in ("PROMPT", "text"): assert TEXT_FIELDS <= row.keys(), row["system"]


@every_run
def test_the_main_columns_have_at_least_as_many_stories_as_others(run):
    rows = rows_of(run, "systems")
    drafted = [row for row in rows if row["draft"] == "drop"]
    first = {entry.name: entry.modes[0] for entry in systems_of(RESULTS["systems"])}
    for name in {row["system"] for row in drafted}:
        main = {row["n"] for row in drafted if row["system"] == name and row["mode"] == first[name] and row["dropout"] in (0., MAIN_RATE)}
        others = {row["n"] for row in drafted if row["system"] == name}
        assert len(main) == 1 and main == {max(others)}, name
        if run not in WITHOUT_DIGEST: assert main == {min(load_preset(run).compared_stories, rows_of(run, "table2")[0]["n"])}


@every_run
def test_texts_from_the_prompt_alone_are_of_another_model_than_scores_them(run):
    if "prompt_only" not in MADE[run]: pytest.skip("not made in this run")
    rows = rows_of(run, "prompt_only")
    assert {"GPT-2", "real targets", "other targets"} <= {row["system"] for row in rows}
    texts = [row for row in rows if "diversity" in row]
    assert {row["n"] for row in texts} == {min(load_preset(run).prompt_texts, rows_of(run, "table2")[0]["n"])}
    for row in texts: assert (row["mauve"] is None) == (row["n"] < 100) and TEXT_FIELDS <= row.keys(), row["system"]


@every_run
def test_the_cost_of_a_compared_system_is_stated(run):
    rows = rows_of(run, "systems")
    for entry in systems_of(RESULTS["systems"], load_preset(run)):
        if entry.family != "peer": continue
        first = [row for row in rows if row["system"] == entry.name and row["seed"] == min(seeds_of(run))]
        for row in first: assert COST_FIELDS <= row.keys(), entry.name
        assert {"ms_at_one", "ms_at_many"} <= next(row for row in first if row["mode"] == entry.modes[0]).keys()


def test_masked_diffusion_takes_a_pass_a_slot_and_its_refinement_a_few_more():
    def passes(system): return next(row["nfe"] for row in rows_of("cpu", "systems") if (row["system"], row["mode"]) == (system, "PROMPT"))
    assert passes("masked diffusion") == 32 and passes("LRD") <= 1 + 20 + 32


# Files

@every_result
def test_everything_of_a_result_is_there(run, name):
    folder, answer, entry = OUTPUTS / run, answer_of(run, name), RESULTS[name]
    for kind in ("csv", "md"): assert (folder / "tables" / f"{name}.{kind}").stat().st_size > 20
    assert rows_of(run, name)[0]["notebook"] == entry.get("notebook", name)
    assert (answer["name"], answer["title"], answer["question"]) == (name, entry["title"], entry["question"])
    assert answer["notebook"] == f"notebooks/{entry.get('notebook', name)}.ipynb" and (folder / answer["notebook"]).is_file()
    assert 1 <= len(answer["columns"]) <= 8 and answer["records"] and answer["verdict"] and answer["limits"]
    assert all(len(record) == len(answer["columns"]) for record in answer["records"])
    for figure, caption in answer["figures"]:
        assert (folder / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG") and caption


@every_result
def test_an_answer_is_short(run, name):
    answer = answer_of(run, name)
    long = [part for part in re.split(r"\n\s*\n", f"{answer['answer']}\n\n{answer['limits']}") if len(part.split()) > 60]
    assert not long, "more than 60 words a paragraph"
    assert not re.search(r"\bnan\b|None|\{\{|undefined", answer["answer"] + answer["limits"]), answer["answer"]


@every_result
def test_a_headline_belongs_to_its_rows(run, name):
    headline = answer_of(run, name)["headline"]
    if headline is None: return
    assert headline["label"] and math.isfinite(headline["value"]) and (headline["low"] is None) == (headline["high"] is None)
    if headline["low"] is not None: assert headline["low"] <= headline["value"] <= headline["high"]
    if headline["seeds"] is not None: assert headline["seeds"] in (1, len(seeds_of(run)))


@every_run
def test_figures_belong_to_a_result(run):
    shown = {figure for name in MADE[run] for figure, _ in answer_of(run, name)["figures"]}
    assert {path.stem for path in (OUTPUTS / run / "figures").glob("*.png")} == shown


@every_run
def test_executed_notebooks_are_those_of_results(run):
    "Training notebooks are not kept; their curves are."
    folder, seeds = OUTPUTS / run, seeds_of(run)
    assert {path.stem for path in (folder / "notebooks").glob("*.ipynb")} == {entry.get("notebook", name) for name, entry in MADE[run].items()}
    if run in WITHOUT_CURVES: return
    graph = nodes(Study(run, out=str(folder), seed=seeds[0], seeds=len(seeds)))
    trained = {name for name in with_needs(graph, ["report"]) if graph[name].notebook == "train.ipynb"}
    assert {path.stem for path in (folder / "curves").glob("*.csv")} == trained
    for path in (folder / "curves").glob("*.csv"): assert {"step", "seconds"} <= set(pd.read_csv(path, nrows=2)), path.name


@every_run
def test_links_of_executed_notebooks_lead_somewhere(run):
    for path in (OUTPUTS / run / "notebooks").glob("*.ipynb"):
        prose = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
        links = {link for source in prose for link in re.findall(r"\]\(([^)#:]+)\)", source)}
        assert not [link for link in links if not (path.parent / link).exists()], path.name


KEPT = {"tables", "answers", "figures", "notebooks", "curves", "report.html"}
IGNORED = {"models", "logs", "training", "evaluations", "samples", "samples_coloured.json", "scores", ".snakemake"}
WITHOUT_CURVES = {"cpu"}      # trained before curves were kept beside the tables


@every_run
def test_nothing_else_is_committed(run):
    folder = OUTPUTS / run
    kept = KEPT - ({"curves"} if run in WITHOUT_CURVES else set())
    assert kept <= {path.name for path in folder.iterdir()} <= kept | IGNORED
    texts = [path for part in sorted(kept - {"figures", "notebooks", "report.html"}) for path in (folder / part).iterdir()]
    for path in [*texts, folder / "report.html"]:
        assert not re.search(r"/(?:root|home|Users|tmp|work)/", path.read_text(encoding="utf-8")), path


@every_result
def test_every_column_is_explained(run, name):
    header = (OUTPUTS / run / "tables" / f"{name}.csv").read_text(encoding="utf-8").partition("\n")[0].split(",")
    assert not {base_column(column) for column in header} - set(columns())


@every_run
def test_the_page_has_every_result(run):
    page = (OUTPUTS / run / "report.html").read_text(encoding="utf-8")
    for name in MADE[run]: assert f'id="{name}"' in page, name


# Numbers

def test_samples_recompute_the_text_metrics():
    "Anybody can compute distinct-1 again from the samples; those of real stories are not committed."
    scored = [row for name in MADE["quick"] for row in rows_of("quick", name) if row.get("samples")]
    folder = OUTPUTS / "quick"
    assert {row["samples"] for row in scored} == {f"samples/{path.name}" for path in (folder / "samples").iterdir()}
    for row in scored:
        texts = [json.loads(line)["output"] for line in (folder / row["samples"]).read_text(encoding="utf-8").splitlines()]
        assert len(texts) == row["n"] <= 1000 and distinct_n(texts, 1) == pytest.approx(row["distinct1"], abs=1e-9), row["samples"]


@every_run
def test_text_and_speed_rows_say_how_they_were_measured(run):
    for name in ("table5", "gpt2_comparison"):
        for row in rows_of(run, name):
            assert {"mauve_floor", "mauve_features", "ppl_model", "samples"} <= row.keys() and row["ppl"] > 1, (name, row["system"])
            assert row["samples"].startswith(f"samples/{name}-")
    rows = rows_of(run, "speed")
    assert {row["system"] for row in rows} >= {"autoregressive", "no-op", "full"}
    assert {row["batch"] for row in rows} == set(load_preset(run).timing_batches)
    assert all(row["repeats"] >= 1 and row["ms_per_sample"] > 0 and row["model"] for row in rows)


def test_the_null_model_agrees_with_the_no_op():
    "On the test stories of the cpu run, at every rate."
    rows = [row for row in rows_of("cpu", "misalignment") if row["part"] == "curve"]
    def mean(system, dropout):
        values = [row["target_probability"] for row in rows if row["system"] == system and row["dropout"] == dropout]
        return sum(values) / len(values)
    rates = {row["dropout"] for row in rows if row["system"] == "no-op"}
    assert CURVE <= rates
    for dropout in rates: assert abs(mean("null model", dropout) - mean("no-op", dropout)) < .02, dropout


ORDER = ("DraftPrior", "no-op", "re-aligned", "oracle, last + embedding")      # ascending in both runs


@every_run
def test_quick_orders_the_systems_as_cpu_does(run):
    "At 5 % dropout, unknown length: means in this order, and gains over the no-op that exclude zero."
    table = pd.read_csv(OUTPUTS / run / "tables" / "realign.csv").query("part == 'main'")
    lines = table[table.length.isin(("unknown", TARGET_LENGTH))].drop_duplicates("system").set_index("system").loc[[*ORDER, "full"]]
    assert lines.target_probability[list(ORDER)].is_monotonic_increasing and lines.n.min() >= 100
    below, above = lines.loc[["DraftPrior", "full"]], lines.loc[["re-aligned"]]
    assert (below.over_no_op_high < 0).all() and (above.over_no_op_low > 0).all()
