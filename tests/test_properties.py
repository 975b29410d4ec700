"What holds for any input: readers, presets, drafts and the alignment, on generated cases."
import contextlib
import json

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentrefine.command import main, printable
from latentrefine.core import CLS, PAD, SEP, StudyError, user_path
from latentrefine.drafts import CORRUPTIONS, MORE_CORRUPTIONS, clean_batch, keep_mask, pack, with_drafts
from latentrefine.evaluation import aligned_equal
from latentrefine.presets import Preset, load_preset
from latentrefine.realign import align, gaps_of
from latentrefine.stories import has_text, read_stories, repaired

settings.register_profile("seeded", derandomize=True, deadline=None, max_examples=60, database=None,
                          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
settings.load_profile("seeded")

ANY = st.text(st.characters(exclude_categories=[]), max_size=30)          # half characters and control characters among them
WORD = st.sampled_from(["Ann", "went", "out", "caf\u00e9", "&quot;", "[SEP]", "\u200b", '"', ",", "|", "<script>", "\x1b[31m", "\ud800", "a.b.", "\n"])
SENTENCE = st.lists(WORD, max_size=5).map(" ".join) | ANY
VALUE = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | SENTENCE, lambda x: st.lists(x, max_size=3) | st.dictionaries(ANY, x, max_size=3), max_leaves=8)


# Readers

def read(path):
    "The stories of a file, [] for a StudyError, which must name the file, in one line and with a remedy."
    try: return read_stories(path, skipped=[])
    except StudyError as error:
        assert str(path) in str(error) and "; " in str(error)
        return []


@given(st.lists(st.fixed_dictionaries({}, optional=dict(sentences=st.lists(SENTENCE | VALUE, min_size=4, max_size=6), story=SENTENCE | VALUE, storyid=VALUE)), max_size=3),
       st.binary(max_size=20), st.sampled_from([".jsonl", ".csv", ".txt", ".jsonl.gz"]))
@pytest.mark.filterwarnings("ignore:.*HTML entities")
def test_any_file_is_read_or_refused(tmp_path, records, more, ending):
    path = tmp_path / f"mine{ending}"
    path.write_bytes("".join(json.dumps(one) + "\n" for one in records).encode() + more)
    for story in read(path):
        assert len(story.sentences) == 5 and all(map(has_text, story.sentences)) and "[SEP]" not in story.text


@given(st.lists(st.lists(st.text("abc é,\"|'<&;", min_size=1).filter(has_text), min_size=5, max_size=5), min_size=1, max_size=3))
@pytest.mark.filterwarnings("ignore:.*HTML entities")
def test_what_is_written_is_read(tmp_path, stories):
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(dict(sentences=s)) + "\n" for s in stories))
    assert [list(story.sentences) for story in read(tmp_path / "s.jsonl")] == [[s.strip() for s in story] for story in stories]


@given(SENTENCE | st.text())
def test_plain_text_stays_as_it_is_and_nothing_moves_the_terminal(text):
    if text.isascii() and text.isprintable() and "&" not in text: assert repaired(text) == text
    assert not {ord(c) for c in printable(text)} & {27, 7, 0, 0xd800}


# Presets

@given(st.dictionaries(st.sampled_from(sorted(Preset.model_fields)) | ANY, VALUE, max_size=3))
def test_any_preset_is_checked_or_refused(tmp_path, fields):
    path = tmp_path / "mine.yaml"
    with contextlib.suppress(yaml.YAMLError, UnicodeEncodeError): path.write_text(yaml.safe_dump(dict(extends="quick") | fields))
    if not path.exists(): return
    try: preset = load_preset(str(path))
    except StudyError as error: assert "mine.yaml" in str(error) or "extends" in fields or "plugins" in fields
    else: assert preset.seeds >= 1 and preset.limit >= 10 and 0 <= max(preset.dropouts) < 1


@given(st.sampled_from(["limit", "training.prior.lr", "sizes.prior", "widths", "colour", "plugins", "a..b", ""]), VALUE.map(json.dumps) | ANY)
def test_any_override_is_checked_or_refused(place, value):
    with contextlib.suppress(StudyError): load_preset("quick", [f"{place}={value}"])


OPTIONS = ("--preset", "--stories", "--out", "--drafts", "--write", "--html", "--references", "--system", "--prompt", "--draft", "--text", "--seed",
           "--limit", "--dropout", "--seeds", "--cores")


@given(st.sampled_from(["tables", "refine", "evaluate", "plan"]), st.lists(st.tuples(st.sampled_from(OPTIONS), ANY | st.integers().map(str)), min_size=1, max_size=3))
@settings(max_examples=25)
def test_no_traceback_from_any_command_line(tmp_path, monkeypatch, capsys, command, options):
    "Without a study there is nothing to do; whatever the options, the exit code is 2 and the message is safe for a terminal."
    monkeypatch.chdir(tmp_path)
    words = [word for option in options for word in option] + (["--out", str(tmp_path / "none")] if command != "plan" else ["nonode"])
    try: code = main([command, *words])
    except SystemExit as error: code = error.code
    said = capsys.readouterr()
    assert code == 2 and "error: " in said.err and "Traceback" not in said.err and "\x1b" not in said.err, (command, options, said.err)


@given(ANY | st.text(min_size=200, max_size=300))
def test_a_path_is_one_that_a_file_can_have_or_refused(text):
    try: path = user_path(text)
    except StudyError: return
    assert isinstance(path.exists(), bool)


# Drafts and the alignment

@st.composite
def targets(draw):
    "A batch of targets with [SEP] behind up to 31 tokens."
    rows = draw(st.lists(st.lists(st.integers(1000, 1050), min_size=1, max_size=31), min_size=1, max_size=4))
    ids = torch.tensor([[*row, SEP, *[PAD] * (31 - len(row))] for row in rows])
    mask = torch.tensor([[i <= len(row) for i in range(32)] for row in rows])
    return clean_batch(torch.full((len(rows), 32), CLS), torch.ones(len(rows), 32, dtype=torch.bool), ids, mask)


@given(targets(), st.floats(0, 1), st.sampled_from(sorted(CORRUPTIONS | MORE_CORRUPTIONS)), st.integers(0, 2 ** 31))
def test_any_draft_is_a_text_in_slots(batch, dropout, corruption, seed):
    continues = torch.zeros(30_522, dtype=torch.bool)
    drafts = [with_drafts(batch, dropout, torch.Generator().manual_seed(seed), corruption, continues) for _ in range(2)]
    ids, mask = drafts[0].draft_ids, drafts[0].draft_mask
    assert torch.equal(ids, drafts[1].draft_ids) and ids.shape == (len(batch), 32) and ids.dtype == torch.int64
    assert torch.equal(mask, mask.long().cummin(1).values.bool()) and (ids[~mask] == PAD).all()       # tokens first, then padding
    assert torch.equal(drafts[0].target_ids, batch.target_ids) and mask.any(1).all()


@given(targets(), st.floats(0, 1), st.integers(0, 2 ** 31))
def test_gaps_put_every_token_back_where_it_was(batch, dropout, seed):
    keep = keep_mask(batch.target_ids, batch.target_mask, dropout, torch.Generator().manual_seed(seed))
    ids, mask = pack(batch.target_ids, keep)
    gaps = gaps_of(keep, batch.target_mask)
    assert torch.equal(gaps.sum(1) + mask.sum(1), batch.target_mask.sum(1)) and (gaps >= 0).all()
    for row in range(len(ids)):
        place = gaps[row].cumsum(0)[:32] + torch.arange(32)
        assert torch.equal(batch.target_ids[row][place[mask[row]]], ids[row][mask[row]])


@given(targets(), st.booleans(), st.booleans(), st.integers(0, 2 ** 31))
def test_every_target_slot_has_one_source(batch, given_length, edited, seed):
    "The probabilities of its sources sum to 1 before the target's end, and to 0 behind it."
    gen = torch.Generator().manual_seed(seed)
    ids, mask = pack(batch.target_ids, keep_mask(batch.target_ids, batch.target_mask, .3, gen))
    ended, length = ((ids == SEP) & mask).any(1), batch.target_mask.sum(1)
    gaps = torch.randn(len(ids), 33, 4, generator=gen).log_softmax(-1)
    edits = torch.randn(len(ids), 32, 3, generator=gen).log_softmax(-1) if edited else None
    found = align(gaps, mask, ended, length * given_length, edits)
    assert found.within.max() < 1 + 1e-4 and found.reads.min() >= 0 and found.fills.min() >= 0
    assert (found.within.diff(dim=1) < 1e-4).all()                        # the target ends once
    reachable = length <= mask.sum(1) + 3 * (mask.sum(1) + (~ended))
    if given_length: assert torch.allclose(found.within[reachable].sum(1), length[reachable].float(), atol=1e-3)


@given(st.lists(st.integers(0, 5), max_size=12), st.lists(st.integers(0, 5), max_size=12))
def test_aligned_tokens_are_a_common_subsequence(a, b):
    assert 0 <= aligned_equal(a, b) <= min(len(a), len(b)) and aligned_equal(a, a) == len(a)
    assert aligned_equal(a, a + b) == len(a)
