"""What every system of the registry promises: shapes, an honest NFE, no use of the target, no effect of padding,
of neighbours or of the seed where its entry says none. What differs between systems comes from their entries."""
import copy
import re
import shutil
from dataclasses import replace

import pytest
import torch

from latentrefine.aligner import aligner_name, calibration_of
from latentrefine.autoencoder import TokenDecoder, open_autoencoder
from latentrefine.core import CLS, MASK, MODES, PAD, SEP, UNK, VOCAB, StudyError
from latentrefine.draft_prior import start_latents, training_batch
from latentrefine.encoder import Corpus
from latentrefine.flow import flow_loss
from latentrefine.measure import models_for, results, shares_latents
from latentrefine.presets import load_preset
from latentrefine.realign import DELETED
from latentrefine.realigned import open_mixed
from latentrefine.recoverability import token_scores
from latentrefine.refiner import DCLR, oracle
from latentrefine.registry import FAMILIES, MAIN_RATE, SYSTEMS, load_chapters, models_of
from latentrefine.study import EVALUATION_SEED, Study
from latentrefine.systems import cola, cola_study, cosmos, klflow
from latentrefine.systems.klflow import generate
from latentrefine.systems.lrd import LRDConfig, latent_refinements
from latentrefine.training import BUDGETS, Training, budget_name, read_model

load_chapters()
NAMES = list(SYSTEMS)
SYSTEMS = {name: entry for name, entry in SYSTEMS.items() if not entry.encoder}      # any encoder will do
WITH_MODES = [name for name, entry in SYSTEMS.items() if len(entry.modes) > 1]
REALIGNING = [name for name, entry in SYSTEMS.items() if entry.family == "re-aligned"]
ON_DRAFT_SLOTS = ("reference", "report")      # families whose output beyond the draft is not defined


@pytest.fixture(scope="module")
def study(trained): return trained


@pytest.fixture(scope="module")
def systems(study): return {name: entry.open(study) for name, entry in SYSTEMS.items()}


@pytest.fixture(scope="module")
def drafts(study): return study.drafts(.10, count=4)


def same(a, b):
    latents = a.latents is b.latents is None or torch.equal(a.latents, b.latents)
    return torch.equal(a.logits, b.logits) and latents and a.nfe == b.nfe


def evaluations(system, batch, steps):
    """Network evaluations of one call: calls of modules of `networks()` outside each other. Left out are bare layers of
    PyTorch, tables of embeddings, and output layers that belong to a network: a TokenDecoder counts if it is listed."""
    counted, depth = [], [0]
    def before(*_):
        counted.append(depth[0] == 0)
        depth[0] += 1
    def after(*_): depth[0] -= 1
    listed = system.networks()
    modules = {part: None for net in listed for part in net.modules()}
    own = [part for part in modules
           if not type(part).__module__.startswith("torch.nn") and "Embeddings" not in type(part).__name__
           and (part in listed or not isinstance(part, TokenDecoder))]
    hooks = [hook for part in own for hook in (part.register_forward_pre_hook(before), part.register_forward_hook(after))]
    system.slot_logits(batch, steps, 1)
    for hook in hooks: hook.remove()
    return sum(counted)


# Entries

@pytest.mark.parametrize("name", SYSTEMS)
def test_entry(name):
    entry = SYSTEMS[name]
    assert entry.name == name and entry.family in FAMILIES and entry.description and "\n" not in entry.description
    assert entry.modes and set(entry.modes) <= set(MODES) and set(entry.uses) <= {"draft", "length", "seed"}
    assert ("draft" in entry.uses) == (entry.modes != ("PROMPT",))
    assert entry.rates in ("none", "main", "each", "all")


@pytest.mark.parametrize("name", SYSTEMS)
def test_opens_from_the_models_that_it_needs(study, tiny_preset, tmp_path, name):
    "`needs` is complete, and each of its models counts."
    needs = SYSTEMS[name].needs(study.preset)
    assert needs and set(needs) <= set(models_of(study.preset))
    alone = Study(tiny_preset, out=str(tmp_path))
    for need in needs: shutil.copytree(study.model(need), alone.model(need))
    opened = SYSTEMS[name].open(alone)
    assert opened.name == name
    shutil.rmtree(alone.model(needs[-1]))
    with pytest.raises(StudyError, match=f"latentrefine reproduce {needs[-1]}"): SYSTEMS[name].open(alone)


def test_unknown_system(study):
    with pytest.raises(StudyError, match=re.escape(f"magic: not known; choose from {', '.join(NAMES)}")): study.open("magic")


# Calls

@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("steps", (0, 1, 3))
def test_shapes_and_honest_nfe(study, systems, drafts, name, steps):
    system = systems[name]
    assert system.slot_logits(drafts.rows([0]), steps, 1).nfe == evaluations(system, drafts.rows([0]), steps)
    out = system.slot_logits(drafts, steps, 1)
    assert out.logits.shape == (4, 32, VOCAB) and out.logits.dtype == torch.float32 and out.logits.isfinite().all()
    assert out.tokens.shape == (4, 32) and not out.logits.requires_grad
    if out.latents is not None: assert out.latents.shape == (4, 32, system.width) and out.latents.isfinite().all()
    if out.latents is not None and shares_latents(system):
        real = system.autoencoder.project(torch.zeros(4, 64, study.encoder.width))[:, 32:]
        assert real.shape == out.latents.shape
    assert system.name == name and system.vocabulary == "corpus" and system.layers


@pytest.mark.parametrize("name", SYSTEMS)
def test_steps_matter_where_the_system_says_so(systems, drafts, name):
    outs = [systems[name].slot_logits(drafts, steps, 1) for steps in (0, 3)]
    assert same(*outs) == (not systems[name].moves)


def test_systems_differ(systems, drafts):
    "The other tests would say nothing if the parts did nothing."
    known = drafts.with_known_length()      # so that the aligner, hardly trained, must find the gaps somewhere
    outs = {name: system.slot_logits(known, 2, 1) for name, system in systems.items()}
    names = list(outs)
    for place, a in enumerate(names):
        for b in names[:place]: assert not torch.equal(outs[a].logits, outs[b].logits), (a, b)
    for name, system in systems.items():
        if not system.moves or outs[name].latents is None: continue
        moved = outs[name].latents - system.slot_logits(known, 0, 1).latents
        assert moved[drafts.draft_mask].abs().mean() > 1e-3, name


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_target_is_never_read(systems, drafts, name):
    flipped = dict(target_ids=drafts.target_ids.flip(0))
    other = replace(drafts, target_mask=drafts.target_mask.flip(0), **flipped)
    absent = replace(drafts, target_ids=torch.full_like(drafts.target_ids, PAD),
                     target_mask=torch.zeros_like(drafts.target_mask))
    assert not torch.equal(other.target_ids, drafts.target_ids)
    out = systems[name].slot_logits(drafts, 2, 1)
    for batch in (other, absent): assert same(systems[name].slot_logits(batch, 2, 1), out)
    known = drafts.with_known_length()                        # the length and nothing else
    out = systems[name].slot_logits(known, 2, 1)
    assert same(systems[name].slot_logits(replace(known, **flipped), 2, 1), out)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_known_length_changes_those_that_use_it(systems, drafts, name):
    "It reaches a system through `with_known_length` alone, and only where the entry says so."
    outs = [systems[name].slot_logits(batch, 2, 1) for batch in (drafts, drafts.with_known_length())]
    assert same(*outs) == ("length" not in SYSTEMS[name].uses)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_draft_is_read_where_the_entry_says_so(systems, drafts, name):
    inside = drafts.draft_ids.where(drafts.draft_ids == SEP, 2003).where(drafts.draft_mask, PAD)
    others = (replace(drafts, draft_ids=inside),
              replace(drafts, draft_ids=drafts.draft_ids.flip(0), draft_mask=drafts.draft_mask.flip(0)))
    out, read = systems[name].slot_logits(drafts, 2, 1), "draft" in SYSTEMS[name].uses
    for other in others: assert same(systems[name].slot_logits(other, 2, 1), out) != read


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_seed_is_for_noise_alone(systems, drafts, name):
    out = systems[name].slot_logits(drafts, 2, 1)
    assert same(systems[name].slot_logits(drafts, 2, 1), out)
    torch.manual_seed(99)                                     # nor does the global generator matter
    assert same(systems[name].slot_logits(drafts, 2, 1), out)
    assert same(systems[name].slot_logits(drafts, 2, 2), out) == ("seed" not in SYSTEMS[name].uses)


@pytest.mark.parametrize("name", SYSTEMS)
def test_padding_reaches_no_valid_slot(systems, drafts, name):
    assert not drafts.draft_mask.all() and not drafts.prompt_mask.all()
    junk = torch.randint(CLS, VOCAB, drafts.draft_ids.shape, generator=torch.Generator().manual_seed(0))
    filled = replace(drafts, prompt_ids=drafts.prompt_ids.where(drafts.prompt_mask, junk),
                     draft_ids=drafts.draft_ids.where(drafts.draft_mask, junk))
    everywhere = SYSTEMS[name].family not in ON_DRAFT_SLOTS
    slots = torch.ones_like(drafts.draft_mask) if everywhere else drafts.draft_mask
    for ours, theirs in ((drafts, filled), (drafts.with_known_length(), filled.with_known_length())):
        a, b = systems[name].slot_logits(ours, 2, 1), systems[name].slot_logits(theirs, 2, 1)
        assert torch.allclose(a.logits[slots], b.logits[slots], atol=1e-5)
        if a.latents is not None: assert torch.allclose(a.latents[slots], b.latents[slots], atol=1e-5)


@pytest.mark.parametrize("name", SYSTEMS)
def test_one_story_is_many(systems, drafts, name):
    many = systems[name].slot_logits(drafts, 2, 1)
    each = [systems[name].slot_logits(drafts.rows([row]), 2, 1) for row in range(len(drafts))]
    for row, one in enumerate(each): assert torch.allclose(one.logits[0], many.logits[row], atol=1e-3)
    assert sum(one.nfe for one in each) / len(each) == pytest.approx(many.nfe)


def test_a_draft_without_drops_and_one_of_the_end_alone(systems, study):
    for dropout in (0., 1.):
        batch = study.drafts(dropout, count=2)
        for name, system in systems.items():
            assert system.slot_logits(batch, 2, 1).logits.isfinite().all(), (name, dropout)


def test_an_empty_prompt(systems, drafts):
    batch = replace(drafts, prompt_ids=torch.zeros_like(drafts.prompt_ids),
                    prompt_mask=torch.zeros_like(drafts.prompt_mask))
    for name, system in systems.items(): assert system.slot_logits(batch, 2, 1).logits.isfinite().all(), name


@pytest.mark.parametrize("name", SYSTEMS)
def test_saved_and_loaded_bit_for_bit(systems, drafts, tmp_path, name):
    systems[name].save(tmp_path / "saved")
    again = systems[name].load(tmp_path / "saved")
    assert same(again.slot_logits(drafts, 3, 1), systems[name].slot_logits(drafts, 3, 1)) and again.name == name
    files = {p.suffix for p in (tmp_path / "saved").rglob("*") if p.is_file()}
    assert files == {".json", ".safetensors"}                 # no pickle
    with pytest.raises(StudyError, match=re.escape(str(tmp_path))): systems[name].load(tmp_path)


# Modes

@pytest.mark.parametrize("name", SYSTEMS)
def test_the_first_mode_is_the_default(systems, name):
    assert hasattr(systems[name], "mode") == (name in WITH_MODES)
    assert getattr(systems[name], "mode", SYSTEMS[name].modes[0]) == SYSTEMS[name].modes[0]


@pytest.mark.parametrize("name", WITH_MODES)
def test_modes(systems, drafts, name):
    "The draft is read as context, as the initial state or not at all; in the mode ORACLE alone the target is."
    other = replace(drafts, draft_ids=drafts.draft_ids.flip(0), draft_mask=drafts.draft_mask.flip(0))
    foreign = replace(drafts, target_ids=drafts.target_ids.flip(0), target_mask=drafts.target_mask.flip(0))
    for mode in MODES:
        system = replace(systems[name], mode=mode)
        out = system.slot_logits(drafts, 2, 1)
        assert same(system.slot_logits(other, 2, 1), out) == (mode in ("PROMPT", "ORACLE")), mode
        assert same(system.slot_logits(foreign, 2, 1), out) == (mode != "ORACLE"), mode
    with pytest.raises(StudyError, match="mode 'BOTH'"): replace(systems[name], mode="BOTH")


# Properties of single families

@pytest.mark.parametrize("name", REALIGNING)
def test_given_gaps_are_kept(systems, study, name):
    "Every kept token of a draft with [MASK] stands on its own slot, whatever the aligner predicts."
    held = study.drafts(.3, count=6, corruption="mask")
    _, alignment, gaps, found, _ = systems[name].find(held)
    kept = held.draft_mask & (held.draft_ids != MASK)
    assert (held.draft_ids == MASK).any(1).all() and kept.any() and torch.equal(found.sum(1), kept.sum(1))
    assert torch.allclose(alignment.reads.sum(2)[held.draft_mask], kept.float()[held.draft_mask], atol=1e-4)
    for row, where in zip(gaps, kept):
        slots = (torch.arange(32) + row[:32].cumsum(0))[:int(where.sum())]
        assert (slots == where.nonzero().squeeze(1)).all()


@pytest.mark.parametrize("name", [name for name, entry in SYSTEMS.items() if entry.start_needs_alignment])
def test_the_tokens_of_an_initial_state_are_kept(systems, study, name):
    "In the mode START the draft's tokens are given: they are the output at every step, also those outside the vocabulary."
    held = study.drafts(.3, count=6, corruption="mask")
    foreign = int(next(word for word in range(2000, VOCAB) if word not in study.kept))
    held = replace(held, draft_ids=held.draft_ids.where(held.draft_ids != held.draft_ids[0, 0], foreign))
    visible, seen = held.draft_mask & (held.draft_ids != MASK), []
    def observe(_, logits): seen.append(logits().argmax(-1))
    system = replace(systems[name], mode="START", on_step=observe)
    assert torch.equal(system.slot_logits(held, 2, 1).tokens[visible], held.draft_ids[visible])
    one, shown = held.rows([0]), visible[:1]
    seen.clear(); system.slot_logits(one, 2, 1)
    assert seen and all(torch.equal(tokens[shown], one.draft_ids[shown]) for tokens in seen)


def test_lrd_has_the_settings_of_its_paper(systems):
    "Appendix A: top-p .9, r_f from .1 to .2, both thresholds .1, at most 20 refinements, one commitment a pass."
    config = systems["LRD"].config
    assert (config.top_p, config.refine, config.tau_refine, config.tau_decode, config.commits) == (.9, 20, .1, .1, 1)
    assert .1 <= config.r_f <= .2 and not config.repeat and config.block == 32


@pytest.mark.parametrize("config, passes", [
    (latent_refinements(2), 32 * 3), (latent_refinements(1), 32 * 2), (LRDConfig(refine=3, tau_refine=0.), 3 + 32),
    (LRDConfig(refine=3, tau_refine=0., block=8), 4 * (3 + 8)), (LRDConfig(refine=0, block=16), 32)])
def test_refinements_are_where_the_paper_has_them(systems, drafts, config, passes):
    "LF x k: k before each commitment; else once, or once a block. Without early stop, so that the passes are known."
    system = replace(systems["LRD"], config=replace(config, tau_decode=0.))
    assert system.slot_logits(drafts.rows([0])).nfe == passes


def test_averaged_runs_of_a_sampler(systems, drafts):
    "The mean distribution of K runs: K times the evaluations, and a cross-entropy not above the mean of the runs."
    system = systems["KL-Flow"]
    runs = [generate(system, drafts, 2, 1, sample).softmax(-1) for sample in range(3)]
    mean = replace(system, samples=3).slot_logits(drafts, 2, 1)
    kept = mean.logits.softmax(-1)[..., system.net.kept]
    places = system.net.kept != UNK
    assert mean.nfe == 9 and torch.allclose(kept[..., places], torch.stack(runs).mean(0)[..., places], rtol=1e-3)
    assert not torch.equal(runs[0], runs[1])
    def ce(p): return -p.gather(-1, system.net.columns[drafts.target_ids][..., None]).log()
    assert (ce(torch.stack(runs).mean(0)) <= torch.stack([ce(p) for p in runs]).mean(0) + 1e-4).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_kept_context_changes_nothing(systems, drafts, mode, monkeypatch):
    "KL-Flow reads prompt and draft once a call; reading them at each evaluation gives the same logits."
    system, read, calls = replace(systems["KL-Flow"], mode=mode), klflow.read_context, []
    monkeypatch.setattr(klflow, "read_context", lambda *given: calls.append(1) or read(*given))
    kept = system.slot_logits(drafts, 3, 1)
    assert len(calls) == 1
    forward = klflow.Denoiser.forward
    def uncached(net, log_x, t, batch, draft_mask, given=None, cache=None):
        return forward(net, log_x, t, batch, draft_mask, given)
    monkeypatch.setattr(klflow.Denoiser, "forward", uncached)
    again = system.slot_logits(drafts, 3, 1)
    assert len(calls) == 1 + again.nfe and torch.equal(again.logits, kept.logits)


@pytest.mark.parametrize("name", REALIGNING)
def test_every_aligner_gets_the_same_length_facts(systems, study, name):
    "A known length changes what a tagger inserts just as it changes the posterior; a cut draft's length is inferred."
    assert "length" in SYSTEMS[name].uses
    drafts = study.drafts(.15)
    hidden = torch.zeros(len(drafts), dtype=torch.long)
    have, length = drafts.draft_mask.sum(1), drafts.target_mask.sum(1)
    totals = {}
    for case, batch in dict(hidden=replace(drafts, length=hidden), unknown=drafts, known=drafts.with_known_length()).items():
        _, soft, gaps, edits, _ = systems[name].find(batch)
        totals[case] = (edits != DELETED).sum(1) + gaps.sum(1)
        if case == "known": assert torch.allclose(soft.within.sum(1), length.float(), atol=1e-3)
    cut = ~((drafts.draft_ids == SEP) & drafts.draft_mask).any(1)
    assert cut.any() and not torch.equal(totals["hidden"], totals["known"])
    if systems[name].variant == "tagger": assert torch.equal(totals["known"], length)
    assert torch.equal(totals["known"][cut], length[cut]) and (totals["unknown"][cut] == 32).all()


def test_the_control_copies_a_clean_draft(systems, study):
    "Direct prediction is not charged with tokens that the draft already has in their slots."
    control, clean = systems["parallel transformer"], study.drafts(0., count=6)
    probability = control.slot_logits(clean, 0, 1).logits.exp().gather(-1, clean.target_ids[..., None])[..., 0]
    assert probability[clean.target_mask].mean() > .8
    displaced = replace(clean, draft_ids=clean.draft_ids.roll(1, 1))       # what it copies is the draft, not the target
    other = control.slot_logits(displaced, 0, 1).logits.exp().gather(-1, clean.target_ids[..., None])[..., 0]
    assert other[clean.target_mask].mean() < .5


def test_the_aligner_is_calibrated_once_on_validation_drafts(study, systems, monkeypatch):
    "The first opening selects shift and confidence and writes them beside the aligner; later ones read no draft."
    folder, opened = study.model(aligner_name(study.full)), systems["re-aligned"]
    asked, drafts = [], study.drafts
    monkeypatch.setattr(study, "drafts", lambda *args, **more: asked.append((*args, *more.values())) or drafts(*args, **more))
    found, given = dict(shift=opened.shift, confidence=opened.confidence), (opened.aligner, opened.autoencoder.decoder, folder)
    assert calibration_of(study, *given) == found and not asked
    (folder / "calibration.json").unlink()
    assert calibration_of(study, *given) == found
    assert {one[1] for one in asked} == {"validation"} and {one[0] for one in asked} == {0., MAIN_RATE}


def test_the_report_on_the_latents_of_the_aligner(study, systems, drafts):
    "Same latents, same decoder: without its networks the control is the re-aligned refiner's own no-op."
    for name in ("DraftPrior", "full"):
        control = open_mixed(study, name)
        assert control.layers == systems["re-aligned"].layers != systems[name].layers
        assert control.moves == systems[name].moves and control.name.startswith(name)
        theirs, own = (system.autoencoder.state_dict() for system in (systems["re-aligned"], control))
        assert all(torch.equal(theirs[key], own[key]) for key in theirs)


def test_no_steps_of_a_flow_are_its_start(study, systems, drafts):
    def started(system): return DCLR(study.encoder, open_autoencoder(study), system.prior).slot_logits(drafts, 0, 1)
    start = started(systems["full"])
    flows = [system for system in systems.values() if isinstance(system, DCLR) and system.flow is not None]
    assert flows and torch.equal(start.logits, systems["DraftPrior"].slot_logits(drafts, 0, 1).logits)
    for system in flows:
        out, start = system.slot_logits(drafts, 0, 1), started(system)
        assert torch.equal(out.latents, start.latents), system.name
        assert torch.equal(replace(system, head=None).slot_logits(drafts, 0, 1).logits, start.logits), system.name
        assert torch.equal(out.logits, start.logits) == (system.head is None), system.name


def test_a_flow_is_trained_with_what_its_name_says(study, systems, drafts):
    "Metric, decoder cross-entropy and transport loss are separate settings, and each reaches the loss where it is set."
    parts = {"local flow": (False, 0, 0), "metric only": (True, .1, 0), "OT only": (False, 0, .1), "metric + OT": (True, .1, .1)}
    corpus, autoencoder, training = study.corpus(), open_autoencoder(study), study.training("flow")
    batch, states = training_batch(corpus, training, (MAIN_RATE,), 0)
    for name, (metric, ce, transport) in parts.items():
        flow, own = systems[name].flow, systems[name].metric
        assert (own is not None, flow.config.ce_weight, flow.config.ot_weight) == (metric, ce, transport), name
        starts = start_latents(study.encoder, autoencoder, systems[name].prior, batch)
        def loss_with(**weights):
            other = copy.copy(flow)
            other.config = replace(flow.config, **weights)
            return flow_loss(other, own, starts, states, batch, autoencoder, training.steps, training)
        bare, logs = loss_with(ce_weight=0., ot_weight=0.)
        assert set(logs) == {"force_error"}
        for field, part in (("ce_weight", "ce"), ("ot_weight", "transport")):
            more, logs = loss_with(**{"ce_weight": 0., "ot_weight": 0., field: 2.})
            assert (more - bare).item() == pytest.approx(2 * logs[part], abs=1e-5), (name, field)


def test_the_decoder_with_attention_is_trained_alike(study):
    "Same latents, same settings; its logits at a slot depend on the other slots, those of the slot-wise one do not."
    plain, attentive = open_autoencoder(study), open_autoencoder(study, attention=True)
    assert torch.equal(plain.mean, attentive.mean) and torch.equal(plain.scale, attentive.scale)
    models = [models_of(study.preset)[name] for name in ("autoencoder-32", "autoencoder-32-attention")]
    assert len({(model.section, model.train, model.sizes) for model in models}) == 1
    z = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))
    other = z.clone()
    other[:, 7] = -other[:, 7]
    for net, alone in ((plain, True), (attentive, False)):
        moved = (net.decoder.full(other) - net.decoder.full(z)).abs().amax((0, 2)) > 1e-6
        assert moved[7] and moved.sum() == (1 if alone else 32)


def test_the_oracle_beats_chance(study):
    autoencoder = open_autoencoder(study)
    batch = study.drafts(MAIN_RATE)
    logits = oracle(study.encoder, autoencoder, batch).logits
    own = token_scores(logits, batch.target_ids, batch.target_mask)["probability"].mean()
    both = batch.target_mask & batch.target_mask.roll(1, 0)
    foreign = token_scores(logits, batch.target_ids.roll(1, 0), both)["probability"].mean()
    assert own > 2 / len(study.kept) and own > 1.2 * foreign
    junk = replace(batch, draft_ids=torch.full_like(batch.draft_ids, SEP),
                   draft_mask=torch.ones_like(batch.draft_mask))
    assert torch.equal(oracle(study.encoder, autoencoder, junk).logits, logits)       # the draft plays no part


# Training and evaluation

def test_training_draws_no_evaluation_draft(study):
    "On the same stories, at the same rate and seed, the two kinds of draft are different draws."
    corpus = study.corpus("train")
    evaluated = study.drafts(MAIN_RATE, "train")
    def keys(batch): return map(tuple, torch.cat([batch.prompt_ids, batch.target_ids], 1).tolist())
    place = {key: row for row, key in enumerate(keys(corpus.batch))}
    equal, training = [], Training(steps=40, batch=8, seed=EVALUATION_SEED)
    for step in range(40):
        batch, _ = training_batch(corpus, training, (MAIN_RATE,), step)
        rows = [place[key] for key in keys(batch)]
        equal.append((batch.draft_ids == evaluated.draft_ids[rows]).all(1))
    assert not any(step.all() for step in equal)
    assert torch.cat(equal).float().mean() < .3        # two independent drafts agree where neither dropped a token


def test_training_meets_fresh_drafts(study):
    corpus, training = study.corpus("train"), Training(steps=2, batch=len(study.splits["train"]))
    def batch_at(step, training=training): return training_batch(corpus, training, (MAIN_RATE,), step)[0]
    first, again, later = (batch_at(step) for step in (0, 0, 1))
    assert torch.equal(first.draft_ids, again.draft_ids)
    assert torch.equal(first.target_ids.sort(0).values, later.target_ids.sort(0).values)
    assert not torch.equal(first.draft_ids, later.draft_ids)
    assert not torch.equal(first.draft_ids, batch_at(0, replace(training, seed=7)).draft_ids)


def test_evaluation_drafts_are_the_same_for_every_seed(study, tiny_preset):
    other = Study(tiny_preset, out=str(study.out), seed=7)
    for dropout in (.03, MAIN_RATE): assert torch.equal(other.drafts(dropout).draft_ids, study.drafts(dropout).draft_ids)
    assert torch.equal(study.drafts(MAIN_RATE, count=3).draft_ids, study.drafts(MAIN_RATE).draft_ids[:3])
    assert other.training("prior").seed == 7


def test_no_test_story_is_trained_on(study):
    texts = {name: {story.text for story in part} for name, part in study.splits.items()}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["validation"]
    assert 0 < len(texts["test"]) <= study.preset.test


def test_the_corpus_is_one_for_all(study):
    corpus = study.corpus("test")
    assert isinstance(corpus, Corpus) and corpus.states.shape == (len(study.splits["test"]), 64, 32)
    kept = (study.out / "models" / "states").glob(f"*{study.encoder.digest[:10]}*.npy")
    assert len(list(kept)) == 2 and not list(study.out.rglob("*.partial"))


def way_of(model):
    "The function that trains a model and the parameters that choose its way; models alike in both train alike."
    chosen = (name for name, value in model.parameters.items() if value and name not in ("part", "width", "dropouts"))
    return model.train, *sorted(chosen)


def ways(preset):
    "One model of a preset for each way of training, by a name for the test."
    found = {}
    for model in models_of(preset).values(): found.setdefault(way_of(model), model)
    return {f"{way[0].__name__} {' '.join(way[1:])}".strip(): model for way, model in found.items()}


def shortly(study, steps, out, seed=1337):
    "The study with few steps for each model, into another folder; what a model needs is that of the trained study."
    sections = study.preset.training
    settings = [f"training.{name}.{field}" for name in sections for field in (f"steps={steps}", "save_seconds=0")]
    one = copy.copy(study)
    parts = {"realign": 12, "klflow": 2}        # the first models of these sections take a part of the steps
    more = [f"training.{name}.steps={times * steps}" for name, times in parts.items()]
    one.preset = load_preset(study.preset_path, settings + more)
    one.seed, one.model = seed, lambda name: study.model(name)
    return one


WAYS = list(ways(load_preset("quick")))


@pytest.mark.parametrize("way", WAYS)
def test_training_is_repeatable(study, tmp_path, way):
    "Weights are a function of the seed, whatever ran before."
    model, weights = ways(study.preset)[way], []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(7)
        model.train(shortly(study, 2, tmp_path, seed), tmp_path / name, **model.parameters)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
        assert not (tmp_path / name / "state.safetensors").exists()
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("way", WAYS)
def test_interrupted_and_resumed_is_the_same(study, tmp_path, monkeypatch, way):
    "Ctrl-C after any step, and the next run ends with the same weights."
    model, short = ways(study.preset)[way], shortly(study, 4, tmp_path)
    model.train(short, tmp_path / "whole", **model.parameters)
    step = torch.optim.AdamW.step
    taken = []
    def until(optimizer, *given):
        if len(taken) == 3: raise KeyboardInterrupt
        taken.append(1)
        return step(optimizer, *given)
    monkeypatch.setattr(torch.optim.AdamW, "step", until)
    with pytest.raises(KeyboardInterrupt): model.train(short, tmp_path / "broken", **model.parameters)
    monkeypatch.undo()
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    assert (broken / "state.safetensors").exists() and not (broken / "config.json").exists()
    model.train(short, broken, **model.parameters)
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


# COSMOS and Cola DLM

@pytest.mark.parametrize("name", ("base", "cpu"))
def test_cosmos_and_cola_get_as_much_signal_as_the_aligner(name):
    "As many training examples whose draft is read, and as many scored slots a step; both read half of the drafts."
    training = load_preset(name).training
    aligner = Training(**training["aligner"])
    for section, fraction in (("cosmos", cosmos.DRAFTED), ("cola", cola.DRAFTED)):
        own = Training(**training[section])
        assert own.steps * own.batch * fraction == aligner.steps * aligner.batch, section
    for section in ("cosmos_autoencoder", "cola_autoencoder", "cola"):
        assert Training(**training[section]).slots == aligner.slots, section


@pytest.mark.parametrize("module, names", ((cosmos, (cosmos.cosmos_space(), "cosmos")), (cola, ("cola-autoencoder", "cola"))),
                         ids=("cosmos", "cola"))
def test_stages_see_the_stories_in_different_orders(study, tmp_path, monkeypatch, module, names):
    short, orders, rows_at = shortly(study, 2, tmp_path), {}, module.rows_at
    for name in names:
        seen = orders[name] = []
        def recorded(*given):
            seen.append(rows_at(*given))
            return seen[-1]
        monkeypatch.setattr(module, "rows_at", recorded)
        model = models_of(study.preset)[name]
        model.train(short, tmp_path / name, **model.parameters)
    first, second = (torch.cat(orders[name]).tolist() for name in names)
    assert len(first) == len(second) == 8 and len(set(first) & set(second)) < 4


def test_cosmos_copies_latents_without_noise(systems):
    "Whatever its weights; and the prediction shrinks to nothing of the input at full noise."
    net, gen = systems["COSMOS"].net, torch.Generator().manual_seed(0)
    z, memory = torch.randn(2, 8, 32, generator=gen), torch.randn(2, 16, 32, generator=gen)
    def guess(z, t): return net(z, torch.full((2,), t), torch.zeros_like(z), memory, torch.ones(2, 16, dtype=torch.bool))
    assert torch.equal(guess(z, 0.), z) and not torch.allclose(guess(z, .5), z, atol=.1)


def test_cosmos_spaces_keep_the_size_of_a_latent_and_start_with_free_queries(study):
    "No norm at the end of compressor, decompressor or token predictor; the objective alone makes a space."
    config = cosmos.CosmosConfig(32, latents=8, depth=1, layers=2)
    torch.manual_seed(0)
    net, h = cosmos.SmoothAutoencoder(config, study.encoder.word_embeddings, study.kept), torch.randn(4, 32, 32)
    mask = torch.ones(4, 32, dtype=torch.bool)
    for x in (net.compressor(h, mask), net.decompressor(h[:, :8], mask[:, :8])):
        assert x.square().mean(-1).std() > .01
    decoder = net.frame.decoder
    assert torch.allclose(decoder(2 * h) + decoder(0 * h), 2 * decoder(h), atol=1e-4)
    assert config.linear_start == 0 and net.compressor.queries.std() < .03 and net.decompressor.queries.std() < .03
    for preset in ("base", "cpu", "quick"): assert "linear_start" not in load_preset(preset).sizes["cosmos"]


def test_cosmos_in_the_space_of_berts_states(study, tmp_path):
    config = cosmos.CosmosConfig(32, latents=32, depth=0, layers=2)
    short = shortly(study, 2, tmp_path).training("cosmos_variants")
    corpus = Corpus(study.batches["train"], None)
    net, _ = cosmos.train_smooth(corpus, study.encoder, config, study.kept, short, tmp_path / "space")
    batch = study.drafts(0., count=4)
    states = cosmos.text_states(study.encoder, batch.target_ids, batch.target_mask)
    rebuilt = net.decode(net.encode(states, batch.target_mask))
    assert torch.allclose(rebuilt[batch.target_mask], net.frame.project(states)[batch.target_mask], atol=1e-3)
    with pytest.raises(StudyError, match="depth 0 needs 32"): cosmos.CosmosConfig(32, latents=8, depth=0)


def test_the_guidance_of_cola_is_chosen_on_validation(study, systems):
    "The best of a grid on validation drafts, kept with the model, and what the system is opened with."
    config, system = read_model(study.model("cola"))[0], systems["Cola DLM"]
    scores = {float(scale): score for scale, score in config["validation"].items()}
    assert tuple(scores) == cola_study.GUIDANCES and system.guidance == config["guidance"] == cola_study.best_scale(scores)
    again = cola_study.choose_guidance(replace(system, guidance=1.), cola_study.judging_drafts(study), study.seed)[1]
    assert again == pytest.approx(scores, rel=1e-3)


def test_a_cola_without_a_chosen_scale_is_refused(study, tiny_preset, tmp_path):
    other = Study(tiny_preset, out=str(tmp_path))
    vae, config = cola.load_vae(study.model("cola-autoencoder")), cola.ColaConfig(**study.sizes("cola"))
    cola.train_cola(Corpus(study.batches["train"], None), vae, config, (0.,), Training(1, 4), other.model("cola"))
    with pytest.raises(StudyError, match="no guidance scale was chosen"): SYSTEMS["Cola DLM"].open(other)


def test_the_words_of_cola_start_as_the_encoders(study, tmp_path):
    short, model = shortly(study, 1, tmp_path), models_of(study.preset)["cola-autoencoder"]
    model.train(short, tmp_path / "vae", **model.parameters)
    weights = read_model(tmp_path / "vae")[1]
    start = cola.start_words(study.encoder.word_embeddings, weights["kept"], study.sizes("cola")["width"])
    assert (weights["words.weight"] - start).abs().max() < .02 < start.std()


def test_the_first_words_of_cola_keep_distances():
    "On the first principal axes; dimensions beyond the encoder's are zero."
    matrix = torch.randn(50, 6, generator=torch.Generator().manual_seed(2)) * torch.arange(6, 0, -1) + 3
    kept = torch.arange(5, 45)
    for width in (6, 4, 8):
        found = cola.start_words(matrix, kept, width)
        ratio = torch.pdist(found) / torch.pdist(matrix[kept])
        assert found.shape == (40, width) and ratio.std() < (1e-4 if width > 5 else .1) * ratio.mean()
    started = cola.TextVAE(cola.ColaConfig(width=8, heads=2), kept, found)
    assert torch.equal(started.words.weight, found) and torch.equal(started.head.weight, found / 8 ** .5)


@pytest.mark.parametrize("name", ["klflow", "cola"])
def test_a_budget_curve(study, name):
    "Models with an eighth and half of the steps, at the first seed; the largest budget is the study's own model."
    names = [budget_name(name, times) for times in BUDGETS]
    assert names == [f"{name}-1of8", f"{name}-4of8", name]
    assert [models_of(study.preset)[one].first_seed for one in names] == [True, True, False]
    steps = [read_model(study.model(one))[0]["training"]["steps"] for one in names]
    whole = study.preset.training[name]["steps"]
    assert steps == [max(1, whole // 8), max(1, whole // 2), whole]
    assert set(names) <= set(models_for(study.preset, results()[name]))


def test_models_of_a_budget_curve_differ_in_training_alone(study):
    nets = [klflow.open_klflow(study, budget_name("klflow", times)).net for times in BUDGETS]
    assert nets[0].config == nets[-1].config and not torch.equal(nets[0].head.weight, nets[-1].head.weight)
    assert cola_study.open_cola(study, 1).nets["prior"].config == cola_study.open_cola(study).nets["prior"].config
