"Situations in which something wrong once passed in silence or ended in a traceback, and what must happen in each."
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from commands import as_file, as_lines, call, refused, write_preset
from conftest import TINY
from safetensors.torch import load_file, save_file

from latentrefine.core import ROOT, StudyError, writing
from latentrefine.encoder import load_encoder
from latentrefine.evaluation import unseen_stories
from latentrefine.measure import check_rows, recorded_digest
from latentrefine.presets import load_preset
from latentrefine.registry import load_chapters
from latentrefine.report import markdown_of
from latentrefine.stories import read_stories
from latentrefine.study import TRAINED_ON, Study
from latentrefine.training import load_weights, read_model, save_model

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


# Numbers

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
    assert "encoder_digest is" in str(error.value) and "delete" not in str(error.value)


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
    assert code == 0 and "made in" in said, (command[1], err)


def test_remedies_lead_to_success(tiny_preset, tmp_path):
    "A missing model, a damaged one, and a missing list of the training stories, in a folder whose name needs quotes."
    preset, out = shutil.copy(tiny_preset, tmp_path / "my tiny.yaml"), tmp_path / "o {a} 'b' \u00e9"
    words = ("--preset", preset, "--out", out, "--system", "no-op")
    refine = ("refine", "--prompt", "Ann went out.", "--draft", "she got wet.", *words)
    follow(refused(*refine, says=["autoencoder-32"]))
    assert call(*refine)[0] == 0
    weights = out / "models" / "autoencoder-32-s1337" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (out / TRAINED_ON).unlink()
    follow(refused(*refine, says=["autoencoder-32", "changed since"]))
    assert call(*refine)[0] == 0
    given = as_lines(tmp_path / "s.jsonl", [line_of(*STORY)])
    assert call("evaluate", "--stories", given, *words)[0] == 0          # the stories were due as well, and are there again


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


@pytest.mark.parametrize("home", [None, "/proc/1/none"], ids=["no HOME", "HOME that cannot be written"])
def test_the_same_rows_in_any_environment(checkout, tiny_preset, tmp_path, home):
    "C locale, a stale kernel, no git, and paths with braces, quotes, spaces and other letters; executed notebooks hold no machine path."
    out = tmp_path / "o {a} \u00e9"
    (tmp_path / "bin").mkdir()
    for name in ("bash", "sh", "which", "uname", "env"):
        if there := shutil.which(name): (tmp_path / "bin" / name).symlink_to(there)
    environment = dict(PATH=f"{Path(sys.executable).parent}{os.pathsep}{tmp_path / 'bin'}", LC_ALL="C", JUPYTER_PATH=stale_kernel(tmp_path / "jupyter"), PYTHONPATH=str(checkout),
                       OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if home: environment["HOME"] = home
    command = [sys.executable, "-m", "latentrefine.command", "reproduce", "table1", "--preset", tiny_preset, "--out", str(out), "--cores", "2"]
    run = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == 0 and "made in" in run.stdout, run.stderr + (out / "logs" / "study.log").read_text()[-3000:]
    rows = json.loads((out / "tables" / "table1.json").read_text())
    assert rows and {row["commit"] for row in rows} == {"unknown"}
    text = (out / "notebooks" / "table1.ipynb").read_text(encoding="utf-8")
    assert str(checkout) not in text and json.loads(text)["nbformat"] == 4 and "~~" not in text


def test_installed_without_its_notebooks(tmp_path):
    "The message says to run from a checkout."
    shutil.copytree(ROOT / "latentrefine", tmp_path / "latentrefine")
    run = subprocess.run([sys.executable, "-m", "latentrefine.command", "plan"], env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and "run latentrefine from a checkout" in run.stderr and "Traceback" not in run.stderr, run.stderr


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
