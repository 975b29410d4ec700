"What every system promises: shapes, honest counts, no look at the target, no effect of padding, of neighbours or of the seed."
from dataclasses import replace

import pytest
import torch

from latentrefine.core import CLS, MASK, PAD, SEP, VOCAB, StudyError
from latentrefine.aligner import AlignerConfig, train_aligner
from latentrefine.autoencoder import vocabulary_of
from latentrefine.baselines.parallel import train_parallel
from latentrefine.draft_prior import DraftPriorConfig, drafted, train_prior
from latentrefine.encoder import Corpus
from latentrefine.flow import FlowConfig, train_gaussian_flow
from latentrefine.recoverability import token_scores
from latentrefine.refiner import oracle
from latentrefine.study import EVALUATION_SEED, MAIN_RATE, PEERS, REALIGNED, SYSTEMS, Study, open_gaussian, open_refiner, open_system
from latentrefine.systems.cola import ColaConfig, TextVAE, train_cola, train_vae
from latentrefine.systems.cosmos import CosmosConfig, SmoothAutoencoder, train_denoiser, train_smooth
from latentrefine.systems.klflow import KLFlowConfig, train_klflow
from latentrefine.systems.lrd import train_masked
from latentrefine.systems.smooth_refiner import train_refiner
from latentrefine.training import Training

GAUSSIAN, SMOOTH = "Gaussian start", "DCLR on COSMOS"
OTHERS = {GAUSSIAN: open_gaussian, SMOOTH: open_refiner}      # systems of one experiment, which no command opens
ALL = (*SYSTEMS, *OTHERS)
FLOWS = ("local flow", "metric + OT", "fused readout", "full")
HEADS = ("fused readout", "full")
NO_LATENTS = ("re-aligned, tokens", "re-aligned, hard tokens", "insertion tagger", "parallel transformer", "KL-Flow", "masked diffusion", "LRD")
WIDTHS = {"Cola DLM": 16}         # of latents, where it is not the encoder's


@pytest.fixture(scope="module")
def study(trained): return trained


@pytest.fixture(scope="module")
def systems(study): return {name: OTHERS[name](study) if name in OTHERS else open_system(study, name) for name in ALL}


@pytest.fixture(scope="module")
def drafts(study): return study.drafts(.10, count=4)


def networks(system):
    "The networks a system may call, each once."
    if system.name in ("COSMOS", SMOOTH):
        nets = [system.net] if system.name == "COSMOS" else list(system.nets.values())
        return [system.encoder.model, system.smooth.compressor, system.smooth.decompressor, system.smooth.frame.decoder, *nets]
    if system.name == "Cola DLM": return [system.nets["vae"].into, system.nets["prior"], system.nets["vae"].head]     # encoder and decoder by their last layers
    if system.name in PEERS: return [system.net]
    if system.name == "parallel transformer": return [system.net, system.net.reader]
    parts = ("prior", "flow", "metric", "residual", "head", "aligner")
    own = [system.encoder.names] if getattr(system, "way", "") == "masked LM" else []
    return [system.encoder.model, system.autoencoder.decoder, *own, *(net for net in (getattr(system, p, None) for p in parts) if net is not None)]


def same(a, b):
    latents = a.latents is b.latents is None or torch.equal(a.latents, b.latents)
    return torch.equal(a.logits, b.logits) and latents and a.nfe == b.nfe


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("steps", (0, 1, 3))
def test_shapes_and_honest_counts(systems, drafts, name, steps):
    calls = []
    hooks = [net.register_forward_hook(lambda *_: calls.append(1)) for net in networks(systems[name])]
    systems[name].slot_logits(drafts.rows([0]), steps, 1)
    counted = len(calls)
    for hook in hooks: hook.remove()
    assert systems[name].slot_logits(drafts.rows([0]), steps, 1).nfe == counted
    out = systems[name].slot_logits(drafts, steps, 1)
    assert out.logits.shape == (4, 32, VOCAB) and out.logits.dtype == torch.float32 and out.logits.isfinite().all()
    assert out.tokens.shape == (4, 32)
    if name in NO_LATENTS: assert out.latents is None
    else: assert out.latents.shape == (4, 32, WIDTHS.get(name, 32)) and out.latents.isfinite().all()
    assert not out.logits.requires_grad and systems[name].vocabulary == "corpus"
    assert systems[name].name == name


def test_systems_differ(systems, drafts):
    "The other tests would say nothing if the parts did nothing."
    told = drafts.told()                  # so that the aligner, hardly trained, must find the gaps somewhere
    outs = {name: systems[name].slot_logits(told, 2, 1) for name in ALL}
    for a in ALL:
        for b in ALL[:ALL.index(a)]: assert not torch.equal(outs[a].logits, outs[b].logits), (a, b)
    for name in FLOWS:
        moved = outs[name].latents - systems[name].slot_logits(told, 0, 1).latents
        assert moved[drafts.draft_mask].abs().mean() > 1e-3, name


@pytest.mark.parametrize("name", ALL)
def test_the_target_is_never_read(systems, drafts, name):
    other = replace(drafts, target_ids=drafts.target_ids.flip(0), target_mask=drafts.target_mask.flip(0))
    absent = replace(drafts, target_ids=torch.full_like(drafts.target_ids, PAD), target_mask=torch.zeros_like(drafts.target_mask))
    assert not torch.equal(other.target_ids, drafts.target_ids)
    out = systems[name].slot_logits(drafts, 2, 1)
    assert same(systems[name].slot_logits(other, 2, 1), out) and same(systems[name].slot_logits(absent, 2, 1), out)
    told = drafts.told()                                      # of the length and nothing else
    assert same(systems[name].slot_logits(replace(told, target_ids=told.target_ids.flip(0)), 2, 1), systems[name].slot_logits(told, 2, 1))


@pytest.mark.parametrize("name", ALL)
def test_a_told_length_changes_those_that_use_it(systems, drafts, name):
    "The length is information: it reaches a system through `told` alone, and only where the rows say so."
    told, out = systems[name].slot_logits(drafts.told(), 2, 1), systems[name].slot_logits(drafts, 2, 1)
    assert same(told, out) == (name not in {*REALIGNED, "parallel transformer"} - {"insertion tagger"})


@pytest.mark.parametrize("name", REALIGNED)
def test_held_gaps_are_taken_at_their_word(systems, study, name):
    "Every kept token of a draft with [MASK] stands on its own slot, whatever the aligner thinks."
    held = study.drafts(.3, count=6, kind="mask")
    _, alignment, gaps, _ = systems[name].find(held)
    kept = held.draft_mask & (held.draft_ids != MASK)
    assert (held.draft_ids == MASK).any(1).all() and kept.any()
    assert torch.allclose(alignment.reads.sum(2)[held.draft_mask], kept.float()[held.draft_mask], atol=1e-4)
    for row, where in zip(gaps, kept): assert ((torch.arange(32) + row[:32].cumsum(0))[:int(where.sum())] == where.nonzero().squeeze(1)).all()


@pytest.mark.parametrize("name", PEERS)
def test_modes(systems, study, drafts, name):
    "The draft is read as context, as a start or not at all; in the mode ORACLE alone the target is."
    other = replace(drafts, draft_ids=drafts.draft_ids.flip(0), draft_mask=drafts.draft_mask.flip(0))
    foreign = replace(drafts, target_ids=drafts.target_ids.flip(0), target_mask=drafts.target_mask.flip(0))
    for mode in ("COND", "START", "PROMPT", "ORACLE"):
        reader = replace(systems[name], mode=mode)
        out = reader.slot_logits(drafts, 2, 1)
        assert same(reader.slot_logits(other, 2, 1), out) == (mode in ("PROMPT", "ORACLE")), mode
        assert same(reader.slot_logits(foreign, 2, 1), out) == (mode != "ORACLE"), mode
    held = study.drafts(.3, count=6, kind="mask")
    visible, started = held.draft_mask & (held.draft_ids != MASK), replace(systems[name], mode="START").slot_logits(held, 2, 1)
    if name in ("masked diffusion", "LRD"): assert torch.equal(started.tokens[visible], held.draft_ids[visible])


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_draft_is_read(systems, drafts, name):
    other = replace(drafts, draft_ids=drafts.draft_ids.where(drafts.draft_ids == SEP, 2003).where(drafts.draft_mask, PAD))
    assert not torch.equal(systems[name].slot_logits(other, 2, 1).logits, systems[name].slot_logits(drafts, 2, 1).logits)


@pytest.mark.parametrize("name", ALL)
def test_padding_reaches_no_valid_slot(systems, drafts, name):
    assert not drafts.draft_mask.all() and not drafts.prompt_mask.all()
    junk = torch.randint(CLS, VOCAB, drafts.draft_ids.shape, generator=torch.Generator().manual_seed(0))
    filled = replace(drafts, prompt_ids=drafts.prompt_ids.where(drafts.prompt_mask, junk), draft_ids=drafts.draft_ids.where(drafts.draft_mask, junk))
    for ours, theirs in ((drafts, filled), (drafts.told(), filled.told())):
        a, b = systems[name].slot_logits(ours, 2, 1), systems[name].slot_logits(theirs, 2, 1)
        slots = torch.ones_like(drafts.draft_mask) if name in (*REALIGNED, "parallel transformer", *PEERS, SMOOTH) else drafts.draft_mask       # these write beyond the draft
        assert torch.allclose(a.logits[slots], b.logits[slots], atol=1e-5)
        if a.latents is not None: assert torch.allclose(a.latents[slots], b.latents[slots], atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_one_story_is_many(systems, drafts, name):
    many = systems[name].slot_logits(drafts, 2, 1)
    each = [systems[name].slot_logits(drafts.rows([row]), 2, 1) for row in range(len(drafts))]
    for row, one in enumerate(each): assert torch.allclose(one.logits[0], many.logits[row], atol=1e-3)
    assert sum(one.nfe for one in each) / len(each) == pytest.approx(many.nfe)


def test_a_draft_without_drops_and_one_of_the_end_alone(systems, study):
    for dropout in (0., 1.):
        batch = study.drafts(dropout, count=2)
        for name in ALL: assert systems[name].slot_logits(batch, 2, 1).logits.isfinite().all(), (name, dropout)


def test_an_empty_prompt(systems, drafts):
    batch = replace(drafts, prompt_ids=torch.zeros_like(drafts.prompt_ids), prompt_mask=torch.zeros_like(drafts.prompt_mask))
    for name in ALL: assert systems[name].slot_logits(batch, 2, 1).logits.isfinite().all(), name


@pytest.mark.parametrize("name", FLOWS)
def test_no_steps_is_the_start(systems, drafts, name):
    start, out = systems["DraftPrior"].slot_logits(drafts, 0, 1), systems[name].slot_logits(drafts, 0, 1)
    assert torch.equal(out.latents, start.latents)
    assert torch.equal(replace(systems[name], head=None).slot_logits(drafts, 0, 1).logits, start.logits)
    assert torch.equal(out.logits, start.logits) == (name not in HEADS)


@pytest.mark.parametrize("name", ALL)
def test_the_seed_is_for_noise_alone(systems, drafts, name):
    out = systems[name].slot_logits(drafts, 2, 1)
    assert same(systems[name].slot_logits(drafts, 2, 1), out)
    torch.manual_seed(99)                                     # nor does the global generator matter
    assert same(systems[name].slot_logits(drafts, 2, 1), out)
    assert same(systems[name].slot_logits(drafts, 2, 2), out) == (name not in (GAUSSIAN, "KL-Flow", "COSMOS", "Cola DLM"))


def test_the_gaussian_start_ignores_the_draft(systems, drafts):
    other = replace(drafts, draft_ids=drafts.draft_ids.flip(0), draft_mask=drafts.draft_mask.flip(0))
    assert same(systems[GAUSSIAN].slot_logits(other, 2, 1), systems[GAUSSIAN].slot_logits(drafts, 2, 1))


@pytest.mark.parametrize("name", ALL)
def test_saved_and_loaded_bit_for_bit(systems, drafts, tmp_path, name):
    systems[name].save(tmp_path / "saved")
    again = systems[name].load(tmp_path / "saved")
    assert same(again.slot_logits(drafts, 3, 1), systems[name].slot_logits(drafts, 3, 1)) and again.name == name
    files = {p.suffix for p in (tmp_path / "saved").rglob("*") if p.is_file()}
    assert files == {".json", ".safetensors"}                 # no pickle
    with pytest.raises(StudyError, match="parts.json"): systems[name].load(tmp_path)


def test_unknown_system(study):
    with pytest.raises(StudyError, match="no-op, DraftPrior"): open_system(study, "magic")


def test_the_oracle_beats_chance(study, systems):
    autoencoder = systems["no-op"].autoencoder
    batch = study.drafts(MAIN_RATE)
    logits = oracle(study.encoder, autoencoder, batch).logits
    own = token_scores(logits, batch.target_ids, batch.target_mask)["probability"].mean()
    both = batch.target_mask & batch.target_mask.roll(1, 0)
    foreign = token_scores(logits, batch.target_ids.roll(1, 0), both)["probability"].mean()
    assert own > 2 / len(study.kept) and own > 1.2 * foreign
    junk = replace(batch, draft_ids=torch.full_like(batch.draft_ids, SEP), draft_mask=torch.ones_like(batch.draft_mask))
    assert torch.equal(oracle(study.encoder, autoencoder, junk).logits, logits)       # the draft plays no part


# Training and evaluation

def test_training_draws_no_evaluation_draft(study):
    "On the same stories, at the same rate and seed, the two kinds of draft are different draws."
    corpus = study.corpus("train")
    evaluated = study.drafts(MAIN_RATE, "train")
    row_of = {tuple(ids): row for row, ids in enumerate(torch.cat([corpus.batch.prompt_ids, corpus.batch.target_ids], 1).tolist())}
    equal, training = [], Training(steps=40, batch=8, seed=EVALUATION_SEED)
    for step in range(40):
        batch, _ = drafted(corpus, training, (MAIN_RATE,), step)
        rows = [row_of[tuple(ids)] for ids in torch.cat([batch.prompt_ids, batch.target_ids], 1).tolist()]
        equal.append((batch.draft_ids == evaluated.draft_ids[rows]).all(1))
    assert not any(step.all() for step in equal)
    assert torch.cat(equal).float().mean() < .3        # two independent drafts agree where neither dropped a token


def test_training_meets_fresh_drafts(study):
    corpus, training = study.corpus("train"), Training(steps=2, batch=len(study.splits["train"]))
    first, again, later = (drafted(corpus, training, (MAIN_RATE,), step)[0] for step in (0, 0, 1))
    assert torch.equal(first.draft_ids, again.draft_ids)
    assert torch.equal(first.target_ids.sort(0).values, later.target_ids.sort(0).values) and not torch.equal(first.draft_ids, later.draft_ids)
    assert not torch.equal(first.draft_ids, drafted(corpus, replace(training, seed=7), (MAIN_RATE,), 0)[0].draft_ids)


def test_evaluation_drafts_are_the_same_for_every_seed(study, tiny_preset):
    other = Study(tiny_preset, out=str(study.out), seed=7)
    for dropout in (.03, MAIN_RATE): assert torch.equal(other.drafts(dropout).draft_ids, study.drafts(dropout).draft_ids)
    assert torch.equal(study.drafts(MAIN_RATE, count=3).draft_ids, study.drafts(MAIN_RATE).draft_ids[:3])
    assert other.training("prior").seed == 7


def test_no_test_story_is_trained_on(study):
    texts = {name: {story.text for story in part} for name, part in study.splits.items()}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["validation"]
    assert 0 < len(texts["test"]) <= study.preset["test"]


COSMOS, COLA = CosmosConfig(32, latents=8, depth=1, layers=2), ColaConfig(32, heads=2, vae_layers=1, layers=1)


def untrained_space(parts):
    torch.manual_seed(0)
    return SmoothAutoencoder(COSMOS, parts[1].word_embeddings, vocabulary_of(parts[0].batch)).requires_grad_(False)


def untrained_vae(parts):
    torch.manual_seed(0)
    return TextVAE(COLA, vocabulary_of(parts[0].batch)).requires_grad_(False)


MAKE = {"prior": lambda c, f: train_prior(*c, DraftPriorConfig(32, layers=1, heads=4, inner=32), (.05,), *f),
        "gaussian": lambda c, f: train_gaussian_flow(*c, FlowConfig(32, hidden=32, depth=1, heads=4), *f),
        "aligner": lambda c, f: train_aligner(*c, AlignerConfig(32), (.05,), *f),
        "jointly": lambda c, f: train_aligner(*c, AlignerConfig(32, joint_weight=1., share=.5), (.05,), *f),
        "parallel": lambda c, f: train_parallel(*c, (.05,), *f),
        "klflow": lambda c, f: train_klflow(c[0], KLFlowConfig(32, layers=1, heads=2), vocabulary_of(c[0].batch), (.05,), *f),
        "masked": lambda c, f: train_masked(*c, (.05,), *f),
        "cosmos": lambda c, f: train_smooth(c[0], c[1], COSMOS, vocabulary_of(c[0].batch), *f),
        "denoiser": lambda c, f: train_denoiser(c[0], c[1], untrained_space(c), (.05,), *f),
        "refiner": lambda c, f: train_refiner(c[0], c[1], untrained_space(c), (DraftPriorConfig(32, layers=1, heads=4, inner=32), FlowConfig(32, hidden=32, depth=1, heads=4)), (.05,), *f),
        "cola": lambda c, f: train_vae(c[0], COLA, vocabulary_of(c[0].batch), (.05,), *f),
        "cola prior": lambda c, f: train_cola(c[0], untrained_vae(c), COLA, (.05,), *f)}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_training_is_repeatable(study, systems, tmp_path, make):
    "Weights are a function of the seed, whatever ran before."
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(7)
        make((study.corpus(), study.encoder, systems["no-op"].autoencoder), (Training(steps=2, batch=4, slots=64, seed=seed), tmp_path / name))
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
        assert not (tmp_path / name / "state.safetensors").exists()
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("name", ("aligner", "jointly", "parallel", "klflow", "masked", "cosmos", "denoiser", "refiner", "cola", "cola prior"))
def test_interrupted_and_resumed_is_the_same(study, systems, tmp_path, monkeypatch, name):
    "Ctrl-C after any step, and the next run ends with the same weights."
    parts, training = (study.corpus(), study.encoder, systems["no-op"].autoencoder), Training(steps=4, batch=4, slots=64, save_seconds=0)
    MAKE[name](parts, (training, tmp_path / "whole"))
    step = torch.optim.AdamW.step
    taken = []
    def until(optimizer, *given):
        if len(taken) == 3: raise KeyboardInterrupt
        taken.append(1)
        return step(optimizer, *given)
    monkeypatch.setattr(torch.optim.AdamW, "step", until)
    with pytest.raises(KeyboardInterrupt): MAKE[name](parts, (training, tmp_path / "broken"))
    monkeypatch.undo()
    assert (tmp_path / "broken" / "state.safetensors").exists() and not (tmp_path / "broken" / "config.json").exists()
    MAKE[name](parts, (training, tmp_path / "broken"))
    assert (tmp_path / "broken" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_the_corpus_is_one_for_all(study):
    corpus = study.corpus("test")
    assert isinstance(corpus, Corpus) and corpus.states.shape == (len(study.splits["test"]), 64, 32)
    assert len(list((study.out / "models" / "states").glob(f"*{study.encoder.digest[:10]}*.npy"))) == 2 and not list(study.out.rglob("*.partial"))
