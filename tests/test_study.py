"The whole study on a tiny preset through the command line: complete, resumable, quiet about the machine."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from commands import PROVENANCE, call, files_of, refused, write_preset
from conftest import TINY
from damage import Files, campaign, damaged
from safetensors.torch import save_file

from latentrefine.core import ROOT, ROW_FIELDS, load_rows
from latentrefine.measure import notebook_source, results, source_digest, systems_of
from latentrefine.notebooks import NOTEBOOKS, lock, run_node
from latentrefine.presets import load_preset
from latentrefine.registry import models_of
from latentrefine.reproduce import due_nodes, nodes
from latentrefine.study import DRAFT_STATES, Study
from latentrefine.training import adamw, optimizer_step, read_model, read_state, save_state, state_note

RESULTS = results()
MADE = {name: entry for name, entry in RESULTS.items() if entry.get("notebook", name) == name}     # one notebook each
FIRST_SEED = {name for name, entry in MADE.items() if entry.get("seeds") == "first" or entry.get("first")}


# The whole graph, once

@pytest.fixture(scope="session")
def whole(tiny_preset, tmp_path_factory):
    """(folder, preset, what the run said) of one complete run in the ways of gpu-bert: an encoder pretrained here,
    a DraftPrior a rate, bfloat16, the whole vocabulary. The preset is its own, so that tests may edit it."""
    ways = dict(encoder="in-domain", shared_prior=False, precision="bfloat16", vocabulary="all")
    assert ways == {field: getattr(load_preset("gpu-bert"), field) for field in ways}
    out, mine = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("mine") / "tiny.yaml"
    preset = write_preset(mine, tiny_preset, dropouts=[.03, .05], claim_widths=[], **ways)
    code, said, err = call("reproduce", "--preset", preset, "--out", out, "--cores", 2)
    log = out / "logs" / "study.log"
    assert code == 0, (err, log.read_text()[-4000:] if log.exists() else "")
    return out, preset, said


def test_everything_is_there(whole):
    out, preset, said = whole
    assert "made in" in said and (out / "report.html").is_file()
    for name in RESULTS:
        for kind in ("json", "csv", "md"): assert (out / "tables" / f"{name}.{kind}").stat().st_size > 20, (name, kind)
        answer = json.loads((out / "answers" / f"{name}.json").read_text())
        assert answer["name"] == name and answer["answer"] and len(answer["columns"]) <= 8 and answer["records"]
        for figure, caption in answer["figures"]:
            assert (out / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG") and caption, figure
    assert len(list((out / "figures").glob("*.png"))) >= 6
    for name in MADE: assert (out / "notebooks" / f"{name}.ipynb").is_file(), name
    for node in nodes(Study(str(preset), out=str(out))).values():
        for file in node.products: assert (out / file).is_file(), (node.name, file)
        if node.notebook == "train.ipynb": assert (out / "curves" / f"{node.name}.csv").is_file(), node.name
    assert not list(out.rglob("*.partial")) and not list(out.rglob("state.safetensors"))


def test_every_notebook_was_run(whole):
    graph = nodes(Study(str(whole[1]), out=str(whole[0])))
    run = {path.relative_to(NOTEBOOKS).as_posix() for path in (NOTEBOOKS / "results").glob("*.ipynb")} | {"train.ipynb"}
    assert {node.notebook for node in graph.values() if node.notebook} == run
    assert {node.name for node in graph.values() if not node.notebook} == {"report"}


def test_rows_carry_their_origin(whole):
    out, facts = whole[0], (*ROW_FIELDS, *PROVENANCE, "digest", "source", "stories", "train_stories", "vocabulary", "reduced")
    for name in RESULTS:
        rows = load_rows(out / "tables" / f"{name}.json")
        assert rows and rows[0]["source"] == source_digest(Study(whole[1]), RESULTS[name], notebook_source(name)), name
        for row in rows:
            assert not [f for f in facts if f not in row], (name, row)
            assert "MLM on the stories" in row["encoder"] or row["system"].startswith(("GPT-2", "autoregressive")), (name, row)
            assert row["preset"] == "tiny" and row["seed"] == 1337 and row["reduced"] is True
            for field, value in row.items():
                score = ("probability" in field or field.startswith("top1")) and "gain" not in field
                if score and value is not None: assert 0 <= value <= 1, (name, field, value)


def test_rows_of_one_system_agree_between_tables(whole):
    rows = {name: load_rows(whole[0] / "tables" / f"{name}.json") for name in ("table2", "table3")}
    systems = [entry.name for entry in systems_of(RESULTS["table3"])]
    assert {row["system"] for row in rows["table3"]} == {*systems, "oracle"}
    assert len({row["n"] for row in rows["table3"]}) == 1           # the same slots for all
    def at_rate(row): return row["dropout"] == .05 and row["width"] == 32
    shared = {row["system"]: row["ce"] for row in rows["table2"] if at_rate(row)}
    again = {row["system"]: row["ce"] for row in rows["table3"] if at_rate(row) and row["system"] in shared}
    assert len(again) == 2 and again == pytest.approx({name: shared[name] for name in again}, abs=1e-5)


def test_what_is_written_names_no_machine(whole):
    "Paths that the caller gave (folder, preset) may stand in the parameters; nothing else of this machine may."
    out, preset, _ = whole
    executed = [*(out / "notebooks").glob("*.ipynb"), *(out / "training").glob("*.ipynb")]
    told = [path for folder in ("tables", "answers", "curves") for path in (out / folder).iterdir()]
    for path in [*executed, *told, out / "report.html"]:
        text = path.read_text(encoding="utf-8").replace(str(out), "").replace(str(preset), "")
        for place in (str(ROOT), str(Path.home()) + "/", str(preset.parents[1]), sys.prefix):
            assert place not in text, (path.name, place)
    for path in executed:
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        outputs = [o for c in cells for o in c["outputs"]]
        assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"], path.name
        assert sum("injected-parameters" in c["metadata"].get("tags", []) for c in cells) == 1


def test_the_page_stands_alone(whole):
    page = (whole[0] / "report.html").read_text()
    for name, entry in RESULTS.items():
        assert f'id="{name}"' in page and f"notebooks/{entry.get('notebook', name)}.ipynb" in page, name
    links = [link for link in re.findall(r'(?:src|href)="([^"]*)"', page) if not link.startswith(("data:", "#"))]
    assert all((whole[0] / link).is_file() for link in links) and "<script" not in page


def due(out, preset, targets=("report",), seeds=0, overrides=()):
    "Names of the nodes that a call would run."
    return due_nodes(Study(str(preset), out=str(out), seeds=seeds, overrides=overrides), list(targets))


def test_a_second_call_does_nothing(whole):
    out, preset, _ = whole
    before = files_of(out)
    preset.write_text(preset.read_text() + "# a remark\n")
    code, said, err = call("reproduce", "--preset", preset, "--out", out, "--cores", 2)
    assert code == 0 and "nothing to do" in said, (said, err)
    assert files_of(out) == before
    code, said, _ = call("plan", "--preset", preset, "--out", out)
    assert code == 0 and "due  " not in said and said.splitlines()[-1].startswith("0 of ")


READS_HEADS = {"table3", "table5", "table6", "gaussian_start", "gpt2_comparison", "misalignment", "basin", "realign",
               "systems", "prompt_only", "failures", "external", "spaces", "claims"}
READS_ALL_TRAINING = {"cosmos", "cola"}      # they train variants themselves


def test_a_changed_setting_reruns_what_depends_on_it(whole, tmp_path):
    """Nor does the place of the preset matter: the copy lies elsewhere. An override does the same.
    Asking what is due changes nothing."""
    out, preset, _ = whole
    def marks(): return {path: (path.read_text(), path.stat().st_mtime_ns) for path in (out / "logs").glob("*.done")}
    before = marks()
    training = {**TINY["training"], "head": {**TINY["training"]["head"], "lr": 1e-3}}
    changed = write_preset(tmp_path / "tiny.yaml", preset, training=training)
    heads = {"head-flow-32-p5-s1337", "head-metric-32-p5-s1337", "head-metric-32-p5-long-s1337", "mixed-head-32-s1337"}
    assert due(out, changed) == {*heads, *READS_HEADS, *READS_ALL_TRAINING, "report"}
    assert due(out, preset, overrides=["training.head.lr=1e-3"]) == due(out, changed)
    words = ("reproduce", "training.head.lr=1e-3", "--preset", preset, "--out", out, "--", "--dry-run")
    assert call(*words)[0] == 0 and len(marks()) > 50
    assert marks() == before and not due(out, preset)


def test_another_seed_trains_only_its_own_models(whole):
    out, preset, _ = whole
    more = due(out, preset, seeds=2)
    assert {name for name in more if not name.endswith("-s1338")} == {*MADE, "report"} - FIRST_SEED
    assert "autoencoder-32-mixed-s1338" in more
    variants = {model.name for model in models_of(load_preset(str(preset))).values() if model.first_seed or model.shared}
    assert variants and not {name.removesuffix("-s1338") for name in more} & variants


@pytest.mark.parametrize("name", ["table3", "spaces", "cola"])
def test_two_seeds_share_a_table(whole, tmp_path, name):
    "The second seed has the models of the first, so that no more need be trained than what the notebook trains itself."
    out, preset, _ = whole
    for folder in (out / "models").iterdir():
        for seed in ("1337", "1338") if folder.name.endswith("-s1337") else ("",):
            place = tmp_path / "models" / folder.name.replace("1337", seed)
            (shutil.copytree if folder.is_dir() else shutil.copy)(folder, place)
    parameters = dict(preset=str(preset), stories="", out=str(tmp_path), seed=1337, seeds=2)
    run_node(name, f"results/{name}.ipynb", parameters, tmp_path)
    rows = load_rows(tmp_path / "tables" / f"{name}.json")
    for seed in (1337, 1338): assert len([row for row in rows if row["seed"] == seed]) >= len(rows) // 3, seed
    assert (tmp_path / "notebooks" / f"{name}.ipynb").is_file()


def test_tables_are_printed(whole):
    out, preset, _ = whole
    code, said, _ = call("tables", "table3", "--preset", preset, "--out", out)
    assert code == 0 and "table3" in said and "| System" in said and "table2" not in said
    refused("tables", "table9", "--preset", preset, "--out", out, says=["table9", "table3", "latentrefine reproduce"])


def test_a_run_is_compared_with_another(whole, tmp_path):
    "Value by value; exit code 1 where one lies outside its interval; a run is not compared with itself."
    out, preset, _ = whole
    shutil.copytree(out / "tables", tmp_path / "tables")
    given = "compare", "--preset", preset, "--out", out, "--with"
    code, said, err = call(*given, tmp_path)
    whole_count = re.search(r"(\d+) of (\d+) committed values reproduced", said)
    assert code == 0 and whole_count and whole_count[1] == whole_count[2] and int(whole_count[1]) > 20, said + err
    frame = pd.read_csv(tmp_path / "tables" / "table3.csv")
    frame.loc[0, ["target_probability", "target_probability_low", "target_probability_high"]] = .5
    frame.to_csv(tmp_path / "tables" / "table3.csv", index=False)
    code, said, _ = call(*given, tmp_path)
    assert code == 1 and f"{int(whole_count[1]) - 1} of {whole_count[1]}" in said and "table3" in said
    refused(*given, out, says=["the run itself", "--with"])
    refused("reproduce", "--preset", preset, "--out", out, "--group", "all", says=["--group all", "peers"])
    for chosen in (["--group", "report"], ["--group", "peers"], ["--group", "baselines"], ["speed"]):
        code, said, err = call("reproduce", "--preset", preset, "--out", out, *chosen)
        assert code == 0 and "nothing to do" in said, (chosen, said + err)
    remedy = f"latentrefine reproduce --preset {preset} --out"      # what the whole graph was made with
    assert remedy in refused("publish", "--preset", preset, "--out", tmp_path, says=["not finished"])
    assert remedy in refused("compare", "--preset", preset, "--out", tmp_path / "none", "--with", out, says=["no result in common"])


# Measuring and telling

def test_telling_measures_nothing(whole, tmp_path):
    "A result runs again on its rows, with models and, rendered, without; its rows and its words stay."
    out, preset, _ = whole
    for folder in ("tables", "answers", "figures", "models"): shutil.copytree(out / folder, tmp_path / folder)
    def state(*kinds): return {p: p.stat().st_mtime_ns for p in (tmp_path / "tables").iterdir() if p.suffix in kinds}
    measured, told = state(".json", ".csv"), (tmp_path / "tables" / "table2.md").stat().st_mtime_ns
    run_node("table2", "results/table2.ipynb", dict(preset=str(preset), out=str(tmp_path), seed=1337, seeds=1), tmp_path)
    assert state(".json", ".csv") == measured and (tmp_path / "tables" / "table2.md").stat().st_mtime_ns > told
    shutil.rmtree(tmp_path / "models")
    code, said, err = call("render", "table3", "--preset", preset, "--out", tmp_path)
    assert code == 0 and "table3 rendered" in said and (tmp_path / "report.html").is_file(), err
    assert state(".json", ".csv") == measured and "LATENTREFINE_RENDER_ONLY" not in os.environ
    for file in ("tables/table2.md", "tables/table3.md", "answers/table2.json"):
        assert (tmp_path / file).read_text() == (out / file).read_text(), file
    (tmp_path / "tables" / "table4.csv").unlink()
    refused("render", "table4", "--preset", preset, "--out", tmp_path, says=["no rows of table4", "table3"])


def test_another_model_is_measured_again(whole, tmp_path):
    "The rows depend on the very weights."
    out, preset, _ = whole
    for folder in ("tables", "models"): shutil.copytree(out / folder, tmp_path / folder)
    config = tmp_path / "models" / "prior-32-p5-s1337" / "config.json"
    study = Study(str(preset), out=str(tmp_path), overrides=["training.prior.steps=4"])
    model = models_of(study.preset)["prior-32-p5"]
    shutil.rmtree(config.parent)
    model.train(study, study.model(model.name), **model.parameters)
    before = (tmp_path / "tables" / "table2.json").read_text()
    run_node("table2", "results/table2.ipynb", dict(preset=str(preset), out=str(tmp_path), seed=1337, seeds=1), tmp_path)
    rows, old = load_rows(tmp_path / "tables" / "table2.json"), json.loads(before)
    assert rows[0]["digest"] != old[0]["digest"]
    changed = {(a["system"], a["width"], a["dropout"]) for a, b in zip(rows, old) if a["ce"] != b["ce"]}
    assert changed == {(row["system"], 32, .05) for row in old if row["system"] not in ("no-op", "oracle")}


# Damage

def test_damage_is_refused_by_name_or_mended(whole, tmp_path):
    """Flips, cuts and edits of files of the finished study. LATENTREFINE_EDITS=2000 makes a long run of it."""
    out, preset, _ = whole
    study = Study(str(preset), out=str(out))
    net = torch.nn.Linear(3, 2)
    optimizer = adamw(net.parameters(), .1, (), 1.)
    optimizer_step(optimizer, [*net.parameters()], net(torch.ones(1, 3)).sum(), .1)
    save_state(tmp_path / "state.safetensors", net, optimizer, 7, [dict(step=6, loss=.5)], "key")
    told, faults = campaign(Files(study, out / "models" / "encoder", tmp_path / "state.safetensors"))
    assert not faults, "\n".join(faults)
    assert len(told) >= 8 and set().union(*told.values()) >= {"refused", "made again"}, told
    assert not due(out, preset)


def test_what_is_damaged_or_missing_is_made_again(whole, tmp_path):
    "Exactly that and what depends on it is due; a remedy that is printed leads to success."
    out, preset, _ = whole
    assert not due(out, preset)
    weights = out / "models" / "head-flow-32-p5-s1337" / "model.safetensors"
    data = weights.read_bytes()
    with damaged(weights, data[:-1] + bytes([data[-1] ^ 1])):
        assert {"head-flow-32-p5-s1337", "table3", "report"} <= due(out, preset) < set(nodes(Study(str(preset), out=str(out))))
    for name, node in (("figures/realign.png", "realign"), ("notebooks/table2.ipynb", "table2"), ("tables/table1.md", "table1"), ("report.html", "report")):
        with damaged(out / name, b"x"): assert node in due(out, preset), name
    assert not due(out, preset)
    page = out / "report.html"
    whole_page = page.read_text()
    page.write_text("x")
    code, said, err = call("reproduce", "--preset", preset, "--out", out, "--cores", 2)
    assert code == 0 and "made in" in said and page.read_text() == whole_page, err


# Killed, interrupted, resumed

LONG = dict(steps=600, lr=5e-3, batch=4, slots=64, save_seconds=0)


@pytest.fixture
def long_preset(tiny_preset, tmp_path):
    "The tiny preset with an autoencoder that trains for some seconds and keeps its state at every step."
    return write_preset(tmp_path / "preset" / "long.yaml", tiny_preset, training={**TINY["training"], "autoencoder": LONG})


class Running:
    "A call of the command line in a process group of its own."
    def __init__(self, folder, *words):
        self.err = folder / "stderr.txt"
        with self.err.open("w") as err:
            command = [sys.executable, "-m", "latentrefine.command", *map(str, words)]
            def listen(): signal.signal(signal.SIGINT, signal.default_int_handler)
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err,
                                            start_new_session=True, preexec_fn=listen)

    def family(self): return psutil.Process(self.process.pid).children(recursive=True)

    def until(self, ready, seconds=120):
        "Wait until `ready()` is true while the call runs."
        end = time.monotonic() + seconds
        while not (value := ready()):
            assert self.process.poll() is None, f"ended early: {self.err.read_text()}"
            assert time.monotonic() < end, "waited in vain"
            time.sleep(.02)
        return value

    def runs_a_node(self):
        "Whether the server of workers has forked one."
        def serves(p): return p.is_running() and "latentrefine.workers import serve" in " ".join(p.cmdline())
        try: return sum(map(serves, self.family())) > 1
        except psutil.NoSuchProcess: return False


def ended(processes, seconds=15):
    "Wait until all processes have ended; those that have not."
    return [p for p in psutil.wait_procs(processes, timeout=seconds)[1] if p.status() != psutil.STATUS_ZOMBIE]


def steps_of(state):
    found = read_state(state)
    return found[0]["step"] if found else 0


def mark(state):
    "Leave a sign in the curve of a state, to see later that training went on from it."
    facts, tensors = read_state(state)
    facts["curve"][0]["loss"] = 123.5
    save_file(tensors, state, metadata={"note": state_note(tensors, **facts)})


def test_killed_interrupted_and_resumed(long_preset, tmp_path):
    out, target = tmp_path / "out", "autoencoder-16"
    words = ("reproduce", target, "--preset", long_preset, "--out", out, "--cores", 2)
    state = out / "models" / f"{target}-s1337" / "state.safetensors"

    run = Running(tmp_path, *words)                          # 1. the command alone is killed: its children end by themselves
    run.until(run.runs_a_node)
    refused(*words, says=["in use by another run", Path(out)])     # meanwhile a second run is refused
    family = run.family()
    run.process.kill(); run.process.wait()
    assert len(family) >= 3 and not ended(family)
    already = steps_of(state)

    run = Running(tmp_path, *words)                          # 2. Ctrl-C in the middle of training
    run.until(lambda: steps_of(state) > already + 3)
    family = run.family()
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.process.wait(timeout=60) == 130, run.err.read_text()
    said = run.err.read_text()
    ours = [line for line in said.splitlines() if line.startswith("latentrefine:")]
    assert "Traceback" not in said, said
    assert ours == ["latentrefine: interrupted; the same command continues where it stopped"], said
    assert not ended(family)
    first = steps_of(state)
    assert already + 3 < first < LONG["steps"]

    run = Running(tmp_path, *words)                          # 3. everything is killed at once, some steps later
    run.until(lambda: steps_of(state) > first + 3)
    family = run.family()
    os.killpg(run.process.pid, signal.SIGKILL); run.process.wait()
    assert not ended(family)                                 # the worker included
    assert first + 3 < steps_of(state) < LONG["steps"]
    mark(state)

    code, said, err = call(*words)                           # 4. to the end
    assert code == 0 and "made in" in said, err
    curve = (state.parent / "curve.csv").read_text().splitlines()
    assert len(curve) == LONG["steps"] + 1 and "123.5" in curve[1]       # it went on from the marked state
    assert not state.exists() and not list(out.rglob("*.partial"))

    study = Study(str(long_preset), out=str(tmp_path / "whole"))         # and ends where an uninterrupted run ends
    model = models_of(study.preset)[target]
    model.train(study, study.model(target), **model.parameters)
    (_, resumed), (_, straight) = (read_model(folder / "models" / state.parent.name) for folder in (out, tmp_path / "whole"))
    assert resumed.keys() == straight.keys() and all(torch.equal(resumed[k], straight[k]) for k in straight)


def test_interrupted_while_torch_is_imported(tmp_path):
    run = Running(tmp_path, "reproduce", "--preset", "nope")
    run.until(lambda: any("torch" in m.path for m in psutil.Process(run.process.pid).memory_maps()))
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(timeout=60) == 130
    said = run.err.read_text()
    assert "Traceback" not in said and "latentrefine: interrupted" in said


def test_two_runs_in_one_folder(tiny_preset, tmp_path):
    with lock(tmp_path / "logs" / "study.lock", "this"):
        refused("reproduce", "--preset", tiny_preset, "--out", tmp_path, says=["in use by another run", "--out"])


def test_words_behind_the_dashes_go_to_snakemake(tiny_preset, tmp_path):
    words = ("reproduce", "table1", "--preset", tiny_preset, "--out", tmp_path)
    code, said, err = call(*words, "--", "--dry-run", "--jobs", "1")
    log = (tmp_path / "logs" / "study.log").read_text()
    assert code == 0 and "This was a dry-run" in log and not (tmp_path / "tables").exists(), err
    assert "a dry run" in said and "made" not in said
    code, said, err = call("reproduce", "--preset", "quick", "--out", tmp_path / "quick", "--", "-n")     # it has committed rows
    assert code == 0 and "a dry run" in said, said + err
    code, *_ = call(*words, "--", "--no-such-option")
    assert code == 2 and "--no-such-option" in (tmp_path / "logs" / "study.log").read_text()
    refused("tables", "--preset", tiny_preset, "--", "--jobs", "1", says=["words behind --", "reproduce", "tables"])


def test_kept_states_change_nothing_but_rounding(trained, tmp_path, monkeypatch):
    "The states of drafts are kept in half precision and shared by the models that are trained on the same drafts."
    model = next(model for model in models_of(trained.preset).values() if model.group == "prior")
    def curve(): return model.train(trained, tmp_path / "prior", **model.parameters)
    kept, folder = curve(), trained.out / DRAFT_STATES
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(files) >= 2 and curve()[-1]["loss"] == kept[-1]["loss"]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == files
    monkeypatch.setattr(Study, "cached_encoder", property(lambda study: study.encoder))
    for line, other in zip(kept, curve()): assert line["loss"] == pytest.approx(other["loss"], rel=5e-3)


# A real Slurm of one node, which slurm.sh starts

SCRIPT, TARGETS = Path(__file__).with_name("slurm.sh"), ("table1", "table2")
NEEDED = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if not shutil.which(name)]
if not find_spec("snakemake_executor_plugin_slurm"): NEEDED.append("snakemake-executor-plugin-slurm")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if NEEDED or os.geteuid(): pytest.skip(f"not installed: {', '.join(NEEDED)}" if NEEDED else "root is needed to start Slurm")
    folder = tmp_path_factory.mktemp("slurm")
    code = subprocess.run(["bash", SCRIPT, "start", folder], capture_output=True).returncode
    if code == 3: pytest.skip("this machine has a Slurm of its own")
    assert code == 0, "Slurm does not start"
    yield folder
    subprocess.run(["bash", SCRIPT, "stop", folder], capture_output=True)


def test_a_cluster_makes_the_tables_of_one_machine(slurm, whole, tmp_path):
    out, preset, _ = whole
    more = "--executor", "slurm", "--jobs", "4", "--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "2"
    code, said, err = call("reproduce", *TARGETS, "--preset", preset, "--out", tmp_path, "--", *more)
    assert code == 0, said + err
    for name in TARGETS: assert (tmp_path / "tables" / f"{name}.csv").read_bytes() == (out / "tables" / f"{name}.csv").read_bytes()
    assert "submitted with SLURM jobid" in (tmp_path / "logs" / "study.log").read_text()
