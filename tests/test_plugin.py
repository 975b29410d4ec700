"""Systems added from outside, in one file: one with slot-wise logits and models of its own, one with texts alone. They are
trained, scored, put into the cross-system table and called from the command line, and nothing else of the study is touched."""
import json
import math
import re
import shutil

import pandas as pd
import pytest
from commands import as_file, call, refused

from latentrefine import registry
from latentrefine.core import load_rows
from latentrefine.notebooks import run_node
from latentrefine.presets import load_preset
from latentrefine.study import Study
from latentrefine.training import read_model

TOY = '''
import torch
from latentrefine.core import VOCAB, RefineOutput
from latentrefine.registry import Model, SystemEntry, register_models, register_system
from latentrefine.training import finish, fit, load_weights, read_model, rows_at

class Toy(torch.nn.Module):
    name, width, layers, moves, steps, vocabulary = "toy", 1, "none", False, 0, "all"
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.weight = encoder, torch.nn.Parameter(torch.ones(()))
    def forward(self, ids): return self.weight * torch.nn.functional.one_hot(ids, VOCAB).float()
    def networks(self): return [self]
    @torch.no_grad()
    def slot_logits(self, batch, steps, seed): return RefineOutput(self(batch.draft_ids), None, 1)

def train_toy(study, folder):
    net, ids, training = Toy(study.encoder), study.batches["train"].target_ids, study.training("toy")
    def loss_at(step):
        own = ids[rows_at(step, len(ids), training)].flatten()
        return torch.nn.functional.cross_entropy(net(own), own), {}
    curve = fit(net, loss_at, training, folder, "toy")
    finish(folder, net, {}, training, curve)
    return curve

def open_toy(study):
    folder = study.model("toy")
    return load_weights(Toy(study.encoder), read_model(folder)[1], folder)

def toy_models(preset): return [Model("toy", "toy", train_toy, "toy")]

register_models(toy_models, {"toy": dict(steps=2, batch=4)})
register_system(SystemEntry("toy", "baseline", "the draft with one learned confidence", open_toy,
                            needs=lambda preset: ("toy",), compared=True))

class Echo:
    def refine(self, prompts, drafts, seed): return ["so " + draft for draft in drafts]

register_system(SystemEntry("echo", "baseline", "one word, then the draft", lambda study: Echo(),
                            needs=lambda preset: (), rates="none", compared=True))
'''


@pytest.fixture(scope="module", autouse=True)
def own_registry():
    "What this file registers is gone behind it."
    registry.load_chapters()
    kept = [(one, dict(one)) for one in (registry.MODELS, registry.SYSTEMS, registry.TRAINING, registry.SIZES)]
    yield
    for one, before in kept:
        one.clear()
        one.update(before)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "toy.py"
    path.write_text(TOY)
    return f"plugins=[{path}]"


@pytest.fixture(scope="module")
def out(trained, tiny_preset, plugin, tmp_path_factory):
    "A copy of the trained study in which the command line has trained the toy system."
    out = tmp_path_factory.mktemp("toy") / "out"
    shutil.copytree(trained.out, out)
    refused("reproduce", "toy", "--preset", tiny_preset, "--out", out, says=["toy", "not known"])       # without it
    code, said, err = call("reproduce", "toy", plugin, "--preset", tiny_preset, "--out", out, "--cores", 2)
    assert code == 0 and "made in" in said, err
    return out


def test_trained(out, tiny_preset, plugin):
    config, weights = read_model(out / "models" / "toy-s1337")
    assert (config["training"]["steps"], config["training"]["batch"]) == (2, 4) and weights["weight"] > 1
    assert len((out / "curves" / "toy-s1337.csv").read_text().splitlines()) == 3
    assert load_preset(tiny_preset, [plugin, "training.toy.steps=9"]).training["toy"] == dict(steps=9, batch=4)
    refused("plan", plugin, "training.toy.step=9", "--preset", tiny_preset, says=["unknown field training.toy.step"])


def test_in_the_plan(out, tiny_preset, plugin, monkeypatch):
    code, said, err = call("plan", plugin, "--preset", tiny_preset, "--out", out)
    assert code == 0 and re.search(r"^ +toy-s1337 +train.ipynb$", said, re.M), err      # up to date
    assert re.search(r"^due +systems +results/systems.ipynb$", said, re.M)
    monkeypatch.chdir(plugin.removeprefix("plugins=[").removesuffix("/toy.py]"))          # a path from here
    code, said, err = call("plan", "plugins=[toy.py]", "toy", "--preset", tiny_preset, "--out", out)
    assert code == 0 and said.splitlines()[-1].startswith("0 of "), err


def test_called_and_scored(out, trained, tiny_preset, plugin, tmp_path):
    words = plugin, "--preset", tiny_preset, "--out", out, "--system", "toy"
    code, said, err = call("refine", *words, "--prompt", "Ann went out.", "--draft", "she lost her umbrella.")
    assert code == 0 and said.splitlines()[0] == "she lost her umbrella.", err
    given = as_file(tmp_path / "mine.jsonl", trained.splits["test"][:4])
    code, said, err = call("evaluate", *words, "--stories", given, "--dropout", "0.1")
    assert code == 0 and re.search(r"^\| toy ", said, re.M), err
    written, = (out / "evaluations").glob("mine.jsonl-*-toy-p10.json")
    row = load_rows(written)[-1]
    assert row["system"] == "toy" and 0 < row["target_probability"] < 1 and row["nfe"] == 1


def test_texts_alone_are_called_and_scored(out, trained, tiny_preset, plugin, tmp_path):
    words = plugin, "--preset", tiny_preset, "--out", out, "--system", "echo"
    code, said, err = call("refine", *words, "--prompt", "Ann went out.", "--draft", "she lost her umbrella.")
    assert code == 0 and said.strip() == "so she lost her umbrella.", err
    given = as_file(tmp_path / "mine.jsonl", trained.splits["test"][:4])
    code, said, err = call("evaluate", *words, "--stories", given, "--dropout", "0.1")
    assert code == 0 and re.search(r"^\| echo ", said, re.M), err


def test_in_the_cross_system_table(out, tiny_preset, plugin):
    parameters = dict(preset=tiny_preset, out=str(out), seed=1337, seeds=1, overrides=[plugin])
    run_node("systems", "results/systems.ipynb", parameters, out)
    rows = [row for row in load_rows(out / "tables" / "systems.json") if row["system"] == "toy"]
    assert {(row["mode"], row["draft"]) for row in rows} == {("START", "drop"), ("START", "mask")}
    assert len({row["dropout"] for row in rows if row["draft"] == "drop"}) == 4
    texts = next(row for row in rows if (row["draft"], row["dropout"]) == ("drop", .05))
    assert {"mauve", "ppl", "diversity", "training_seconds", "run_parameters", "ms_at_many"} <= texts.keys()
    answer = json.loads((out / "answers" / "systems.json").read_text())
    assert ["toy"] == [record[0] for record in answer["records"] if record[0] == "toy"]
    others = {entry.name for entry in registry.SYSTEMS.values() if entry.compared}
    assert others <= {record[0] for record in answer["records"]}


TEXT_METRICS = ("aligned_accuracy", "exact_match", "edits_to_target", "edits_to_draft", "ppl", "ms_at_one", "ms_at_many")


def test_texts_alone_have_a_row_there(out):
    "Of the notebook that the test above has run: text metrics, and blanks for slot-wise ones."
    table = pd.read_csv(out / "tables" / "systems.csv")
    line, = table[table.system == "echo"].to_dict("records")
    assert (line["mode"], line["draft"], line["dropout"], line["n"]) == ("START", "drop", .05, 4)
    assert all(math.isfinite(line[name]) for name in TEXT_METRICS) and line["exact_match"] == 0 < line["edits_to_draft"] < .5
    assert all(math.isnan(line[name]) for name in ("target_probability", "top1", "ce", "over_no_op", "run_parameters"))
    toy = table[(table.system == "toy") & (table.draft == "drop") & (table.dropout == .05)].iloc[0]
    assert toy["edits_to_draft"] == 0 and 0 < toy["aligned_accuracy"] <= 1      # for slot-wise systems as well
    answer = json.loads((out / "answers" / "systems.json").read_text())
    shown, = (record for record in answer["records"] if record[0] == "echo")
    assert shown[2:6] == ["-"] * 4 and "echo" not in answer["answer"]


def test_a_library_call_knows_it_too(out, tiny_preset, plugin):
    study = Study(tiny_preset, out=str(out), overrides=[plugin])
    assert study.open("toy").slot_logits(study.drafts(.05, count=2), 0, 1).logits.shape[:2] == (2, 32)
