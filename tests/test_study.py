"The whole study on a tiny preset through the command line: complete, resumable, quiet about the machine, plain about mistakes."
import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import papermill
import psutil
import pytest
import torch
import yaml
from conftest import TINY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentrefine.autoencoder import AutoencoderConfig, train_autoencoder
from latentrefine.core import ROOT, ROW_FIELDS, StudyError, load_rows
from latentrefine.encoder import load_encoder
from latentrefine.notebooks import EXPERIMENTS, lock, run_node, run_notebook
from latentrefine.report import beside_published
from latentrefine.command import main
from latentrefine.reproduce import engine, nodes
from latentrefine.study import REPORTED, SYSTEMS, Study, load_preset
from latentrefine.training import Training, read_model, read_state, save_model

PROVENANCE = ("notebook", "preset", "seconds", "commit", "versions", "hardware")
EXPERIMENT_NAMES = ("stories", *(f"table{i}" for i in range(1, 7)), "figure1", "gaussian_start", "gpt2_comparison", "misalignment", "basin", "realign", "systems", "spaces", "cosmos", "cola", "klflow", "lrd", "claims")


def call(*words):
    "Exit code, stdout and stderr of a call in this process."
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err): code = main([str(w) for w in words])
    return code, out.getvalue(), err.getvalue()


def refused(*words, says=()):
    "The message of a call that must end with code 2, one error, and no traceback."
    code, out, err = call(*words)
    lines = [line for line in err.splitlines() if "latentrefine: error:" in line]
    assert code == 2, (code, out, err)
    assert len(lines) == 1 and "Traceback" not in out + err, err
    bare = re.sub(r"\S*/pytest-of-[^/]+/pytest-\d+/[^/\s]*", "", err)      # the folder of a test bears its name: not to be taken for a word of the message
    for word in says: assert str(word) in (err if isinstance(word, Path) else bare), (word, err)


def write_preset(path, base, **change):
    "A copy of the preset `base` with top-level fields changed."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**yaml.safe_load(Path(base).read_text()), **change}, sort_keys=False))
    return path


# The whole graph, once

@pytest.fixture(scope="session")
def whole(tiny_preset, tmp_path_factory):
    """(folder, preset, what the run said) of one complete run in the ways of gpu-bert: an encoder pretrained here, a DraftPrior a rate,
    bfloat16, the whole vocabulary. The preset is its own, so that tests may edit it."""
    out, ways = tmp_path_factory.mktemp("whole"), dict(encoder="in-domain", shared_prior=False, precision="bfloat16", vocabulary="all", dropouts=[.03, .05], claim_widths=[])
    preset = write_preset(tmp_path_factory.mktemp("mine") / "tiny.yaml", tiny_preset, **ways)
    assert {field: load_preset("gpu-bert")[field] for field in ("encoder", "shared_prior", "precision", "vocabulary")} == {field: ways[field] for field in ("encoder", "shared_prior", "precision", "vocabulary")}
    code, said, err = call("reproduce", "--preset", preset, "--out", out, "--cores", 2)
    log = out / "logs" / "study.log"
    assert code == 0, (err, log.read_text()[-4000:] if log.exists() else "")
    return out, preset, said


def files_of(out):
    "Modification times of everything a run makes, logs aside."
    return {p.relative_to(out).as_posix(): p.stat().st_mtime_ns for p in out.rglob("*")
            if p.is_file() and p.relative_to(out).parts[0] not in ("logs", ".snakemake")}


def test_everything_is_there(whole):
    out, preset, said = whole
    assert "regenerated" in said and (out / "report.html").is_file()
    for name in EXPERIMENT_NAMES:
        for kind in ("json", "csv", "md"): assert (out / "tables" / f"{name}.{kind}").stat().st_size > 20, (name, kind)
        drawn = re.findall(r'save_figure\(study, "(\w+)"', (EXPERIMENTS / f"{name}.ipynb").read_text().replace('\\"', '"'))
        for figure in drawn: assert (out / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG"), figure
    assert len(list((out / "figures").glob("*.png"))) >= 6
    for name in nodes(Study(str(preset), out=str(out))): assert (out / "notebooks" / f"{name}.ipynb").is_file(), name
    assert not list(out.rglob("*.partial")) and not list(out.rglob("state.safetensors"))


def test_every_notebook_of_an_experiment_was_run(whole):
    graph = nodes(Study(str(whole[1]), out=str(whole[0])))
    assert {node.notebook for node in graph.values()} == {p.stem for p in EXPERIMENTS.glob("*.ipynb")}


def test_rows_carry_their_origin(whole):
    out, preset, _ = whole
    for name in EXPERIMENT_NAMES:
        rows = load_rows(out / "tables" / f"{name}.json")
        assert rows, name
        for row in rows:
            assert not [f for f in (*ROW_FIELDS, *PROVENANCE, "stories", "train_stories", "vocabulary", "reduced") if f not in row], (name, row)
            assert "MLM on the stories" in row["encoder"] or row["system"].startswith(("GPT-2", "autoregressive")), (name, row)
            assert row["preset"] == "tiny" and row["seed"] == 1337 and row["reduced"] is True
            for field, value in row.items():
                if value is not None and ("probability" in field or field.startswith("top1")): assert 0 <= value <= 1, (name, field, value)
    rows = load_rows(out / "tables" / "table3.json")
    assert [row["system"] for row in rows] == [*(name for name in REPORTED if name != "long DraftPrior"), "oracle"]
    assert len({row["n"] for row in rows}) == 1                     # one ruler: the same slots for all
    three, two = (next(r for r in load_rows(out / "tables" / f"{t}.json") if r["system"] == "DraftPrior" and r["dropout"] == .05 and r["width"] == 32)
                  for t in ("table3", "table2"))
    assert three["ce"] == pytest.approx(two["ce"], abs=1e-5)        # the same system in two tables


def test_executed_notebooks_name_no_machine(whole):
    "Paths that the caller gave (folder, preset) may stand in the parameters; nothing else of this machine may."
    out, preset, _ = whole
    for path in [*(out / "notebooks").glob("*.ipynb"), *(out / "tables").iterdir(), out / "report.html"]:
        text = path.read_text(encoding="utf-8").replace(str(out), "").replace(str(preset), "")
        for place in (str(ROOT), str(Path.home()) + "/", str(preset.parents[1]), sys.prefix): assert place not in text, (path.name, place)
    for path in (out / "notebooks").glob("*.ipynb"):
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        outputs = [o for c in cells for o in c["outputs"]]
        assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"], path.name
        assert sum("injected-parameters" in c["metadata"].get("tags", []) for c in cells) == 1


def test_the_page_stands_alone(whole):
    page = (whole[0] / "report.html").read_text()
    for name in EXPERIMENT_NAMES: assert f"notebooks/{name}.ipynb" in page, name
    assert not re.search(r'(?:src|href)="(?!data:|notebooks/)', page)


def due(out, preset, target="report", seeds=0):
    "Names of the nodes that a call would run."
    run = subprocess.run([*engine(Study(str(preset), out=str(out), seeds=seeds), [target], 2), "--dry-run"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return set(re.findall(r"^(?:local)?rule (\w+):", run.stdout + run.stderr, re.M)) - {"all"}


def test_a_second_call_does_nothing(whole):
    out, preset, _ = whole
    before = files_of(out)
    preset.write_text(preset.read_text() + "# a remark\n")
    code, said, err = call("reproduce", "--preset", preset, "--out", out, "--cores", 2)
    assert code == 0 and "nothing to do" in said, (said, err)
    assert files_of(out) == before


def test_a_changed_setting_reruns_what_depends_on_it(whole, tmp_path):
    "Nor does the place of the preset matter: the copy lies elsewhere."
    out, preset, _ = whole
    training = {**TINY["training"], "head": {**TINY["training"]["head"], "lr": 1e-3}}
    changed = write_preset(tmp_path / "tiny.yaml", preset, training=training)
    heads = {f"head_{kind}_32_p5_s1337" for kind in ("flow", "metric")}
    assert due(out, changed) == {*heads, "table3", "table5", "table6", "gaussian_start", "gpt2_comparison", "misalignment", "basin", "realign", "systems", "spaces", "claims", "report"}


def test_another_seed_trains_only_its_own_models(whole):
    out, preset, _ = whole
    more = due(out, preset, seeds=2)
    assert {name for name in more if not name.endswith("_s1338")} == {*EXPERIMENT_NAMES, "report"} - {"stories", "klflow", "lrd"} and "autoencoder_32_mixed_s1338" in more


@pytest.mark.parametrize("name", ["table3", "spaces", "cola"])
def test_two_seeds_share_a_table(whole, tmp_path, name):
    "The second seed has the models of the first, so that no more need be trained than what the notebook trains itself."
    out, preset, _ = whole
    for folder in (out / "models").iterdir():
        for seed in ("1337", "1338") if folder.name.endswith("-s1337") else ("",):
            place = tmp_path / "models" / folder.name.replace("1337", seed)
            (shutil.copytree if folder.is_dir() else shutil.copy)(folder, place)
    run_node(name, name, dict(preset=str(preset), stories="", out=str(tmp_path), seed=1337, seeds=2), tmp_path)
    rows = load_rows(tmp_path / "tables" / f"{name}.json")
    for seed in (1337, 1338): assert len([row for row in rows if row["seed"] == seed]) >= len(rows) // 3, seed
    assert (tmp_path / "notebooks" / f"{name}.ipynb").is_file()


def test_tables_are_printed(whole):
    out, preset, _ = whole
    code, said, _ = call("tables", "table3", "--preset", preset, "--out", out)
    assert code == 0 and "table3" in said and "bounded residual" in said and "table2" not in said
    refused("tables", "table9", "--preset", preset, "--out", out, says=["table9", "table3", "latentrefine reproduce"])


# Killed, interrupted, resumed

LONG = Training(steps=400, lr=5e-3, batch=4, slots=64, save_seconds=0)


@pytest.fixture
def long_preset(tiny_preset, tmp_path):
    "The tiny preset with an autoencoder that trains for some seconds and keeps its state at every step."
    stage = dict(steps=LONG.steps, lr=LONG.lr, batch=LONG.batch, slots=LONG.slots, save_seconds=0)
    return write_preset(tmp_path / "preset" / "long.yaml", tiny_preset, training={**TINY["training"], "autoencoder": stage})


class Running:
    "A call of the command line in a process group of its own."
    def __init__(self, folder, *words):
        self.err = folder / "stderr.txt"
        with self.err.open("w") as err:
            self.process = subprocess.Popen([sys.executable, "-m", "latentrefine.command", *map(str, words)], stdout=subprocess.DEVNULL, stderr=err,
                                            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))

    def family(self): return psutil.Process(self.process.pid).children(recursive=True)

    def until(self, ready, seconds=120):
        "Wait until `ready()` is true while the call runs."
        end = time.monotonic() + seconds
        while not (value := ready()):
            assert self.process.poll() is None, f"ended early: {self.err.read_text()}"
            assert time.monotonic() < end, "waited in vain"
            time.sleep(.02)
        return value


def ended(processes, seconds=15):
    "Wait until all processes have ended; those that have not."
    return [p for p in psutil.wait_procs(processes, timeout=seconds)[1] if p.status() != psutil.STATUS_ZOMBIE]


def steps_of(state):
    found = read_state(state)
    return found[0]["step"] if found else 0


def mark(state):
    "Leave a sign in the curve of a state, to see later that training went on from it."
    tensors = load_file(state)
    with safe_open(state, "pt") as file: note = json.loads(file.metadata()["note"])
    note["curve"][0]["loss"] = 123.5
    save_file(tensors, state, metadata={"note": json.dumps(note)})


def test_killed_interrupted_and_resumed(long_preset, tmp_path):
    out, target = tmp_path / "out", "autoencoder-16"
    words = ("reproduce", target, "--preset", long_preset, "--out", out, "--cores", 2)
    state = out / "models" / f"{target}-s1337" / "state.safetensors"

    run = Running(tmp_path, *words)                          # 1. the command alone is killed: its children end by themselves
    run.until(lambda: any("ipykernel_launcher" in " ".join(p.cmdline()) for p in run.family() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE))
    refused(*words, says=["in use by another run", Path(out)])     # meanwhile a second run is refused
    family = run.family()
    run.process.kill(); run.process.wait()
    assert len(family) >= 3 and not ended(family)

    run = Running(tmp_path, *words)                          # 2. Ctrl-C in the middle of training
    run.until(lambda: steps_of(state) > 3)
    family = run.family()
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.process.wait(timeout=60) == 130, run.err.read_text()
    said = run.err.read_text()
    assert "Traceback" not in said and [line for line in said.splitlines() if line.startswith("latentrefine:")] == \
        ["latentrefine: interrupted; the same command continues where it stopped"], said
    assert not ended(family)
    first = steps_of(state)
    assert 3 < first < LONG.steps

    run = Running(tmp_path, *words)                          # 3. everything is killed at once, some steps later
    run.until(lambda: steps_of(state) > first + 3)
    family = run.family()
    os.killpg(run.process.pid, signal.SIGKILL); run.process.wait()
    assert not ended(family)                                 # the kernel has a group of its own
    assert first + 3 < steps_of(state) < LONG.steps
    mark(state)

    code, said, err = call(*words)                           # 4. to the end
    assert code == 0 and "regenerated" in said, err
    curve = (state.parent / "curve.csv").read_text().splitlines()
    assert len(curve) == LONG.steps + 1 and "123.5" in curve[1]          # it went on from the marked state
    assert not state.exists() and not list(out.rglob("*.partial"))

    study = Study(str(long_preset), out=str(tmp_path / "whole"))         # and ends where an uninterrupted run ends
    train_autoencoder(study.corpus(), study.encoder, AutoencoderConfig(32, 16), study.kept, study.training("autoencoder"), study.model(target))
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


# Use of what was trained

def test_refine(trained, tiny_preset):
    code, said, err = call("refine", "--preset", tiny_preset, "--out", trained.out, "--prompt", "Ann went out. It rained.", "--draft", "she her umbrella.")
    assert code == 0 and re.search(r"^ *[01]\.\d{3} [ +~] \S+$", said, re.M) and "+ put in, ~ exchanged; lost from the draft: " in said.splitlines()[-1], err
    for system in SYSTEMS: assert call("refine", "--preset", tiny_preset, "--out", trained.out, "--prompt", "A b.", "--draft", "c d.", "--system", system)[0] == 0


def as_file(path, stories):
    path.write_text("".join(json.dumps(dict(sentences=story.sentences)) + "\n" for story in stories))
    return path


def test_evaluate(trained, tiny_preset, tmp_path):
    "Training stories are left out; the rows are those of any table."
    given = as_file(tmp_path / "mine.jsonl", [*trained.splits["test"][:6], *trained.splits["train"][:2]])
    code, said, err = call("evaluate", "--preset", tiny_preset, "--out", trained.out, "--stories", given, "--dropout", ".05")
    assert code == 0 and "2 training stories" in said, err
    written, = (trained.out / "evaluations").glob("mine*.json")
    rows = load_rows(written)
    assert [row["system"] for row in rows] == ["oracle", "no-op", "re-aligned"] and all(row["evaluated"] == "mine.jsonl" and row["split"] == "file" for row in rows)
    assert not [f for row in rows for f in (*ROW_FIELDS, *PROVENANCE) if f not in row] and str(tmp_path) not in written.read_text()


# Mistakes, each answered with code 2 and a sentence

def test_unknown_preset_and_target(tmp_path, tiny_preset):
    refused("reproduce", "--preset", "quik", "--out", tmp_path, says=["quik", "quick"])
    refused("tables", "--preset", tmp_path / "none.yaml", "--out", tmp_path, says=["none.yaml"])
    refused("reproduce", "table9", "--preset", tiny_preset, "--out", tmp_path, says=["table9", "table2", "prior-32-shared"])
    refused("reproduce", "--cores", "0", "--preset", tiny_preset, "--out", tmp_path, says=["--cores 0"])


def nested(section, name, **fields): return {section: {**TINY[section], name: {**TINY[section][name], **fields}}}


PRESETS = {  # what is changed -> words of the message
    "unknown field": (dict(colour="red"), ["colour"]),
    "text for a number": (dict(limit="many"), ["limit", "many"]),
    "number for text": (dict(encoder=3), ["encoder"]),
    "list for a section": (dict(training=[1]), ["training"]),
    "number for a stage": (dict(training={**TINY["training"], "prior": 5}), ["prior"]),
    "unknown training field": (nested("training", "prior", step=3), ["training.prior", "step"]),
    "text for steps": (nested("training", "prior", steps="many"), ["steps", "many"]),
    "unknown size": (nested("sizes", "flow", colour=1), ["sizes.flow", "colour"]),
    "text for a size": (nested("sizes", "flow", depth="deep"), ["depth"]),
    "missing part": (dict(sizes={k: v for k, v in TINY["sizes"].items() if k != "head"}), ["head"]),
    "one width": (dict(widths=[32]), ["widths"]),
    "three widths": (dict(widths=[32, 16, 8]), ["widths"]),
    "text for a width": (dict(widths=["wide", 16]), ["widths"]),
    "heads that do not divide": (nested("sizes", "prior", heads=5), ["heads"]),
    "text for a rate": (dict(dropouts=["many", .05]), ["dropouts"]),
    "a rate above one": (dict(dropouts=[.05, 7.]), ["dropouts"]),
    "unknown vocabulary": (dict(vocabulary="some"), ["vocabulary"]),
    "unknown precision": (dict(precision="float16"), ["precision"]),
    "no test stories": (dict(test=0), ["test"]),
    "negative steps": (dict(flow_steps=-1), ["flow_steps"]),
    "too narrow an encoder to pretrain": (dict(encoder="in-domain", widths=[64, 16]), ["encoder", "the full width"]),
    "a seed in a stage": (nested("training", "prior", seed=1), ["training.prior", "seed"]),
    "a width in a part": (nested("sizes", "prior", width=32), ["sizes.prior", "width"]),
    "a rate of learning that is none": (nested("training", "flow", lr=0.), ["training.flow", "lr"]),
    "more noise than all": (nested("sizes", "prior", noise=2.), ["sizes.prior", "noise", "share"]),
    "a rate twice": (dict(dropouts=[.05, .05]), ["dropouts", "different"]),
    "no seed": (dict(seeds=0), ["seeds"]),
    "a true seed": (dict(seeds=True), ["seeds", "True"]),
    "a claim wider than full": (dict(claim_widths=[64]), ["claim_widths", "up to the full width"]),
    "no heads": (nested("sizes", "prior", heads=0), ["heads", "at least 1"]),
    "no steps": (nested("training", "encoder", steps=0), ["training.encoder", "steps"]),
    "heads of the partner": (nested("sizes", "timing_gpt2", heads=3), ["sizes", "heads"]),
    "a time after the word": (nested("sizes", "klflow", t_max=1.), ["sizes", "t_max"]),
    "a path of one's own": (nested("sizes", "klflow", path="bent"), ["sizes.klflow", "path"]),
    "no batch to time": (dict(timing_batches=[0]), ["timing_batches"]),
}


@pytest.mark.parametrize("kind", PRESETS)
def test_bad_preset(tiny_preset, tmp_path, kind):
    change, words = PRESETS[kind]
    path = write_preset(tmp_path / "mine.yaml", tiny_preset, **change)
    refused("tables", "--preset", path, "--out", tmp_path, says=["mine.yaml", *words])


@pytest.mark.parametrize("text", ("", "- a\n- b\n", "a: [1\n", "just words\n", "\x00"))
def test_bad_preset_file(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    refused("tables", "--preset", tmp_path / "mine.yaml", "--out", tmp_path, says=["mine.yaml"])


def other_bert(folder, tiny_bert, **sizes):
    "A BERT folder of other sizes with the tokenizer of `tiny_bert`."
    from transformers import BertConfig, BertModel
    shutil.copytree(tiny_bert, folder)
    small = dict(vocab_size=30_522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=128)
    BertModel(BertConfig(**{**small, **sizes}), add_pooling_layer=False).save_pretrained(folder)
    return folder


def bad_encoder(kind, folder, tiny_bert):
    if kind == "absent": return folder / "nowhere", ["nowhere"]
    if kind == "empty": return folder, [folder]
    if kind == "hub": return "nobody/no-such-bert", ["nobody/no-such-bert", "online"]
    if kind == "vocabulary": return other_bert(folder / "bert", tiny_bert, vocab_size=1000), ["vocabulary", "bert-base-uncased"]
    if kind == "positions": return other_bert(folder / "bert", tiny_bert, max_position_embeddings=48), ["48 positions", "64"]
    if kind == "too narrow": return other_bert(folder / "bert", tiny_bert), ["widths", "16"]
    shutil.copytree(tiny_bert, folder / "bert")
    if kind == "gpt2": (folder / "bert" / "config.json").write_text('{"model_type": "gpt2"}')
    if kind == "config": (folder / "bert" / "config.json").write_text("{")
    if kind == "weights": (folder / "bert" / "model.safetensors").write_bytes((folder / "bert" / "model.safetensors").read_bytes()[:1000])
    return folder / "bert", [folder / "bert", *(["gpt2"] if kind == "gpt2" else [])]


@pytest.mark.parametrize("kind", ("absent", "empty", "hub", "gpt2", "config", "weights", "vocabulary", "positions", "too narrow"))
def test_bad_encoder(tiny_preset, tiny_bert, tmp_path, kind):
    encoder, words = bad_encoder(kind, tmp_path, tiny_bert)
    path = write_preset(tmp_path / "mine.yaml", tiny_preset, encoder=str(encoder))
    refused("refine", "--prompt", "A.", "--draft", "B.", "--preset", path, "--out", tmp_path / "out", says=["encoder", *words])


def test_an_encoder_folder_is_taken_from_the_root(tiny_preset, tiny_bert, tmp_path, monkeypatch):
    "A notebook runs in another folder than the command; a relative path must mean the same in both."
    path = write_preset(tmp_path / "mine.yaml", tiny_preset, encoder=os.path.relpath(tiny_bert, ROOT))
    monkeypatch.chdir(tmp_path)
    assert Study(str(path), out=str(tmp_path)).encoder.digest == load_encoder(tiny_bert).digest


def damaged(kind, models, part):
    "Damage a part in a copy of the models; the words of the message."
    prior = models / f"{part}-s1337"
    weights, config = prior / "model.safetensors", prior / "config.json"
    data = weights.read_bytes()
    if kind == "missing": shutil.rmtree(prior)
    if kind == "unfinished": config.unlink()
    if kind == "no weights": weights.unlink()
    if kind == "truncated": weights.write_bytes(data[:-100])
    if kind == "empty": weights.write_bytes(b"")
    if kind == "flipped byte": weights.write_bytes(data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:])
    if kind == "config cut": config.write_text(config.read_text()[:40])
    if kind == "config of another kind": config.write_text("[]")
    if kind == "config changed": config.write_text(config.read_text().replace('"heads": 4', '"heads": 2').replace('"max_gap": 3', '"max_gap": 2'))
    if kind == "another width": shutil.rmtree(prior); shutil.copytree(models / "prior-16-shared-s1337", prior)
    return ["width is 16, 32 is needed"] if kind == "another width" else []


DAMAGE = ("missing", "unfinished", "no weights", "truncated", "empty", "flipped byte", "config cut", "config of another kind", "config changed")


@pytest.mark.parametrize("kind, part, system", [*((kind, "prior-32-shared", "full") for kind in (*DAMAGE, "another width")), *((kind, "aligner-32", "re-aligned") for kind in DAMAGE)])
def test_bad_checkpoint(trained, tiny_preset, tmp_path, kind, part, system):
    shutil.copytree(trained.out / "models", tmp_path / "models")
    words = damaged(kind, tmp_path / "models", part)
    refused("refine", "--prompt", "A.", "--draft", "B.", "--preset", tiny_preset, "--out", tmp_path, "--system", system,
            says=[part, f"latentrefine reproduce {part}", *words])


def test_checkpoint_of_another_encoder(trained, tiny_preset, tiny_bert, tmp_path):
    other = other_bert(tmp_path / "bert", tiny_bert, hidden_size=32)
    path = write_preset(tmp_path / "mine.yaml", tiny_preset, encoder=str(other))
    refused("refine", "--prompt", "A.", "--draft", "B.", "--preset", path, "--out", trained.out, says=["autoencoder-32", "encoder_digest"])


def test_refine_without_text(trained, tiny_preset):
    words = ("refine", "--preset", tiny_preset, "--out", trained.out)
    refused(*words, "--prompt", " ", "--draft", "B.", says=["prompt", "empty"])
    refused(*words, "--prompt", "A.", "--draft", "", says=["draft", "empty"])
    refused(*words, "--prompt", "A.", "--draft", "word " * 40, says=["draft", "32", "shorten"])
    with pytest.raises(SystemExit) as end, redirect_stderr(io.StringIO()) as said: main([*map(str, words), "--prompt", "A.", "--draft", "B.", "--system", "magic"])
    assert end.value.code == 2 and "magic" in said.getvalue()


def test_evaluate_bad_input(trained, tiny_preset, tmp_path):
    words = ("evaluate", "--preset", tiny_preset, "--out", trained.out)
    for dropout in ("-0.1", "1.5", "nan"): refused(*words, f"--dropout={dropout}", says=["dropout", dropout])
    refused(*words, "--stories", as_file(tmp_path / "old.jsonl", trained.splits["train"][:5]), says=["old.jsonl", "training"])
    refused(*words, "--stories", tmp_path / "nowhere.csv", says=["nowhere.csv"])
    refused(*words, "--limit", "0", says=["limit"])
    (tmp_path / "four.txt").write_text("A cat. A dog. A cow. A pig.\n")
    refused(*words, "--stories", tmp_path / "four.txt", says=["four.txt", "line 1"])
    refused("evaluate", "--preset", tiny_preset, "--out", tmp_path, says=["autoencoder-32", "latentrefine reproduce autoencoder-32"])


def test_no_tables(tiny_preset, tmp_path):
    refused("tables", "--preset", tiny_preset, "--out", tmp_path, says=[tmp_path, "latentrefine reproduce"])
    refused("tables", "table2", "--preset", tiny_preset, "--out", tmp_path, says=["table2", "latentrefine reproduce"])
    with pytest.raises(StudyError, match="latentrefine reproduce table2"): load_rows(tmp_path / "table2.json")
    (tmp_path / "table2.json").write_text("[{")
    with pytest.raises(StudyError, match="table2.json"): load_rows(tmp_path / "table2.json")


def test_unknown_column_and_parameter(tmp_path):
    with pytest.raises(StudyError, match="bleu.*width_role"): beside_published([dict(width_role="full")], "table2", ("width_role",), ("bleu",))
    with pytest.raises(StudyError, match="colour.*preset"): run_notebook("table2", dict(colour=1), tmp_path / "t.ipynb", tmp_path / "l.ipynb")
    with pytest.raises(StudyError, match="table9"): run_notebook("table9", {}, tmp_path / "t.ipynb", tmp_path / "l.ipynb")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tiny_preset, tmp_path, trained):
    (tmp_path / "file").write_text("in the way")
    refused("reproduce", "--preset", tiny_preset, "--out", tmp_path / "file" / "below", says=["below", "--out"])
    refused("reproduce", "--preset", tiny_preset, "--out", tmp_path / "file", says=["file", "--out"])
    shutil.copytree(trained.out / "models", tmp_path / "out" / "models")
    (tmp_path / "out" / "evaluations").write_text("in the way")
    given = as_file(tmp_path / "mine.jsonl", trained.splits["test"][:3])
    refused("evaluate", "--preset", tiny_preset, "--out", tmp_path / "out", "--stories", given, says=["evaluations", "--out"])


def test_a_full_disk(trained, tiny_preset, tmp_path, monkeypatch):
    before, given = files_of(trained.out), as_file(tmp_path / "mine.jsonl", trained.splits["test"][:3])
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    refused("evaluate", "--preset", tiny_preset, "--out", trained.out, "--stories", given, says=["evaluations", "No space left", "--out"])
    refused("reproduce", "table1", "--preset", tiny_preset, "--out", tmp_path, says=["No space left", "--out"])
    assert files_of(trained.out) == before and not list(tmp_path.rglob("*.partial")) and not list(trained.out.rglob("*.partial"))


@contextmanager
def at_most(size):
    "No file may grow beyond `size` bytes, as on a disk that fills up."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_weights_that_do_not_fit(trained, tmp_path):
    "The writer of weights has errors of its own kind; the old model stays or none does, and nothing half-written is left."
    with at_most(20_000), pytest.raises(StudyError, match="cannot be written.*--out"): save_model(tmp_path / "big", torch.nn.Linear(100, 100), dict(width=100))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    study = Study(trained.preset_path, out=str(tmp_path))
    with at_most(20_000), pytest.raises(StudyError, match="cannot be written.*--out"): study.corpus()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_notebook_alone_names_the_command(tiny_preset, tmp_path):
    "Opened without its models, an experiment says how to make them."
    with pytest.raises(papermill.PapermillExecutionError) as error:
        papermill.execute_notebook(str(EXPERIMENTS / "table3.ipynb"), str(tmp_path / "t.ipynb"), progress_bar=False, kernel_name="python3",
                                   parameters=dict(preset=tiny_preset, out=str(tmp_path / "out")))
    assert error.value.ename == "StudyError" and "latentrefine reproduce autoencoder-32" in error.value.evalue
