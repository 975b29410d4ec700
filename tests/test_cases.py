"Situations in which something wrong once passed in silence or ended in a traceback, and what must happen in each."
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from commands import as_file, as_lines, call, refused, write_preset
from conftest import TINY
from safetensors.torch import load_file, save_file

from latentrefine.core import OF_THIS_STUDY, ROOT, StudyError, load_rows, writing
from latentrefine.doctor import check_memory, check_time, memory_of, models_due, operations_of
from latentrefine.encoder import embed_texts, load_encoder
from latentrefine.evaluation import unseen_stories
from latentrefine.measure import check_rows, recorded_digest, results
from latentrefine.notebooks import check_parameters, run_notebook
from latentrefine.page import write_page
from latentrefine.presets import load_preset
from latentrefine.registry import load_chapters, models_of
from latentrefine.report import markdown_of
from latentrefine.reproduce import render
from latentrefine.stories import read_stories
from latentrefine.study import TRAINED_ON, Study, trained_on
from latentrefine.textmetrics import mauve_score
from latentrefine.training import load_weights, model_digest, read_model, save_model
from latentrefine.transport import sinkhorn_divergence

load_chapters()
STORY = ("Ann went out.", "It rained.", "She took a cat.", "The cat ran.", "She got wet.")


def line_of(*sentences): return json.dumps(dict(sentences=sentences))


@pytest.fixture
def words(trained, tiny_preset): return "--preset", tiny_preset, "--out", trained.out


# Paths

NO_PATHS = ("~nosuchuser/x", "x" * 300, "y/" * 2100, "a\0b")


@pytest.mark.parametrize("path", NO_PATHS, ids=["user", "long name", "long path", "zero byte"])
def test_a_path_that_no_file_can_have(tiny_preset, trained, words, path):
    draft = ("--prompt", "A.", "--draft", "b.")
    for command in (("tables", "--preset", tiny_preset, "--out", path), ("evaluate", *words, "--stories", path), ("tables", "--preset", f"{path}.yaml"),
                    ("refine", *words, "--drafts", path), ("refine", *words, *draft, "--html", path), ("refine", *words, *draft, "--write", path),
                    ("refine", *words, *draft, "--system", f"{path}.py:build"), ("evaluate", *words, "--references", path, "--drafts", path),
                    ("plan", f"plugins={json.dumps([path])}", "--preset", tiny_preset)):
        refused(*command, says=["not a path"])
    refused("tables", "--preset", path, says=["not known"])


def test_the_kind_of_a_path_is_named(words, tmp_path):
    (tmp_path / "dir.yaml").mkdir()
    refused("tables", "--preset", tmp_path / "dir.yaml", says=["dir.yaml", "not known"])
    refused("evaluate", *words, "--stories", tmp_path, says=["is a folder"])


def test_a_name_of_240_bytes(trained, words, tmp_path):
    "Also one of four-byte characters; what is written beside it has a longer name while it is written."
    for name in ("s" * 230, "\U00010330" * 55):
        given = as_file(tmp_path / f"{name}.jsonl", trained.splits["test"][:1])
        code, said, err = call("evaluate", *words, "--stories", given, "--system", "no-op")
        assert code == 0 and Path(re.search(r"written: (.*)", said)[1]).is_file(), err
    with writing(tmp_path / ("t" * 250)) as scratch: scratch.write_text("x")
    assert (tmp_path / ("t" * 250)).read_text() == "x" and not list(tmp_path.glob(".*partial"))


def test_two_files_of_one_name(trained, words, tmp_path):
    "The rows of one do not replace those of the other."
    places = [tmp_path / folder / "s.jsonl" for folder in "ab"]
    for path in places:
        path.parent.mkdir()
        as_file(path, trained.splits["test"][:1])
    written = [re.search(r"written: (.*)", call("evaluate", *words, "--stories", path, "--system", "no-op")[1])[1] for path in places]
    assert len(set(written)) == 2


def test_what_is_written_replaces_neither_a_device_nor_an_input(tiny_preset, words, tmp_path):
    "Writing to /dev/null would have made it a file, reading /dev/zero not have ended; a page took the place of the drafts."
    drafts = as_lines(tmp_path / "d.jsonl", [dict(prompt="A.", draft="b.")])
    for device in ("/dev/null", "/dev/full", "/dev/zero"):
        refused("refine", *words, "--drafts", drafts, "--write", device, says=["no regular file"])
        refused("refine", *words, "--drafts", drafts, "--html", device, says=["no regular file"])
    (tmp_path / "link").symlink_to(drafts)
    for name in (drafts, tmp_path / "link"): refused("refine", *words, "--drafts", drafts, "--html", name, says=["is the file of --drafts"])
    refused("refine", *words, "--drafts", drafts, "--write", tmp_path / "a", "--html", tmp_path / "a", says=["is the file of"])
    refused("benchmark", "--stories", drafts, "--write", drafts, "--preset", tiny_preset, says=["is the file of --stories"])
    assert json.loads(drafts.read_text()) == dict(prompt="A.", draft="b.") and Path("/dev/null").is_char_device()


def test_inputs_that_are_not_there_are_told_before_anything_runs(tiny_preset, tmp_path):
    for given in ("stories=/nonexistent.csv", f"stories={tmp_path}", "gpt2=/nonexistent", "gpt2=./no", "encoder=/nonexistent", "encoder=''"):
        for command in ("plan", "reproduce"): refused(command, given, "--preset", tiny_preset, "--out", tmp_path / "o", says=["check the path", "no such"])
    assert not (tmp_path / "o").exists()


def test_options_without_an_effect_are_refused(words, tmp_path):
    "One of two options was read, the other was not, without a word."
    given = as_lines(tmp_path / "s.jsonl", [line_of(*STORY)])
    drafts = as_lines(tmp_path / "d.jsonl", [dict(prompt="A.", draft="b.")])
    refused("evaluate", *words, "--stories", given, "--drafts", drafts, says=["--drafts and --stories"])
    refused("evaluate", *words, "--limit", 1, "--drafts", drafts, says=["--drafts and --limit"])
    refused("evaluate", *words, "--stories", given, "--references", given, says=["--references"])
    refused("refine", *words, "--drafts", drafts, "--prompt", "A.", says=["--drafts and --prompt"])
    refused("refine", *words, "--prompt", "A.", "--draft", "b.", "--stories", given, says=["--stories"])
    refused("refine", "--preset", words[1], "--out", drafts.rename(tmp_path / "d.txt"), "--prompt", "A.", "--draft", "b.", says=["is a file; give a folder"])
    refused("compare", *words, "--with", tmp_path / "none", says=["holds no tables", "--with"])


def test_drafts_that_are_longer_when_read_again_are_scored(trained, words, tmp_path):
    "A lone piece such as ##ing is split into three; drafts without a word are told as such."
    from latentrefine.evaluation import fitting
    tokenizer = trained.tokenizer
    texts = fitting(["##ing " * 20 + "ran", "she ran"], 31, tokenizer)
    assert texts[1] == "she ran" and 0 < len(tokenizer(texts[0], add_special_tokens=False).input_ids) <= 31
    long = "The overwhelmingly unquestionable misunderstandings unhesitatingly counterbalanced electroencephalographers"
    given = as_lines(tmp_path / "s.jsonl", [line_of("Zed went out.", "It rained.", f"{long} {name}.", long, long) for name in ("Ann", "Bob", "Tom", "Sue")])
    code, _, err = call("evaluate", *words, "--stories", given, "--system", "no-op", "--dropout", ".5")
    assert code == 0, err
    refused("evaluate", *words, "--stories", given, "--dropout", "1", says=["drafts have no word", "--dropout"])


def test_an_own_system_that_ends_the_program_or_returns_no_text(words, tmp_path):
    "`sys.exit` in it ended the command without a word; half a character ended in a traceback."
    given = as_lines(tmp_path / "s.jsonl", [line_of(*STORY)])
    body = "class Own:\n    def refine(self, prompts, drafts, seed): {}\ndef build(): {}\n"
    for number, (refine, build, says) in enumerate([("return drafts", "raise SystemExit(3)", "sys.exit(3)"), ("raise SystemExit", "return Own()", "sys.exit(None)"),
                                                    ("return ['\\ud800' for _ in drafts]", "return Own()", "half a character")]):
        (tmp_path / f"own{number}.py").write_text(body.format(refine, build))
        refused("evaluate", *words, "--stories", given, "--system", f"{tmp_path / f'own{number}.py'}:build", says=[says])


# Numbers

def test_numbers_are_read_in_base_10_and_fields_given_once(tiny_preset, tmp_path):
    "PyYAML reads 0100 as 64 and 1:30 as 90; of two overrides of a field the last won."
    for value in ("0100", "1:30", "-017", "1:30.5"):
        with pytest.raises(StudyError): load_preset(tiny_preset, [f"training.prior.steps={value}"])
        with pytest.raises(StudyError, match="base 10"): load_preset(str(write_text_of(tmp_path, f"extends: quick\nlimit: {value}\n")))
    assert load_preset(tiny_preset, ["training.prior.steps=100", "training.prior.lr=0.01"]).training["prior"]["steps"] == 100
    refused("plan", "limit=100", "limit=200", "--preset", tiny_preset, says=["limit: given twice"])


def write_text_of(folder, text):
    (folder / "mine.yaml").write_text(text)
    return folder / "mine.yaml"


@pytest.mark.parametrize("option, value", [("--seed", -1), ("--seed", 10 ** 30), ("--seeds", 10 ** 9), ("--limit", 10 ** 30), ("--limit", 0)])
def test_a_number_out_of_its_range(words, option, value):
    refused("evaluate", *words, option, value, says=[f"{option} {value}", "from"])


def test_numbers_that_no_machine_holds(tiny_preset, trained, tmp_path):
    refused("plan", "limit=100000000000000", "--preset", tiny_preset, says=["limit is"])
    refused("plan", "limit=" + "[" * 3000, "--preset", tiny_preset, says=["no YAML value"])
    refused("reproduce", "--cores", 10 ** 9, "--preset", tiny_preset, "--out", tmp_path, says=["--cores"])
    refused("reproduce", "limit=100000000", "--preset", "cpu", "--stories", "rocstories", "--out", tmp_path, says=["are free", "lower limit"])
    refused("evaluate", "--seeds", 2, "--preset", tiny_preset, "--out", trained.out, says=["--seeds", "--seed"])
    with pytest.raises(StudyError, match="at most 100,000"): read_stories("embedded", 10 ** 8)
    for text in ("training.prior.lr=.nan", "training.prior.lr=.inf", "sizes.cosmos.eta=.nan", "sizes.flow.depth=1e99"):
        with pytest.raises(StudyError): load_preset(tiny_preset, [text])


def test_training_that_no_memory_holds_is_refused_before_it_starts(tiny_preset, tmp_path, monkeypatch):
    "The message names the need, what is free and a remedy, which works."
    words = ("--preset", tiny_preset, "--out", tmp_path / "o")
    refused("reproduce", "prior-32-shared", "sizes.prior.inner=1000000000", *words, says=["training prior-32-shared", "953.7 GiB of memory", "are free", "lower its sizes"])
    assert not (tmp_path / "o" / "models").exists()
    study = Study(tiny_preset, out=str(tmp_path / "o"))
    models = [model for model in models_of(study.preset).values() if model.name.startswith("autoencoder")]
    most = max(memory_of(study, model) for model in models)
    monkeypatch.setattr("latentrefine.doctor.memory_there", lambda: 1.5 * most)
    with pytest.raises(StudyError, match="autoencoder-.* and autoencoder-.*: at least .* are free; --cores 1"): check_memory(study, models, 2)
    check_memory(study, models, 1)                                       # the remedy
    refused("reproduce", "autoencoder-32", "autoencoder-16", "--cores", 2, *words, says=["--cores 1"])
    monkeypatch.setattr("latentrefine.doctor.memory_there", lambda: None)      # a system that does not say
    check_memory(study, models, 2)


def test_training_of_more_than_a_day_is_told(tiny_preset, tmp_path, monkeypatch):
    "A warning, since the estimate is off by up to a factor of 2.5; nothing where no training is due."
    study = Study(tiny_preset, out=str(tmp_path), overrides=["training.prior.steps=1000000000", "training.prior.batch=100"])
    models = models_due(study, ["prior-32-shared-s1337", "stories", "report"])
    assert [model.name for model in models] == ["prior-32-shared"]
    with pytest.warns(UserWarning, match="training of 1 models takes about .* days.*fewer steps"): check_time(study, models, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_time(study, [], 2)
        check_time(Study(tiny_preset, out=str(tmp_path)), models, 2)
    monkeypatch.setattr("latentrefine.reproduce.reproduce", lambda *given: None)
    code, _, err = call("reproduce", "prior-32-shared", "training.prior.steps=1000000000", "training.prior.batch=100", "--preset", tiny_preset, "--out", tmp_path)
    assert code == 0 and "latentrefine: warning: training of" in err, err
    elsewhere = call("reproduce", "prior-32-shared", "training.prior.steps=1000000000", "--preset", tiny_preset, "--out", tmp_path, "--", "--executor", "slurm")
    assert elsewhere[0] == 0 and not elsewhere[2], elsewhere


@pytest.mark.parametrize("name, minutes", [("gpu", 46), ("gpu-bert", 37), ("paper", 480)])
def test_the_estimate_of_a_preset_is_about_the_one_in_its_head(name, minutes):
    "Training at 250 TFLOP/s, all seeds in sequence."
    study = Study(name, "embedded")
    models = [model for model in models_of(study.preset).values() for _ in range(1 if model.first_seed or model.shared else study.seeds)]
    assert .5 < sum(operations_of(study, model) for model in models) / 250e12 / 60 / minutes < 3


# Text

HIDDEN = ("\u200b", "\ufeff", "\u00ad", "\ufe0f", "\x07", "[SEP]", "[PAD]")


@pytest.mark.parametrize("text", HIDDEN, ids=ascii)
def test_text_without_words_is_empty(words, tmp_path, text):
    refused("refine", *words, "--prompt", "A.", "--draft", text, says=["draft"])
    refused("refine", *words, "--prompt", text, "--draft", "b.", says=["prompt"])
    (tmp_path / "s.jsonl").write_text(line_of("A.", "B.", text, "D.", "E.") + "\n")
    refused("evaluate", *words, "--stories", tmp_path / "s.jsonl", says=["s.jsonl, line 1", "sentence3", "empty"])


def test_the_name_of_a_special_token_is_no_word(words, tmp_path):
    refused("refine", *words, "--prompt", "A.", "--draft", "b [SEP] c", says=["draft", "[SEP]", "special token"])
    assert call("refine", *words, "--prompt", "A b.", "--draft", "b [MASK] c")[0] == 0
    refused("refine", *words, "--prompt", "A.", "--draft", "b \udcff c", says=["half a character"])
    (tmp_path / "s.jsonl").write_text(line_of("A.", "B.", "C [SEP] c.", "D.", "E.") + "\n")
    with pytest.raises(StudyError, match=r"sentence3 holds \[SEP\]"): read_stories(tmp_path / "s.jsonl")


def test_wrongly_decoded_text_is_named_and_mended(words, tmp_path):
    (tmp_path / "s.jsonl").write_text(f"{line_of('Ann said &quot;hi&quot;.', 'The cafÃ© closed.', *STORY[2:])}\n{line_of(*STORY)}\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="50.0% of the stories.*quot.*repair=true"): plain = read_stories(tmp_path / "s.jsonl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mended = read_stories(tmp_path / "s.jsonl", repair=True)
    assert mended[0].prompt == 'Ann said "hi". The caf\u00e9 closed.' and mended[1] == plain[1]
    code, _, err = call("evaluate", *words, "--stories", tmp_path / "s.jsonl", "--system", "no-op")
    assert code == 0 and "latentrefine: warning:" in err and "repair=true" in err, err
    code, _, err = call("evaluate", "repair=true", *words, "--stories", tmp_path / "s.jsonl", "--system", "no-op")
    assert code == 0 and "latentrefine: warning" not in err, err


def test_no_message_moves_the_terminal(words, tmp_path):
    (tmp_path / "s.csv").write_text("storyid,sent\x1b[31mence1\n")
    for command in (("evaluate", *words, "--stories", tmp_path / "s.csv"), ("plan", *words, "a\x1b[31mb"), ("tables", *words, "--no\x1b[31msuch")):
        try: code, said, err = call(*command)
        except SystemExit: continue
        assert code == 2 and "\x1b" not in said + err and "\\x1b[31m" in err, err


def test_text_does_not_break_a_table():
    import pandas as pd
    shown = markdown_of(pd.DataFrame({"a": ["x | y", "<script>\nz", "`&`"]}), [])
    assert len(shown.splitlines()) == 5 and "<script" not in shown and "x \\| y" in shown


# Held out

def test_training_stories_are_known_by_content(trained, tiny_preset, tmp_path):
    "After the file that they were read from has changed, and with other capitals or punctuation."
    shutil.copytree(trained.out / "models", tmp_path / "models")
    again = Study(tiny_preset, out=str(tmp_path))
    first, new = trained.splits["train"][0], trained.splits["test"][0]
    given = as_lines(tmp_path / "s.jsonl", [line_of(*(s.upper() for s in first.sentences)), line_of(*new.sentences)])
    source, known, digest = json.loads((tmp_path / TRAINED_ON).read_text())
    stories, left_out, _ = unseen_stories(again, str(given), None, False)
    assert [story.text for story in stories] == [new.text] and left_out == 1 and source == "embedded" and len(known) == len(trained.splits["train"])
    for text in ("", "[]", "null", "{", "7", '"gone.csv"', json.dumps([source, known[1:], digest]), "[" * 9999):
        (tmp_path / TRAINED_ON).write_text(text)
        with pytest.raises(StudyError, match="trained_on.json.*latentrefine reproduce stories"): unseen_stories(again, str(given), None, False)


# Loaded whole or refused

def edited(folder, name, **change):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.fixture
def bert(tiny_bert, tmp_path): return Path(shutil.copytree(tiny_bert, tmp_path / "bert"))


CONFIGS = [dict(hidden_act="relu"), dict(layer_norm_eps=1e-2), dict(num_attention_heads=4)]


@pytest.mark.parametrize("change", CONFIGS, ids=lambda change: next(iter(change)))
def test_another_config_is_another_encoder(bert, tiny_bert, change):
    edited(bert, "config.json", **change)
    assert load_encoder(str(bert)).digest != load_encoder(tiny_bert).digest


def test_another_tokenizer_is_refused(bert):
    wholes = {path: path.read_text(encoding="utf-8") for path in (bert / "tokenizer.json", bert / "vocab.txt")}
    for path, text in wholes.items(): path.write_text(re.sub(r"\bkite\b", "kitf", text), encoding="utf-8")
    with pytest.raises(StudyError, match="vocabulary"): load_encoder(str(bert))
    for path, text in wholes.items(): path.write_text(re.sub(r'"lowercase": ?true', '"lowercase": false', text), encoding="utf-8")
    edited(bert, "tokenizer_config.json", do_lower_case=False)
    with pytest.raises(StudyError, match="tokenizer splits.*KITE"): load_encoder(str(bert))


def test_an_encoder_without_a_tensor_or_with_nan_is_refused(bert):
    path = bert / "model.safetensors"
    weights = load_file(path)
    name = next(key for key in weights if key.endswith("layer.1.output.dense.weight"))
    save_file({key: value for key, value in weights.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(StudyError, match="lacks .*layer.1.output.dense.weight"): load_encoder(str(bert))
    save_file({**weights, name: torch.full_like(weights[name], torch.nan)}, path, {"format": "pt"})
    with pytest.raises(StudyError, match="layer.1.output.dense.weight holds numbers that are not finite"): load_encoder(str(bert))


def test_models_with_nan_or_without_a_tensor_are_neither_saved_nor_read(tmp_path):
    net = torch.nn.Linear(2, 2)
    save_model(tmp_path / "m", net, {})
    _, weights = read_model(tmp_path / "m")
    with pytest.raises(StudyError, match="Missing.*bias"): load_weights(torch.nn.Linear(2, 2), {"weight": weights["weight"]}, tmp_path / "m")
    torch.nn.init.constant_(net.weight, torch.nan)
    with pytest.raises(StudyError, match="weight holds numbers that are not finite"): save_model(tmp_path / "n", net, {})
    assert not (tmp_path / "n").exists()


def test_no_advice_deletes_what_the_study_did_not_make(trained, tiny_bert):
    "One's own saved system with another encoder: what differs is named."
    with pytest.raises(StudyError) as error: read_model(trained.model("autoencoder-32"), encoder_digest="0" * 64)
    assert "encoder_digest is" in str(error.value)


def messages():
    "(module, function, source) of each error, warning and remedy of the package: its texts, with what they insert in braces."
    for path in sorted((ROOT / "latentrefine").rglob("*.py")):
        for function in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)):
            inner = {part for node in ast.walk(function) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
            inner -= {node for node in inner if isinstance(node, ast.JoinedStr)}
            for node in ast.walk(function):
                if node in inner: continue
                if isinstance(node, ast.JoinedStr): text = ast.unparse(node)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str): text = node.value
                else: continue
                if text != ast.get_docstring(function, clean=False): yield path.stem, function.name, text


def test_no_message_advises_to_delete():
    "Neither a folder nor a file: what the study can make again it makes again, and what it did not make is not its own."
    said = [message for message in messages() if re.search(r"(?i)\\b(delete|remove|erase|rm)\\b (it|the|this|that|them|-r|\\{|/)", message[2])]
    assert not said and len(list(messages())) > 500, said


def test_a_model_without_guidance_is_trained_again(trained):
    folder = trained.model("cola")
    whole = {path: path.read_bytes() for path in (folder / "config.json", folder / "model.safetensors")}
    config, _ = read_model(folder)
    config = {name: value for name, value in config.items() if name != "guidance"}
    try:
        (folder / "config.json").write_text(json.dumps({**config, "sha256": model_digest(folder, config)}))
        with pytest.raises(StudyError, match="no guidance scale was chosen for it; train it with: latentrefine reproduce cola-s1337"): trained.open("Cola DLM")
    finally:
        for path, data in whole.items(): path.write_bytes(data)


def test_rows_changed_by_hand_are_measured_again(tmp_path):
    from latentrefine.core import save_rows
    from latentrefine.measure import content_digest
    path, row = tmp_path / "t.json", dict.fromkeys(("system", "encoder", "width", "dropout", "split", "n", "seed", "steps"))
    path.with_suffix(".csv").write_text("a\n1\n")
    save_rows(path, [row], dict(digest="d"))
    save_rows(path, [row], dict(digest="d", content=content_digest(path)))
    assert recorded_digest(path) == "d"
    path.with_suffix(".csv").write_text("a\n2\n")
    assert recorded_digest(path) is None
    with pytest.raises(StudyError, match="latentrefine reproduce t"): check_rows(path)


# Remedies

def follow(message):
    "Carry out the command that a message prints, to the letter; it must succeed."
    command = re.search(r"latentrefine (reproduce .*)$", message, re.M)
    assert command, message
    code, said, err = call(*shlex.split(command[1]))
    assert code == 0 and re.search("made in|up to date", said), (command[1], err)


def test_remedies_lead_to_success(tiny_preset, tmp_path):
    """A missing model, a damaged one, and a missing list of the training stories, in a folder whose name needs quotes. The stories of
    an evaluation are not those that the remedy trains on."""
    preset, out = shutil.copy(tiny_preset, tmp_path / "my tiny.yaml"), tmp_path / "o {a} 'b' \u00e9"
    words = ("--preset", preset, "--out", out, "--system", "no-op")
    refine = ("refine", "--prompt", "Ann went out.", "--draft", "she got wet.", *words)
    evaluate = ("evaluate", "--stories", as_lines(tmp_path / "s.jsonl", [line_of(*STORY)]), *words)
    follow(refused(*evaluate, says=["autoencoder-32"]))
    assert call(*refine)[0] == 0
    weights = out / "models" / "autoencoder-32-s1337" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (out / TRAINED_ON).unlink()
    follow(refused(*refine, says=["autoencoder-32", "changed since"]))
    assert call(*refine)[0] == 0
    assert call(*evaluate)[0] == 0                                       # the stories were due as well, and are there again


def told_by(call_it):
    "The message of the StudyError that a call must raise."
    with pytest.raises(StudyError) as error: call_it()
    return str(error.value)


def lost_rows(study): (study.out / "tables/stories.json").unlink(); return lambda: load_rows(study.out / "tables/stories.json")
def damaged_rows(study): (study.out / "tables/stories.json").write_text("{"); return lambda: load_rows(study.out / "tables/stories.json")
def lost_list(study): (study.out / TRAINED_ON).unlink(); return lambda: trained_on(study)
def damaged_answer(study): (study.out / "answers/stories.json").write_text("{"); return lambda: write_page(study.out, "t", [results()["stories"]])
def lost_model(study): return lambda: read_model(study.model("autoencoder-32"))


def lost_encoder(study):
    (study.out / "models/encoder/config.json").unlink()
    return lambda: Study(study.preset_path, out=str(study.out)).encoder


def changed_rows(study):
    (study.out / "tables/stories.csv").write_text("a\n1\n")
    return lambda: check_rows(study.out / "tables/stories.json")


def narrow_rows(study):
    "Rows of a time before they carried a digest, without the columns that the notebook shows."
    path = study.out / "tables/stories.json"
    path.write_text(json.dumps([{name: value for name, value in row.items() if name != "content"} for row in load_rows(path)]))
    path.with_suffix(".csv").write_text("a\n1\n")
    return lambda: render(study, ["stories"])


SITUATIONS = {("core", "load_rows"): (lost_rows, damaged_rows), ("study", "trained_on"): (lost_list,), ("page", "load_json"): (damaged_answer,),
              ("training", "remedy_for"): (lost_encoder, lost_model), ("measure", "check_rows"): (changed_rows,), ("reproduce", "render"): (narrow_rows,)}
TOGETHER = [(lost_rows, lost_list, damaged_answer), (damaged_rows, lost_encoder, lost_model), (changed_rows,), (narrow_rows,)]
OF_ALL = {("compare", "compare"), ("compare", "publish")}      # name no target: followed on the whole graph in test_study.py
IN_COMMAND = {("command", "do_tables")}                          # followed below
DEFAULT = ("compact", "open_pretrained")                         # said of the default study alone: its command is complete


def test_every_remedy_that_names_a_command_is_followed():
    "Each says which study it is of, so that the command line can complete it, and has a situation here."
    told = [message for message in messages() if "latentrefine reproduce" in re.sub(r"['\"]\s+f?['\"]", "", message[2])]
    told = [message for message in told if message[:2] != DEFAULT]
    assert {message[:2] for message in told} == {*SITUATIONS, *OF_ALL, *IN_COMMAND}
    assert all("{OF_THIS_STUDY}" in text for *_, text in told), told
    assert {one for listed in TOGETHER for one in listed} == {one for listed in SITUATIONS.values() for one in listed}


@pytest.mark.parametrize("situations", TOGETHER, ids=lambda listed: listed[0].__name__)
def test_a_remedy_is_followed(told_study, situations):
    attempts = [situation(told_study) for situation in situations]
    for message in dict.fromkeys(map(told_by, attempts)): follow(message.replace(OF_THIS_STUDY, f" --preset {told_study.preset_path} --out {told_study.out}"))
    for attempt in attempts: attempt()


@pytest.fixture(scope="module")
def told_study(tiny_preset, tmp_path_factory):
    "A study with an encoder of its own, its stories told."
    preset = write_preset(tmp_path_factory.mktemp("own") / "tiny.yaml", tiny_preset, encoder="in-domain", dropouts=[.05])
    study = Study(str(preset), out=str(tmp_path_factory.mktemp("told")))
    assert call("reproduce", "stories", "--preset", preset, "--out", study.out)[0] == 0
    return study


def test_tables_that_are_not_there_are_made(tiny_preset, tmp_path):
    words = ("tables", "stories", "--preset", tiny_preset, "--out", tmp_path)
    follow(refused(*words, says=["no tables", "reproduce stories"]))
    assert call(*words)[0] == 0
    assert "reproduce --preset" in refused("tables", "--preset", tiny_preset, "--out", tmp_path / "none", says=["no tables"])


# Environments

@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    "A copy of the package without git in a folder whose name is formatted, quoted and not ASCII."
    folder = tmp_path_factory.mktemp("br{ace} '\u00e9'") / "latentrefine"
    for part in ("latentrefine", "nbs"): shutil.copytree(ROOT / part, folder / part)
    return folder


def stale_kernel(folder):
    spec = folder / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps(dict(argv=["/nonexistent/python"], display_name="Python 3", language="python")))
    return str(folder)


def litter(folder):
    """A folder whose modules bear names of the standard library and of dependencies (transformers#7448), with a default profile of
    Snakemake for another workflow (snakemake#3994)."""
    (folder / "datasets").mkdir(parents=True)
    for name in ("yaml", "random", "torch", "datasets/__init__"): (folder / f"{name}.py").write_text("raise RuntimeError('not yours')")
    (folder / "profiles" / "default").mkdir(parents=True)
    (folder / "profiles" / "default" / "config.yaml").write_text("no-such-option: true\n")
    (folder / "config.yaml").write_text("dry-run: true\n")
    return folder


HOMES = {"no HOME": (None, "table1"), "HOME below a file": ("/proc/1/none", "table1"), "HOME=/": ("/", "stories"),
         "HOME that cannot be written": ("/proc", "stories")}


@pytest.mark.parametrize("home, target", HOMES.values(), ids=HOMES)
def test_the_same_rows_in_any_environment(checkout, tiny_preset, tmp_path, home, target):
    """C locale, a stale kernel, no git, a folder with files of others, and paths with braces, quotes, spaces and other letters; executed
    notebooks hold no machine path. A profile of Snakemake for another workflow (snakemake#1398) changes nothing."""
    out, folder = tmp_path / "o {a} \u00e9", litter(tmp_path / "cwd")
    (tmp_path / "bin").mkdir()
    for name in ("bash", "sh", "which", "uname", "env"):
        if there := shutil.which(name): (tmp_path / "bin" / name).symlink_to(there)
    environment = dict(PATH=f"{Path(sys.executable).parent}{os.pathsep}{tmp_path / 'bin'}", LC_ALL="C", JUPYTER_PATH=stale_kernel(tmp_path / "jupyter"), PYTHONPATH=str(checkout),
                       OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", SNAKEMAKE_PROFILE=str(folder))
    if home: environment["HOME"] = home
    command = [sys.executable, "-P", "-m", "latentrefine.command", "reproduce", target, "--preset", tiny_preset, "--out", str(out), "--cores", "2"]
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == 0 and "made in" in run.stdout, run.stderr + (out / "logs" / "study.log").read_text()[-3000:]
    rows = json.loads((out / "tables" / f"{target}.json").read_text())
    assert rows and {row["commit"] for row in rows} == {"unknown"}
    text = (out / "notebooks" / f"{target}.ipynb").read_text(encoding="utf-8")
    assert str(checkout) not in text and json.loads(text)["nbformat"] == 4 and "~~" not in text


def test_installed_without_its_notebooks(tmp_path):
    "The message says to run from a checkout."
    shutil.copytree(ROOT / "latentrefine", tmp_path / "latentrefine")
    run = subprocess.run([sys.executable, "-m", "latentrefine.command", "plan"], env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and "run latentrefine from a checkout" in run.stderr and "Traceback" not in run.stderr, run.stderr


# Public reports of the tools that the study stands on; those above are of transformers#7448, snakemake#1398 and snakemake#3994

@pytest.fixture
def notebook(tmp_path, monkeypatch):
    "A function that writes a notebook of code cells, the first with the tag `parameters`, runs it and returns its executed cells."
    monkeypatch.setattr("latentrefine.notebooks.NOTEBOOKS", tmp_path)
    def run(*cells, **parameters):
        whole = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(one) for one in cells])
        whole.cells[0].metadata.tags = ["parameters"]
        nbformat.write(whole, tmp_path / "mine.ipynb")
        run_notebook("mine.ipynb", parameters, tmp_path / "done.ipynb", tmp_path / "log.ipynb")
        return nbformat.read(tmp_path / "done.ipynb", 4).cells
    return run


@pytest.mark.parametrize("cell", ['s = "a=b"  # papermill#864', 's = ["prior.steps=3"]', 's: Literal["a", "b"] = "b"  # papermill#906', "s = [\n  'a',\n]"])
def test_a_parameter_with_any_value_is_known(notebook, cell):
    "papermill#864 and papermill#906: an equals sign in a value, or quotes in an annotation, hid the parameter."
    assert notebook(f"from typing import Literal\n{cell}", "print(s)", s="c=d")[-1].outputs[0].text == "c=d\n"
    with pytest.raises(StudyError, match="unknown parameter t; it has s"): notebook(cell, "print(s)", t=1)


def test_a_damaged_notebook_is_named(tmp_path):
    for text in ("", "{}", "[" * 9999, '{"cells": [{"cell_type": "code"}]}'):
        (tmp_path / "mine.ipynb").write_text(text)
        with pytest.raises(StudyError, match="mine.ipynb"): check_parameters(tmp_path / "mine.ipynb", {"s": 1})


@pytest.mark.parametrize("end", ["import sys; sys.exit(0)", "raise SystemExit", "exit()", "%run nosuch.py", "raise KeyboardInterrupt"])
def test_a_notebook_that_ends_early_is_not_finished(notebook, tmp_path, end):
    "papermill#536 and nbclient#48: `sys.exit(0)` and a failed `%run` passed as a finished notebook, although later cells had not run."
    with pytest.raises(RuntimeError, match="as far as it ran"): notebook("s = 1", end, "print(s)")
    assert not (tmp_path / "done.ipynb").exists()


def test_figures_are_kept_whatever_the_backend(notebook, monkeypatch):
    "papermill#278: images were missing in the executed notebook."
    monkeypatch.setenv("MPLBACKEND", "Agg")
    shown = notebook("s = 1", "import matplotlib.pyplot as plt\nplt.plot([1, 2]);\nplt.show()")[-1].outputs
    assert [sorted(one.data) for one in shown] == [["image/png", "text/plain"]]


def test_an_encoder_pads_on_the_right_and_returns_its_states_by_name(bert, tiny_bert):
    """transformers#20068: a BERT with padding on the left has other states, as `padding_side` of the tokenizer's config may ask;
    transformers#45277: with `return_dict: false` in its config a model returned a tuple."""
    edited(bert, "tokenizer_config.json", padding_side="left", truncation_side="left")
    edited(bert, "config.json", return_dict=False, output_hidden_states=True)
    texts = ["Ann went out.", "She took a very long walk in the rain. " * 9]
    found, asked = (load_encoder(str(folder)) for folder in (bert, tiny_bert))
    assert found.digest == asked.digest and np.array_equal(embed_texts(found, texts), embed_texts(asked, texts))


def test_a_tokenizer_that_was_saved_with_truncation_reads_whole_texts(bert, tiny_bert):
    "transformers#24179: truncation and padding stand in tokenizer.json, where a call has left them."
    edited(bert, "tokenizer.json", truncation=dict(direction="Right", max_length=8, strategy="LongestFirst", stride=0),
           padding=dict(strategy=dict(Fixed=128), direction="Right", pad_to_multiple_of=None, pad_id=0, pad_type_id=0, pad_token="[PAD]"))
    text = "Ann went out and she took a very long walk in the rain."
    assert load_encoder(str(bert)).tokenizer(text).input_ids == load_encoder(tiny_bert).tokenizer(text).input_ids


def run_python(*words, **environment):
    "Exit code, stdout and stderr of a Python process."
    run = subprocess.run([sys.executable, *words], env={**os.environ, **environment}, capture_output=True, text=True)
    return run.returncode, run.stdout, run.stderr


def test_python_without_docstrings_is_refused():
    "transformers#40659: `python -OO` ends in a traceback."
    code, _, err = run_python("-m", "latentrefine.command", "plan", PYTHONOPTIMIZE="2", PYTHONPATH=str(ROOT))
    assert code == 2 and "PYTHONOPTIMIZE=2" in err and "unset it" in err and "Traceback" not in err, err


def test_a_broken_framework_beside_pytorch_changes_nothing(tmp_path):
    "POT#865: the import of POT ended with that of another framework, in an error other than ImportError."
    for name in ("jax", "tensorflow", "cupy"): (tmp_path / f"{name}.py").write_text("raise OSError('lib.so: cannot open')")
    code, said, err = run_python("-c", "from latentrefine.transport import *; print(transport_name())", PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert code == 0 and said == "Sinkhorn\n", err


@pytest.mark.parametrize("scale", [1e18, 1e25, float("inf"), float("nan")])
def test_huge_clouds_have_no_distance_of_zero(scale):
    "POT#229: large costs made the plan wrong; here they made the loss 0."
    x = torch.arange(40.).reshape(5, 8)
    with pytest.raises(ValueError, match="not finite"): sinkhorn_divergence(x * scale, (x + 1) * scale)
    assert sinkhorn_divergence(x, x + 1) > 0


def test_clouds_of_any_sizes_have_a_distance():
    "POT#190 and POT#342: for some sizes, or weights in single precision, there was no plan."
    x = torch.randn(960, 4, generator=torch.Generator().manual_seed(0))
    for size in (1, 2, 3, 5, 7, 49): assert 0 <= sinkhorn_divergence(x[:size] + 9, x) <= 1.1


def test_mauve_says_nothing(capfd):
    "mauve#4: a warning of its clustering about too few points, on the error stream of the process."
    rows = np.random.default_rng(0).normal(size=(100, 8))
    assert abs(mauve_score(rows, rows, seeds=1)["mauve"] - 1) < 1e-9 and capfd.readouterr() == ("", "")


def test_a_failure_of_the_engine_is_told(tiny_preset, tmp_path):
    "What Snakemake says of an option that it does not know, or of a profile that is not there (snakemake#3994)."
    words = ("reproduce", "stories", "--preset", tiny_preset, "--out", tmp_path / "o", "--")
    refused(*words, "--no-such-option", says=["no-such-option", "study.log"])
    refused(*words, "--profile", "nosuch", says=["profile", "nosuch", "study.log"])


# The doctor

def test_doctor(trained, words, tmp_path, tiny_preset):
    "Facts of machine, folder and study; exit code 1 with the remedy where something is wrong."
    code, said, err = call("doctor", *words)
    assert code in (0, 1) and not err and (code == 0) == ("WRONG" not in said)
    for label in ("latentrefine", "versions", "instruction sets", "free memory", "kernel python3", "free disk", "precision", "MiniLM", "nodes due"):
        assert re.search(rf"^{label} ", said, re.M), label
    assert re.search(r"^  table2 +it has not run$", said, re.M)
    (tmp_path / "file").write_text("")
    code, said, _ = call("doctor", "--preset", tiny_preset, "--out", tmp_path / "file" / "below")
    assert code == 1 and "WRONG: it cannot be written" in said
    code, said, _ = call("doctor", "--preset", write_preset(tmp_path / "bad.yaml", tiny_preset, training={**TINY["training"], "prior": 5}))
    assert code == 1 and "WRONG: " in said and "training.prior is 5" in said
