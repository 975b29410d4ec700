"The package's own refiner: by name, from a cold start, on texts of any length, and where it is absent or does not fit."
import io
import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from commands import as_lines, call, refused

from latentrefine import compact, refine, registry, study
from latentrefine.aligner import Aligner, AlignerConfig
from latentrefine.autoencoder import Autoencoder, AutoencoderConfig
from latentrefine.compact import PRETRAINED, save_compact
from latentrefine.core import ROOT, StudyError
from latentrefine.encoder import LAYERS, load_encoder
from latentrefine.measure import results, systems_of
from latentrefine.presets import load_preset
from latentrefine.realigned import Realigned

SENTENCES = ("--prompt", "Ann went out. It rained.", "--draft", "She her CAFÉ umbrella.")


@pytest.fixture(scope="module")
def encoder(): return load_encoder("minilm").with_layers(LAYERS[1])


@pytest.fixture(scope="module")
def package(encoder, tmp_path_factory):
    "A folder with untrained weights where the package would have its own."
    with torch.random.fork_rng():
        torch.manual_seed(1)
        decoder = Autoencoder(AutoencoderConfig(384, 384), encoder.word_embeddings)
        aligner = Aligner(AlignerConfig(384, depth=1), encoder.model)
    parts = (one.eval().requires_grad_(False) for one in (decoder, aligner))
    folder = tmp_path_factory.mktemp("package")
    save_compact(Realigned(encoder, *parts, confidence=.9), folder / "pretrained" / "re-aligned", 16, dict(test=1))
    return folder


@pytest.fixture
def shipped(package, tmp_path, monkeypatch):
    "The package with weights and an empty checkout."
    monkeypatch.setattr(compact, "files", lambda name: package)
    monkeypatch.setattr(refine, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def absent(tmp_path, monkeypatch):
    "The package without weights."
    monkeypatch.setattr(compact, "files", lambda name: tmp_path)
    return tmp_path


def test_without_a_study_the_packages_weights_refine(shipped):
    code, said, err = call("refine", *SENTENCES)
    assert code == 0 and PRETRAINED in err and "CAFÉ umbrella." in said, err
    code, again, err = call("refine", *SENTENCES, "--system", PRETRAINED)
    assert code == 0 and not err and again == said
    assert refine.load().name == PRETRAINED == refine.load(PRETRAINED, preset="cpu").name and refine.load().facts["test"] == 1


def test_a_trained_study_wins(shipped):
    trained = shipped / "outputs" / "runs" / "quick" / "models" / "aligner-384-s1337"
    trained.mkdir(parents=True)
    assert refine.uses_pretrained("re-aligned")
    (trained / "config.json").write_text("{}")
    assert not refine.uses_pretrained("re-aligned") and refine.uses_pretrained(PRETRAINED)
    assert not refine.uses_pretrained("no-op")


@pytest.mark.parametrize("named", [("--preset", "cpu"), ("--out", "elsewhere"), ("flow_steps=3",)], ids=str)
def test_a_study_that_is_named_is_asked_for_its_own(shipped, named, monkeypatch):
    monkeypatch.chdir(shipped)
    refused("refine", *SENTENCES, *named, says=["not found", "train it with"])


def test_no_weights(absent):
    assert compact.pretrained_folder() is None and not refine.uses_pretrained("re-aligned")
    refused("refine", *SENTENCES, "--system", PRETRAINED, says=[PRETRAINED, "no weights", "reproduce"])
    with pytest.raises(StudyError, match="no weights"): refine.refiner_of(None, PRETRAINED)
    before = set(registry.SYSTEMS)
    compact.register_pretrained()
    assert set(registry.SYSTEMS) == before


def test_weights_are_for_one_encoder(shipped, encoder, tiny_preset, monkeypatch):
    "In a study with it, they are a system of the cross-system table alone; another is refused."
    registry.load_chapters()
    monkeypatch.delitem(registry.SYSTEMS, PRETRAINED, raising=False)
    compact.register_pretrained()
    entry = registry.SYSTEMS.pop(PRETRAINED)
    monkeypatch.setitem(registry.SYSTEMS, PRETRAINED, entry)
    def asked(result, preset): return {one.name for one in systems_of(results()[result], load_preset(preset))}
    assert PRETRAINED in asked("systems", "quick") and PRETRAINED not in asked("systems", tiny_preset)
    assert not any(PRETRAINED in asked(result, "quick") for result in results() if result != "systems")
    other = load_encoder(load_preset(tiny_preset).encoder)
    with pytest.raises(StudyError, match="changes of the weights of encoder minilm"): entry.open(SimpleNamespace(encoder=other))
    opened = entry.open(SimpleNamespace(encoder=encoder))
    assert opened.name == PRETRAINED and opened.encoder is encoder and not entry.needs(None)


COLD = """
import socket, sys
from pathlib import Path
def unreachable(*_): raise OSError("the network is off")
socket.socket.connect = socket.getaddrinfo = unreachable
from latentrefine.core import cold_start
with cold_start(): from latentrefine import compact
compact.files = lambda name: Path(sys.argv[1])
from latentrefine.command import main
code = main(["refine", "--prompt", "Ann went out.", "--draft", "She got wet.", "--system", compact.PRETRAINED])
slow = ("pandas", "matplotlib", "pydantic", "datasets", "snakemake", "IPython", "latentrefine.study", "latentrefine.measure")
print([name for name in slow if name in sys.modules], code)
"""


def test_a_cold_start_imports_only_what_it_needs(package):
    "What takes long to import is not; the network is not used."
    done = subprocess.run([sys.executable, "-c", COLD, str(package)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stdout + done.stderr


TEXT = "Zoë  went OUT.\r\n\r\nIt rained “hard”, she said.\r\n\r\n \r\n*\r\nAnn [MASK] home. Tom [SEP] ran.\r\n"


@pytest.mark.parametrize("given", ["file", "input"])
def test_a_text_keeps_its_layout(shipped, tmp_path, given, monkeypatch):
    "Line ends, empty lines and the first sentence stay; kept words keep capitals and accents."
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    source = str(tmp_path / "text.txt") if given == "file" else "-"
    code, said, err = call("refine", "--text", source, "--write", tmp_path / "refined.txt")
    refined = (tmp_path / "refined.txt").read_bytes().decode()
    assert code == 0 and not said and "2 copied" in err, err
    assert refined.startswith("Zoë  went OUT.\r\n\r\n") and refined.endswith("Tom [SEP] ran.\r\n")
    assert refined.split("\r\n\r\n \r\n*\r\n")[0].count("\r\n") == 2 and "[MASK]" not in refined
    assert "“hard”" in refined
    code, printed, _ = call("refine", "--text", tmp_path / "text.txt")
    assert code == 0 and printed == refined


def test_a_prompt_for_the_first_sentence(shipped, tmp_path):
    (tmp_path / "text.txt").write_text("Ann [MASK] home.")
    assert "1 copied" in call("refine", "--text", tmp_path / "text.txt")[2]
    code, said, err = call("refine", "--text", tmp_path / "text.txt", "--prompt", "It rained.")
    assert code == 0 and "0 copied" in err and "[MASK]" not in said, err


@pytest.mark.parametrize("data, said", [(b"\xff", "UTF-8"), (None, "cannot be read")], ids=["bytes", "absent"])
def test_a_text_that_cannot_be_read(shipped, tmp_path, data, said):
    if data: (tmp_path / "text.txt").write_bytes(data)
    refused("refine", "--text", tmp_path / "text.txt", says=["text.txt", said])


def test_one_thing_to_refine(shipped):
    refused("refine", *SENTENCES, "--text", "-", says=["--draft", "--drafts", "--text"])


LETTERS = [*"aÉ. \t😀'“”,-!?İﬁ한\u200b中ß\xa0…½\0", "e\u0301", "\r\n", "\n\n", "[MASK]", "[SEP]", "Don't", "umbrellas ", "It rained. ", "\ud800", "x" * 200]


def test_any_text_is_refined(shipped):
    "Whatever a text holds, it is refined without an error, and what stands before its first sentence stays."
    refiner, gen = refine.load(PRETRAINED), random.Random(1)
    for _ in range(40):
        text = "".join(gen.choices(LETTERS, k=gen.randrange(60)))
        found = refine.refine_long(refiner, text, gen.choice(["", "It rained. Ann ran.", "word " * 60]))
        assert found.copied <= found.sentences and ("[SEP]" in found.text) >= ("[SEP]" in text)


def test_empty_text(shipped, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\r\n\r\n")
    assert call("refine", "--text", tmp_path / "text.txt")[:2] == (0, "\r\n\r\n")


def test_drafts_from_standard_input(shipped, tmp_path, monkeypatch):
    rows = [dict(prompt="It rained.", draft="Ann got WET."), dict(prompt="A.")]
    data = as_lines(tmp_path / "given.jsonl", rows).read_bytes()
    for write in ((), ("--write", tmp_path / "refined.jsonl")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        code, said, err = call("refine", "--drafts", "-", *write)
        assert code == 0 and "standard input, line 2: lacks draft" in err, err
        lines = said if not write else (tmp_path / "refined.jsonl").read_text()
        found, = map(json.loads, lines.splitlines())
        assert found["line"] == 1 and found["draft"] == "Ann got WET." and "WET" in found["refined"]


def test_evaluate_drafts_without_a_study(shipped, tmp_path, monkeypatch):
    "The default study scores drafts with the package's weights; the no-op, which it has not trained, is left out."
    registry.load_chapters()
    monkeypatch.delitem(registry.SYSTEMS, PRETRAINED, raising=False)
    compact.register_pretrained()
    monkeypatch.setitem(registry.SYSTEMS, PRETRAINED, registry.SYSTEMS.pop(PRETRAINED))
    monkeypatch.setattr(study, "ROOT", shipped)
    given = as_lines(tmp_path / "given.jsonl", [dict(prompt="It rained.", draft="Ann got WET.", target="Ann got wet.")])
    code, said, err = call("evaluate", "--drafts", given)
    assert code == 0 and PRETRAINED in said and "draft" in said and "no-op" not in said, err


def test_the_weights_are_part_of_a_wheel():
    "A file in the folder of the weights matches the package data of pyproject.toml."
    import tomllib
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["latentrefine"]
    assert data == ["pretrained/*/*"]
