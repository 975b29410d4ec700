"Use of what was trained, and every mistake in the input: answered with code 2, one sentence and a remedy."
import errno
import json
import os
import re
import resource
import shutil
from contextlib import contextmanager

import papermill
import pytest
import torch
from commands import PROVENANCE, as_file, as_lines, call, files_of, refused, write_preset
from conftest import TINY

import latentrefine as lr
from latentrefine.core import ROOT, ROW_FIELDS, StudyError, load_rows
from latentrefine.encoder import load_encoder
from latentrefine.measure import beside_published, row_of
from latentrefine.notebooks import NOTEBOOKS, run_notebook
from latentrefine.presets import load_preset
from latentrefine.refine import TextRefiner, note_digest, read_drafts, refiner_of, run_system
from latentrefine.registry import SYSTEMS, load_chapters
from latentrefine.study import Study
from latentrefine.training import save_model

load_chapters()
SYSTEMS = {name: entry for name, entry in SYSTEMS.items() if not entry.encoder}      # any encoder will do
SENTENCES = ("--prompt", "Ann went out. It rained.", "--draft", "she her umbrella.")


@pytest.fixture
def words(trained, tiny_preset):
    "What names the trained study on the command line."
    return "--preset", tiny_preset, "--out", trained.out


# Refining

def test_refine(words):
    code, said, err = call("refine", *words, *SENTENCES)
    assert code == 0 and re.search(r"^ *[01]\.\d{3} [ +~] \S+$", said, re.M), err
    assert said.splitlines()[-1].startswith("+ inserted, ~ substituted; ")


@pytest.mark.parametrize("name", SYSTEMS)
def test_refine_with_every_system(words, name):
    if SYSTEMS[name].offered: assert call("refine", *words, *SENTENCES, "--system", name)[0] == 0
    else: refused("refine", *words, *SENTENCES, "--system", name, says=[name, "tables alone", "re-aligned"])


def test_refine_with_another_setting(words, trained):
    "An override reaches the system; the folder of the models is the one that was given; rows name it."
    assert call("refine", *words, *SENTENCES, "--system", "full", "flow_steps=7")[0] == 0
    study = Study(trained.preset_path, out=str(trained.out), overrides=["flow_steps=7"])
    assert (refiner_of(study, "full").steps, refiner_of(trained, "full").steps) == (7, 2)
    changed, plain = (row_of(one, "full", 32, .05, 0, {}) for one in (study, trained))
    assert changed["overrides"] == "flow_steps=7" and "overrides" not in plain
    assert Study(trained.preset_path, overrides=["flow_steps=7"]).out == ROOT / "outputs" / "runs" / "tiny-flow_steps=7"


def test_refine_a_page(words, tmp_path):
    code, _, err = call("refine", *words, "--prompt", "A <script>b</script>.", "--draft", "c d.", "--html", tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert code == 0 and 'class="token"' in page and "<script" not in page, err


DRAFTS = [dict(prompt="Ann went out. It rained.", draft="she her umbrella.", target="she lost her umbrella."),
          '{"prompt": "A.", "draft"', dict(prompt="A b."), dict(prompt="A b.", draft=" "), dict(prompt="A b.", draft="word " * 40),
          dict(prompt="", draft="a b."), dict(prompt="A b.", draft=7), dict(prompt="A b.", draft="c d.", target=3), [1],
          dict(prompt="Tom ran.", draft="he fell.", target="he fell down.")]
SKIPPED = {2: "not JSON", 3: "lacks draft", 4: "draft: it is empty", 5: "draft: 40 word pieces, 31 fit", 6: "prompt: it is empty",
           7: "draft: int", 8: "target: not a text", 9: "a JSON list"}


def skipped_lines(err): return dict(re.findall(r"^skipped: .*?mine\.jsonl, line (\d+): (.*)$", err, re.M))


def test_refine_a_file(words, tmp_path):
    "Usable lines are refined, the others named with their numbers; a second call goes on behind the lines that are there."
    given, target = as_lines(tmp_path / "mine.jsonl", DRAFTS), tmp_path / "refined.jsonl"
    code, said, err = call("refine", *words, "--drafts", given, "--write", target)
    assert code == 0 and "2 of 2 drafts refined, 8 lines skipped" in said, err
    found = skipped_lines(err)
    assert found.keys() == set(map(str, SKIPPED)) and all(text in found[str(line)] for line, text in SKIPPED.items()), found
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["line"] for row in rows] == [1, 10] and all(row["refined"] for row in rows)
    code, said, _ = call("refine", *words, "--drafts", given, "--write", target)
    assert code == 0 and "0 of 2 drafts refined" in said and [json.loads(one) for one in target.read_text().splitlines()] == rows
    alone = call("refine", *words, "--prompt", rows[0]["prompt"], "--draft", rows[0]["draft"])[1].splitlines()[0]
    assert rows[0]["refined"] == alone
    refused("refine", *words, "--drafts", given, "--write", target, "--strict", says=["line 2", "line 9", "--strict"])
    other = as_lines(tmp_path / "other.jsonl", DRAFTS[-1:])
    refused("refine", *words, "--drafts", other, "--write", target, says=["other drafts"])


def test_refine_without_text(words, tmp_path):
    refused("refine", *words, "--prompt", " ", "--draft", "B.", says=["prompt", "empty"])
    refused("refine", *words, "--prompt", "A.", "--draft", "", says=["draft", "empty"])
    refused("refine", *words, "--prompt", "A.", "--draft", "word " * 40, says=["draft", "40", "31", "shorten"])
    refused("refine", *words, "--prompt", "A.", says=["--prompt and --draft", "--drafts"])
    refused("refine", *words, *SENTENCES, "--system", "magic", says=["magic", "re-aligned"])
    refused("refine", *words, "--drafts", tmp_path / "none.jsonl", says=["none.jsonl", "no such file"])
    refused("refine", *words, "--drafts", as_lines(tmp_path / "bad.jsonl", DRAFTS[1:4]), says=["bad.jsonl", "no usable draft", "line 2"])


# Evaluating

def test_evaluate(trained, words, tmp_path):
    "Training stories are left out; the rows are those of any table; a bad row is skipped unless --strict."
    given = as_file(tmp_path / "mine.jsonl", [*trained.splits["test"][:6], *trained.splits["train"][:2]])
    given.write_text(given.read_text() + '{"sentences": ["A.", "B."]}\n')
    code, said, err = call("evaluate", *words, "--stories", given, "--dropout", ".05")
    assert code == 0 and "2 training stories" in said and "line 9" in err and "1 rows skipped" in err, err
    written, = (trained.out / "evaluations").glob("mine.jsonl-*-p5.json")
    rows = load_rows(written)
    assert [row["system"] for row in rows] == ["oracle", "no-op", "re-aligned"]
    assert all(row["evaluated"] == "mine.jsonl" and row["split"] == "file" for row in rows)
    assert not [f for row in rows for f in (*ROW_FIELDS, *PROVENANCE) if f not in row] and str(tmp_path) not in written.read_text()
    refused("evaluate", *words, "--stories", given, "--strict", says=["mine.jsonl", "line 9"])


def test_evaluate_targets_longer_than_their_slots(words, tmp_path):
    given = as_lines(tmp_path / "mine.jsonl", [dict(sentences=["Ann went out.", "It rained.", "She ran " * 20 + ".", "She fell.", "She got wet."])])
    code, said, err = call("evaluate", *words, "--stories", given, "--dropout", "0")
    assert code == 0 and "no-op" in said, err


def test_evaluate_drafts(words, tmp_path):
    given = as_lines(tmp_path / "mine.jsonl", DRAFTS)
    code, said, err = call("evaluate", *words, "--drafts", given)
    assert code == 0 and len(skipped_lines(err)) == len(SKIPPED) and "8 rows skipped" in err, err
    for name in ("draft", "no-op", "re-aligned"): assert re.search(rf"^\| {name} ", said, re.M), said
    assert "Exact match" in said
    bare = as_lines(tmp_path / "bare.jsonl", [{k: v for k, v in DRAFTS[0].items() if k != "target"}])
    code, said, err = call("evaluate", *words, "--drafts", bare)
    assert code == 0 and "Exact match" not in said, err
    refused("evaluate", *words, "--drafts", given, "--strict", says=["line 2", "--strict"])
    refused("evaluate", *words, "--drafts", given, "--references", tmp_path / "none.txt", says=["none.txt"])


def test_evaluate_bad_input(trained, tiny_preset, words, tmp_path):
    for dropout in ("-0.1", "1.5", "nan"): refused("evaluate", *words, f"--dropout={dropout}", says=["dropout", dropout])
    old = as_file(tmp_path / "old.jsonl", trained.splits["train"][:5])
    refused("evaluate", *words, "--stories", old, says=["old.jsonl", "training"])
    refused("evaluate", *words, "--stories", tmp_path / "nowhere.csv", says=["nowhere.csv"])
    refused("evaluate", *words, "--limit", "0", says=["limit"])
    (tmp_path / "four.txt").write_text("A cat. A dog. A cow. A pig.\n")
    refused("evaluate", *words, "--stories", tmp_path / "four.txt", says=["four.txt", "line 1"])
    remedy = ["autoencoder-32", "latentrefine reproduce autoencoder-32"]
    refused("evaluate", "--preset", tiny_preset, "--out", tmp_path, says=remedy)


# A system of one's own

OWN = """
import torch
from latentrefine.refine import Refined

class Mine:
    name = "mine"
    def __init__(self, answer): self.answer = answer
    def refine(self, prompts, drafts, seed): return self.answer(drafts)

def slots(drafts, value=0.): return Refined(list(drafts), logits=torch.full((len(drafts), 32, 30522), value))
def same(): return Mine(list)
def with_logits(): return Mine(slots)
def few(): return Mine(lambda drafts: drafts[:-1])
def numbers(): return Mine(lambda drafts: [1 for _ in drafts])
def nothing(): return Mine(lambda drafts: None)
def nan(): return Mine(lambda drafts: slots(drafts, float("nan")))
def flat(): return Mine(lambda drafts: Refined(list(drafts), logits=torch.zeros(3)))
def raising(): raise RuntimeError("no luck")
def late(): return Mine(lambda drafts: drafts[10 ** 6])
def three(): return 3
"""
BAD_SYSTEMS = {  # function -> words of the message
    "few": ["mine", "0 texts for 1"], "numbers": ["mine", "list of texts"], "nothing": ["mine", "return a Refined"],
    "nan": ["mine", "logits", "finite"], "flat": ["mine", "logits (3,)", "[texts, 32, vocab]"], "raising": ["raising", "RuntimeError: no luck"],
    "late": ["mine", "refine raised IndexError"], "three": ["three", "int", "no refine"], "none": ["FILE.py:FUNCTION", "same"]}


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def test_a_system_of_ones_own(trained, words, own, tmp_path):
    assert call("refine", *words, *SENTENCES, "--system", f"{own}:same")[1].splitlines()[0] == "she her umbrella."
    given = as_file(tmp_path / "mine.jsonl", trained.splits["test"][:4])
    for function, scored in (("same", False), ("with_logits", True)):
        code, said, err = call("evaluate", *words, "--stories", given, "--system", f"{own}:{function}")
        assert code == 0 and re.search(r"^\| mine ", said, re.M), err
        written, = (trained.out / "evaluations").glob("mine.jsonl-*-mine-p5.json")
        rows = {row["system"]: row for row in load_rows(written)}
        assert list(rows) == ["oracle", "no-op", "re-aligned", "mine"]
        assert ("target_probability" in rows["mine"]) == scored and rows["mine"]["edits_to_draft"] == 0
        assert 0 < rows["mine"]["aligned_accuracy"] <= 1 and rows["mine"]["n"] == rows["no-op"]["n"]
        written.unlink()
    code, said, err = call("evaluate", *words, "--drafts", as_lines(tmp_path / "d.jsonl", DRAFTS[:1]), "--system", f"{own}:same")
    assert code == 0 and re.search(r"^\| (own|mine) ", said, re.M), err


@pytest.mark.parametrize("function", BAD_SYSTEMS)
def test_bad_system(trained, words, own, tmp_path, function):
    refused("refine", *words, *SENTENCES, "--system", f"{own}:{function}", says=BAD_SYSTEMS[function])
    if function in ("few", "nan", "late"):
        given = as_file(tmp_path / "mine.jsonl", trained.splits["test"][:1])
        before = files_of(trained.out)
        refused("evaluate", *words, "--stories", given, "--system", f"{own}:{function}", says=BAD_SYSTEMS[function])
        assert files_of(trained.out) == before


def test_bad_system_file(words, tmp_path):
    (tmp_path / "broken.py").write_text("value = 1 / 0\n")
    (tmp_path / "wrong.py").write_text("def build(:\n")
    refused("refine", *words, *SENTENCES, "--system", f"{tmp_path}/none.py:build", says=["none.py", "no such file"])
    refused("refine", *words, *SENTENCES, "--system", f"{tmp_path}/broken.py:build", says=["broken.py", "ZeroDivisionError"])
    refused("refine", *words, *SENTENCES, "--system", f"{tmp_path}/wrong.py:build", says=["wrong.py", "SyntaxError"])
    refused("refine", *words, *SENTENCES, "--system", f"{tmp_path}/broken.py", says=["broken.py"])


# Saved refiners

@pytest.mark.parametrize("name", [name for name, entry in SYSTEMS.items() if entry.offered])
def test_a_saved_refiner_is_read_back(trained, tiny_bert, tmp_path, name):
    refiner = refiner_of(trained, name)
    folder = refiner.save_pretrained(tmp_path / "saved", row=dict(target_probability=.5))
    again = TextRefiner.from_pretrained(folder, encoder=tiny_bert)
    a, b = (run_system(one, ["Ann went out."], ["she her umbrella."]) for one in (refiner, again))
    assert a.texts == b.texts and a.tokens == b.tokens and torch.equal(a.logits, b.logits) and a.nfe == b.nfe
    assert again.name == name and again.steps == refiner.steps and a.notes == b.notes
    card = (folder / "README.md").read_text()
    assert name in card and "target_probability | 0.5" in card and "tiny" in card
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {".json", ".safetensors", ".md"}


@pytest.fixture
def saved(trained, tmp_path): return refiner_of(trained, "re-aligned").save_pretrained(tmp_path / "saved")


def test_a_saved_refiner_asks_for_its_encoder(saved):
    "One that lies in a folder cannot be found by its name."
    with pytest.raises(StudyError, match="from_pretrained.FOLDER, encoder="): TextRefiner.from_pretrained(saved)


def spoil(kind, folder):
    "Damage a saved refiner; the words of the message."
    note = folder / "refiner.json"
    weights = max(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    said = json.loads(note.read_text())
    def changed(**fields): note.write_text(json.dumps({**said, **fields, "sha256": note_digest({**said, **fields})}))
    if kind == "absent": shutil.rmtree(folder)
    if kind == "no note": note.unlink()
    if kind == "note cut": note.write_text(note.read_text()[:50])
    if kind == "note of another kind": note.write_text("[]")
    if kind == "another format": changed(format=said["format"] + 1)
    if kind == "another package": changed(system="os.system")
    if kind == "another encoder": changed(encoder_digest="0" * 16)
    if kind == "other steps": note.write_text(json.dumps({**said, "steps": said["steps"] + 1}))
    if kind == "flipped byte":
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    if kind == "a file less": weights.unlink()
    if kind == "a file more": (folder / "more.safetensors").write_bytes(b"x")
    damaged = [weights.name if kind != "a file more" else "more.safetensors", "save the refiner again"]
    return {"absent": ["no saved refiner"], "no note": ["no saved refiner"], "note cut": ["cannot be read"],
            "note of another kind": ["cannot be read"], "another format": ["format", "this version"],
            "another package": ["os.system"], "another encoder": ["another encoder"],
            "other steps": ["refiner.json", "changed since"]}.get(kind, damaged)


@pytest.mark.parametrize("kind", ("absent", "no note", "note cut", "note of another kind", "another format", "another package",
                                  "another encoder", "other steps", "flipped byte", "a file less", "a file more"))
def test_bad_saved_refiner(saved, tiny_bert, kind):
    said = spoil(kind, saved)
    with pytest.raises(StudyError) as error: TextRefiner.from_pretrained(saved, encoder=tiny_bert)
    for word in said: assert word in str(error.value), (word, error.value)


def test_as_a_library(trained, tiny_preset, tmp_path):
    refiner = lr.load("re-aligned", preset=tiny_preset, out=str(trained.out))
    refined = refiner.refine(["Ann went out.", "Tom ran."], ["she her umbrella.", "he fell."])
    assert isinstance(refined, lr.Refined) and len(refined.texts) == 2 and 'class="token"' in refined._repr_html_()
    with pytest.raises(StudyError, match="text 2, draft: it is empty"): refiner.refine(["A.", "B."], ["c.", ""])
    rows, file, skipped = lr.evaluate(trained, str(as_file(tmp_path / "lib.jsonl", trained.splits["test"][:3])), limit=2)
    assert rows[-1]["system"] == "re-aligned" and file.is_file() and not skipped
    box = lr.widget(refiner)
    assert 'class="token"' in box.children[-1].value


# Presets and overrides

def test_unknown_preset_and_target(tmp_path, tiny_preset):
    refused("reproduce", "--preset", "quik", "--out", tmp_path, says=["quik", "quick"])
    refused("tables", "--preset", tmp_path / "none.yaml", "--out", tmp_path, says=["none.yaml"])
    refused("reproduce", "table9", "--preset", tiny_preset, "--out", tmp_path, says=["table9", "table2", "prior-32-shared"])
    refused("reproduce", "--cores", "0", "--preset", tiny_preset, "--out", tmp_path, says=["--cores 0"])
    for seeds in ("-1", "1001"): refused("reproduce", "--seeds", seeds, "--preset", tiny_preset, "--out", tmp_path, says=[f"--seeds {seeds}"])
    refused("reproduce", "--stories", tmp_path / "none.csv", "--preset", tiny_preset, "--out", tmp_path, says=["none.csv", "embedded"])


def nested(section, name, **fields): return {section: {**TINY[section], name: {**TINY[section].get(name, {}), **fields}}}


PRESETS = {  # what is changed -> words of the message
    "unknown field": (dict(colour="red"), ["unknown field colour", "limit"]),
    "text for a number": (dict(limit="many"), ["limit is 'many'", "not of type int"]),
    "number for text": (dict(encoder=3), ["encoder is 3", "string"]),
    "list for a section": (dict(training=[1]), ["training is [1]"]),
    "number for a stage": (dict(training={**TINY["training"], "prior": 5}), ["training.prior is 5"]),
    "unknown section": (nested("training", "priors", steps=3), ["unknown field training.priors", "prior"]),
    "unknown training field": (nested("training", "prior", step=3), ["unknown field training.prior.step", "steps"]),
    "text for steps": (nested("training", "prior", steps="many"), ["training.prior.steps is 'many'"]),
    "unknown size": (nested("sizes", "flow", colour=1), ["unknown field sizes.flow.colour", "depth"]),
    "text for a size": (nested("sizes", "flow", depth="deep"), ["sizes.flow.depth is 'deep'"]),
    "one width": (dict(widths=[32]), ["widths is [32]"]),
    "three widths": (dict(widths=[32, 16, 8]), ["widths is [32, 16, 8]"]),
    "text for a width": (dict(widths=["wide", 16]), ["widths.0 is 'wide'"]),
    "widths in the wrong order": (dict(widths=[16, 32]), ["widths is [16, 32]", "smaller"]),
    "heads that do not divide": (nested("sizes", "prior", heads=5), ["sizes.prior", "heads: 5 do not divide the width 32"]),
    "text for a rate": (dict(dropouts=["many", .05]), ["dropouts.0 is 'many'"]),
    "a rate above one": (dict(dropouts=[.05, 7.]), ["dropouts.1 is 7.0"]),
    "unknown vocabulary": (dict(vocabulary="some"), ["vocabulary is 'some'", "corpus"]),
    "unknown precision": (dict(precision="float16"), ["precision is 'float16'", "bfloat16"]),
    "no test stories": (dict(test=0), ["test is 0"]),
    "negative steps": (dict(flow_steps=-1), ["flow_steps is -1"]),
    "a seed in a stage": (nested("training", "prior", seed=1), ["unknown field training.prior.seed"]),
    "a width in a part": (nested("sizes", "prior", width=32), ["unknown field sizes.prior.width"]),
    "a rate of learning that is none": (nested("training", "flow", lr=0.), ["training.flow.lr is 0.0"]),
    "more noise than all": (nested("sizes", "prior", noise=2.), ["sizes.prior.noise is 2.0", "1"]),
    "a rate twice": (dict(dropouts=[.05, .05]), ["dropouts is [0.05, 0.05]", "different"]),
    "no main rate": (dict(dropouts=[.1]), ["dropouts is [0.1]", "0.05"]),
    "no seed": (dict(seeds=0), ["seeds is 0"]),
    "a true seed": (dict(seeds=True), ["seeds is True"]),
    "a claim wider than full": (dict(claim_widths=[64]), ["claim_widths is [64]", "up to the full width"]),
    "no heads": (nested("sizes", "prior", heads=0), ["sizes.prior.heads is 0"]),
    "no steps": (nested("training", "encoder", steps=0), ["training.encoder.steps is 0"]),
    "heads of the partner": (nested("sizes", "timing_gpt2", heads=3), ["sizes.timing_gpt2", "heads: 3 do not divide"]),
    "a time after the word": (nested("sizes", "klflow", t_max=1.), ["sizes.klflow", "t_max"]),
    "a path of one's own": (nested("sizes", "klflow", path="bent"), ["unknown field sizes.klflow.path"]),
    "no batch to time": (dict(timing_batches=[0]), ["timing_batches.0 is 0"]),
    "a plug-in that is missing": (dict(plugins=["/nowhere/toy.py"]), ["/nowhere/toy.py", "no such file"]),
}


@pytest.mark.parametrize("kind", PRESETS)
def test_bad_preset(tiny_preset, tmp_path, kind):
    change, said = PRESETS[kind]
    path = write_preset(tmp_path / "mine.yaml", tiny_preset, **change)
    refused("tables", "--preset", path, "--out", tmp_path, says=[*([] if kind.startswith("a plug-in") else ["mine.yaml"]), *said])


def test_too_narrow_an_encoder_to_pretrain(tiny_preset, tmp_path):
    path = write_preset(tmp_path / "mine.yaml", tiny_preset, encoder="in-domain", widths=[64, 16])
    refused("tables", "--preset", path, "--out", tmp_path, says=["mine.yaml", "sizes.encoder", "full width, 64"])


@pytest.mark.parametrize("text", ("", "- a\n- b\n", "a: [1\n", "just words\n", "\x00", "limit: 500\n", "extends: nothing\n", "extends: mine\n",
                                  "extends: quick\nlimit: 20\nlimit: 30\n"))
def test_bad_preset_file(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    refused("tables", "--preset", tmp_path / "mine.yaml", "--out", tmp_path, says=["nothing" if "nothing" in text else "mine.yaml"])


def test_a_preset_lists_only_what_differs(tiny_preset, tmp_path):
    "Every field comes from the file it extends; a file beside it or one of the presets."
    (tmp_path / "first.yaml").write_text(f"extends: {tiny_preset}\nlimit: 70\ntraining: {{prior: {{steps: 9}}}}\n")
    (tmp_path / "second.yaml").write_text("extends: first\ntest: 3\n")
    preset = load_preset(str(tmp_path / "second.yaml"), ["flow_steps=1"])
    assert (preset.limit, preset.test, preset.flow_steps, preset.training["prior"]["steps"], preset.training["prior"]["lr"]) == (70, 3, 1, 9, 5e-3)


OVERRIDES = {  # an override -> words of the message
    "training.prior.step=3": ["unknown field training.prior.step", "steps"], "training.priors.steps=3": ["unknown field training.priors"],
    "sizes.prior.width=3": ["unknown field sizes.prior.width"], "colour=red": ["unknown field colour"], "limit=many": ["limit is 'many'"],
    "seeds=0": ["seeds is 0"], "training.prior.lr=.nan": ["training.prior.lr"], "widths=[32": ["widths=[32", "no YAML value"],
    "=3": ["FIELD=VALUE"], "training=3": ["training is 3"], "training.prior=3": ["training.prior is 3"], "plugins=[nowhere.py]": ["nowhere.py", "no such file"],
    "limit.x=3": ["limit is {'x': 3}"]}


@pytest.mark.parametrize("text", OVERRIDES)
def test_bad_override(tiny_preset, tmp_path, text):
    for command in (("reproduce", "table1"), ("plan",)):
        refused(*command, text, "--preset", tiny_preset, "--out", tmp_path, says=OVERRIDES[text])
    refused("refine", text, *SENTENCES, "--preset", tiny_preset, "--out", tmp_path, says=OVERRIDES[text])
    assert not list(tmp_path.iterdir())


def test_a_plug_in_that_raises(tiny_preset, tmp_path):
    (tmp_path / "toy.py").write_text("value = 1 / 0\n")
    refused("plan", f"plugins=[{tmp_path}/toy.py]", "--preset", tiny_preset, "--out", tmp_path, says=["toy.py", "ZeroDivisionError"])


# Encoders and checkpoints

def other_bert(folder, tiny_bert, **sizes):
    "A BERT folder of other sizes with the tokenizer of `tiny_bert`."
    from transformers import BertConfig, BertModel
    shutil.copytree(tiny_bert, folder)
    small = dict(vocab_size=30_522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                 max_position_embeddings=128)
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
    weights = folder / "bert" / "model.safetensors"
    if kind == "gpt2": (folder / "bert" / "config.json").write_text('{"model_type": "gpt2"}')
    if kind == "config": (folder / "bert" / "config.json").write_text("{")
    if kind == "weights": weights.write_bytes(weights.read_bytes()[:1000])
    return folder / "bert", [folder / "bert", *(["gpt2"] if kind == "gpt2" else [])]


@pytest.mark.parametrize("kind", ("absent", "empty", "hub", "gpt2", "config", "weights", "vocabulary", "positions", "too narrow"))
def test_bad_encoder(tiny_preset, tiny_bert, tmp_path, kind):
    encoder, said = bad_encoder(kind, tmp_path, tiny_bert)
    path = write_preset(tmp_path / "mine.yaml", tiny_preset, encoder=str(encoder))
    refused("refine", "--prompt", "A.", "--draft", "B.", "--preset", path, "--out", tmp_path / "out", says=["encoder", *said])


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
    if kind == "config changed":
        text = config.read_text()
        config.write_text(text.replace('"heads": 4', '"heads": 2').replace('"max_gap": 3', '"max_gap": 2'))
        assert config.read_text() != text
    if kind == "another width":
        shutil.rmtree(prior)
        shutil.copytree(models / "prior-16-shared-s1337", prior)
    return ["width is 16, 32 is needed"] if kind == "another width" else []


DAMAGE = ("missing", "unfinished", "no weights", "truncated", "empty", "flipped byte", "config cut", "config of another kind",
          "config changed")
DAMAGED = [*((kind, "prior-32-shared", "full") for kind in (*DAMAGE, "another width")),
           *((kind, "aligner-32", "re-aligned") for kind in DAMAGE)]


@pytest.mark.parametrize("kind, part, system", DAMAGED)
def test_bad_checkpoint(trained, tiny_preset, tmp_path, kind, part, system):
    shutil.copytree(trained.out / "models", tmp_path / "models")
    said = damaged(kind, tmp_path / "models", part)
    refused("refine", "--prompt", "A.", "--draft", "B.", "--preset", tiny_preset, "--out", tmp_path, "--system", system,
            says=[part, f"latentrefine reproduce {part}", *said])


def test_checkpoint_of_another_encoder(trained, tiny_preset, tiny_bert, tmp_path):
    other = other_bert(tmp_path / "bert", tiny_bert, hidden_size=32)
    path = write_preset(tmp_path / "mine.yaml", tiny_preset, encoder=str(other))
    refused("refine", "--prompt", "A.", "--draft", "B.", "--preset", path, "--out", trained.out, says=["autoencoder-32", "encoder_digest"])


# Tables, notebooks and disks

def test_no_tables(tiny_preset, tmp_path):
    refused("tables", "--preset", tiny_preset, "--out", tmp_path, says=[tmp_path, "latentrefine reproduce"])
    refused("tables", "table2", "--preset", tiny_preset, "--out", tmp_path, says=[tmp_path, "latentrefine reproduce"])
    refused("render", "table2", "--preset", tiny_preset, "--out", tmp_path, says=["no rows of table2"])
    refused("render", "--preset", tiny_preset, "--out", tmp_path, says=["no rows"])
    with pytest.raises(StudyError, match="latentrefine reproduce table2"): load_rows(tmp_path / "table2.json")
    (tmp_path / "table2.json").write_text("[{")
    with pytest.raises(StudyError, match="table2.json"): load_rows(tmp_path / "table2.json")


def test_unknown_column_and_parameter(tmp_path):
    with pytest.raises(StudyError, match="bleu.*width_role"): beside_published([dict(width_role="full")], "table2", ("width_role",), ("bleu",))
    place = tmp_path / "t.ipynb", tmp_path / "l.ipynb"
    with pytest.raises(StudyError, match="colour.*preset"): run_notebook("results/table2.ipynb", dict(colour=1), *place)
    with pytest.raises(StudyError, match="table9"): run_notebook("results/table9.ipynb", {}, *place)
    assert not list(tmp_path.iterdir())


def test_a_notebook_alone_names_the_command(tiny_preset, tmp_path):
    "Opened without its models, a result says how to make them; the training notebook lists the models."
    def ending(notebook, **parameters):
        with pytest.raises(papermill.PapermillExecutionError) as error:
            papermill.execute_notebook(str(NOTEBOOKS / notebook), str(tmp_path / "t.ipynb"), progress_bar=False, kernel_name="python3",
                                       parameters=dict(preset=tiny_preset, out=str(tmp_path / "out"), **parameters))
        return error.value.ename, error.value.evalue
    name, said = ending("results/table3.ipynb")
    assert name == "StudyError" and "latentrefine reproduce autoencoder-32" in said
    name, said = ending("train.ipynb", model="magic")
    assert name == "StudyError" and "magic" in said and "prior-32-shared" in said


def test_a_folder_that_cannot_be_written(tiny_preset, tmp_path, trained):
    (tmp_path / "file").write_text("in the way")
    refused("reproduce", "--preset", tiny_preset, "--out", tmp_path / "file" / "below", says=["below", "--out"])
    refused("reproduce", "--preset", tiny_preset, "--out", tmp_path / "file", says=["file", "--out"])
    shutil.copytree(trained.out / "models", tmp_path / "out" / "models")
    (tmp_path / "out" / "evaluations").write_text("in the way")
    given = as_file(tmp_path / "mine.jsonl", trained.splits["test"][:3])
    refused("evaluate", "--preset", tiny_preset, "--out", tmp_path / "out", "--stories", given, says=["evaluations", "--out"])
    draft = as_lines(tmp_path / "d.jsonl", DRAFTS[:1])
    refused("refine", "--preset", tiny_preset, "--out", trained.out, "--drafts", draft, "--write", tmp_path / "file" / "x.jsonl", says=["x.jsonl"])


def test_a_full_disk(trained, words, tiny_preset, tmp_path, monkeypatch):
    before, given = files_of(trained.out), as_file(tmp_path / "mine.jsonl", trained.splits["test"][:3])
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    refused("evaluate", *words, "--stories", given, says=["evaluations", "No space left", "--out"])
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
    with at_most(20_000), pytest.raises(StudyError, match="cannot be written.*--out"):
        save_model(tmp_path / "big", torch.nn.Linear(100, 100), dict(width=100))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    study = Study(trained.preset_path, out=str(tmp_path))
    with at_most(20_000), pytest.raises(StudyError, match="cannot be written.*--out"): study.corpus()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_draft_file_with_no_bad_line(trained, tmp_path):
    rows, skipped = read_drafts(as_lines(tmp_path / "d.jsonl", ["", DRAFTS[0]]), trained.tokenizer, strict=True)
    assert not skipped and rows == [dict(line=2, **DRAFTS[0])]
