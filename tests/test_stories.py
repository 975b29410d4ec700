"What the readers take and refuse, and that near-duplicates never cross the split."
import csv
import gzip
import io
import json
import os
import random
import re

import pytest
import torch

from latentrefine.core import CLS, SEP, StudyError
from latentrefine.stories import (Story, describe, duplicate_groups, embedded_stories, from_slots, near_duplicate,
                                  read_stories, shingle_ids, slot_stories, split_sentences, split_stories,
                                  to_slots, words)

HEADER = "storyid,storytitle,sentence1,sentence2,sentence3,sentence4,sentence5"
TWO = [("Ana lost a glove.", "It was warm, and \"new\".", "She walked back.", "A dog had it.", "She laughed."),
       ("Zoë ran.", "He fell.", "It hurt.", "He cried.", "He slept.")]


def as_csv(stories):
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(HEADER.split(","))
    for number, story in enumerate(stories): rows.writerow([f"id{number}", "T", *story])
    return text.getvalue()


def as_json(shape): return "".join(json.dumps(shape(s), ensure_ascii=False) + "\n" for s in TWO)


GOOD = {
    "s.csv": as_csv(TWO), "S.CSV": as_csv(TWO),
    "s.jsonl": as_json(lambda s: {"sentences": s}),
    "s.json": as_json(lambda s: {f"sentence{i}": x for i, x in enumerate(s, 1)}),
    "story.jsonl": as_json(lambda s: {"story": " ".join(s)}),
    "text.jsonl": as_json(lambda s: {"text": " ".join(s)}),
    "s.txt": "".join(" ".join(s) + "\n" for s in TWO),
}


@pytest.mark.parametrize("change", [lambda b: b, lambda b: b.replace(b"\n", b"\r\n"), lambda b: b"\xef\xbb\xbf" + b,
                                    lambda b: b.rstrip(b"\n"), lambda b: b + b"\n\n"],
                         ids=["plain", "crlf", "bom", "no last newline", "blank lines"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "gz"])
@pytest.mark.parametrize("name", GOOD)
def test_good_input(tmp_path, name, packed, change):
    content = change(GOOD[name].encode())
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    assert [s.sentences for s in read_stories(path)] == TWO
    assert [s.sentences for s in read_stories(str(path), limit=1)] == TWO[:1]


def test_keys_and_a_sentence_over_two_lines(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text(as_csv([("A\nb.", *TWO[0][1:]), TWO[1]]), encoding="utf-8")
    assert [s.key for s in read_stories(path)] == ["id0", "id1"]
    (tmp_path / "s.txt").write_text(GOOD["s.txt"], encoding="utf-8")
    (tmp_path / "t.txt").write_text("\n".join(reversed(GOOD["s.txt"].splitlines())), encoding="utf-8")
    forward, backward = read_stories(tmp_path / "s.txt"), read_stories(tmp_path / "t.txt")
    assert forward == backward[::-1] and forward[0].key != forward[1].key


def row(*fields): return f"{HEADER}\n" + as_csv(TWO[:1]).split("\n", 1)[1] + ",".join(fields) + "\n"


BAD = [  # file, content, words the message must hold
    ("empty.csv", b"", ["no story"]),
    ("empty.txt", b"\n \n", ["no story"]),
    ("empty.jsonl.gz", gzip.compress(b""), ["no story"]),
    ("zero.csv.gz", b"", ["no story"]),
    ("header.csv", HEADER.encode(), ["no story"]),
    ("columns.csv", b"id,sentence1,sentence2,sentence3\n1,A.,B.,C.\n", ["line 1", "sentence4, sentence5", "found: id"]),
    ("twice.csv", HEADER.replace("storytitle", "sentence1").encode(), ["line 1", "once", "sentence1"]),
    ("semicolon.csv", HEADER.replace(",", ";").encode(), ["line 1", "commas"]),
    ("six.csv", f"{HEADER},sentence6\n1,T,A.,B.,C.,D.,E.,F.\n".encode(), ["line 2", "sentence6", "five"]),
    ("few.csv", row("1", "T", "A.", "B.").encode(), ["line 3", "4 fields instead of 7"]),
    ("many.csv", row("1", "T", "A.", "B.", "C.", "D.", "E.", "F.").encode(), ["line 3", "8 fields", "quotation marks"]),
    ("field.csv", row("1", "T", "A.", "B.", " ", "D.", "E.").encode(), ["line 3", "sentence3 is empty", "remove"]),
    ("quote.csv", row("1", "T", '"A.', "B.", "C.", "D.", "E.").encode(), ["line 3", "quotation mark"]),
    ("mac.csv", as_csv(TWO).replace("\n", "\r").encode(), ["line 1", "CRLF"]),
    ("latin.csv", row("1", "T", "Zoë.", "B.", "C.", "D.", "E.").encode("latin-1"), ["line 3", "UTF-8", "0xeb"]),
    ("utf16.txt", "A cat.".encode("utf-16"), ["line 1", "UTF-8"]),
    ("cut.csv.gz", gzip.compress(as_csv(TWO).encode())[:-9], ["gzip", "fetch it again"]),
    ("damaged.csv.gz", gzip.compress(as_csv(TWO).encode())[:30] + b"\0" * 40, ["gzip", "fetch it again"]),
    ("plain.csv.gz", as_csv(TWO).encode(), ["gzip"]),
    ("four.jsonl", b'{"sentences": ["A.", "B.", "C.", "D."]}', ["line 1", "4 sentences"]),
    ("six.jsonl", b'{"sentences": ["A.", "B.", "C.", "D.", "E.", "F."]}', ["line 1", "6 sentences"]),
    ("lacks.jsonl", b'{"sentence1": "A.", "sentence2": "B."}', ["line 1", "sentence3, sentence4, sentence5"]),
    ("number.jsonl", b'{"sentences": ["A.", "B.", 3, "D.", "E."]}', ["line 1", "sentence3 is not text"]),
    ("null.jsonl", b'{"text": null}', ["line 1", "NoneType"]),
    ("string.jsonl", b'{"sentences": "A. B. C. D. E."}', ["line 1", "holds str"]),
    ("fields.jsonl", b'{"title": "A.", "body": "B."}', ["line 1", "title, body", "sentences"]),
    ("nothing.jsonl", b"{}", ["line 1", "no fields"]),
    ("half.jsonl", b'{"sentences": ["\\ud800.", "B.", "C.", "D.", "E."]}', ["line 1", "half a character"]),
    ("broken.jsonl", GOOD["s.jsonl"].encode() + b'{"sentences": [', ["line 3", "not JSON", "one JSON object a line"]),
    ("deep.jsonl", b"[" * 200_000, ["line 1", "not JSON"]),
    ("list.json", b'[\n{"text": "A."}]', ["line 1", "one JSON object a line"]),
    ("array.json", b'["A.", "B."]', ["line 1", "a JSON list"]),
    ("four.txt", b"A cat. A dog. A cow. A pig.\n", ["line 1", "4 sentences"]),
    ("one.txt", GOOD["s.txt"].encode() + b"A cat", ["line 3", "1 sentence instead"]),
    ("book.docx", b"PK", ["unknown kind", ".csv"]),
    ("book.gz", b"PK", ["unknown kind", ".csv"]),
    ("noending", b"A.", ["unknown kind"]),
]


@pytest.mark.parametrize("name, content, said", BAD, ids=[b[0] for b in BAD])
def test_bad_input(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(StudyError) as error: read_stories(path)
    message = str(error.value)
    assert message.startswith(str(path)) and all(part in message for part in said) and "\n" not in message
    assert re.search(r"; \w", message), "no remedy"


def test_bad_places(tmp_path):
    for source, said in ((tmp_path, "folder"), (tmp_path / "none.csv", "no such file"), (tmp_path / ("x" * 300 + ".csv"), "no such file"), ("", "folder")):
        with pytest.raises(StudyError, match=said): read_stories(source)
    for limit in (0, -3, 1.5, "ten"):
        with pytest.raises(StudyError, match="limit"): read_stories("embedded", limit)


def test_one_bad_row_stops_the_reading_unless_it_lies_behind_the_limit(tmp_path):
    path = tmp_path / "s.txt"
    path.write_text(GOOD["s.txt"] + "A cat.\n", encoding="utf-8")
    assert len(read_stories(path, limit=2)) == 2
    with pytest.raises(StudyError, match="line 3"): read_stories(path)


@pytest.mark.parametrize("name, content, said", BAD, ids=[b[0] for b in BAD])
def test_a_list_collects_bad_rows_but_no_bad_file(tmp_path, name, content, said):
    path, skipped, whole = tmp_path / name, [], None
    path.write_bytes(content)
    with pytest.raises(StudyError) as strict: read_stories(path)
    try: stories = read_stories(path, skipped=skipped)
    except StudyError as error: stories, whole = [], str(error)
    if skipped: assert skipped[0] == str(strict.value) and (stories or "no story" in whole)
    else: assert whole == str(strict.value) and not stories


def test_bad_rows_between_good_ones(tmp_path):
    path, skipped, (first, second) = tmp_path / "s.txt", [], GOOD["s.txt"].splitlines()
    path.write_text(f"{first}\nA cat.\n\n{second}\nA dog. A cow.\n", encoding="utf-8")
    assert [story.sentences for story in read_stories(path, skipped=skipped)] == TWO
    assert [re.search(r"line (\d+)", message)[1] for message in skipped] == ["2", "5"]
    assert len(read_stories(path, 2, skipped=[])) == 2 and len(read_stories(path, 1, skipped=[])) == 1


def test_hub(monkeypatch):
    import datasets
    def offline(*args): raise ConnectionError("no route")
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(StudyError, match="cannot be reached.*official ROCStories CSV.*embedded"): read_stories("rocstories")
    rows = [{"text": " ".join(TWO[0])}, {"text": "No stop Here at all"}, {f"sentence{i}": s for i, s in enumerate(TWO[1], 1)}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": rows})
    with pytest.warns(UserWarning, match="1 texts .* left out"): stories = read_stories("rocstories")
    assert [s.sentences for s in stories] == TWO
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": [{"body": "x"}]})
    with pytest.raises(StudyError, match="train, row 1"): read_stories("rocstories")


NUMBERS = {}


def shingles(story): return shingle_ids(words(story), NUMBERS)


def retold(story, number):
    "The story with its last word replaced."
    return Story(f"retold{number}", (*story.sentences[:4], story.sentences[4].rsplit(" ", 1)[0] + " something."))


def test_split_is_of_the_stories_not_of_their_order():
    stories = embedded_stories(600, seed=5)
    stories += [retold(s, i) for i, s in enumerate(stories[:60])] + stories[:5]
    split = split_stories(stories)
    for seed in range(3): assert split_stories(random.Random(seed).sample(stories, len(stories))) == split
    assert sum(map(len, split.values())) == len(stories)
    assert .72 < len(split["train"]) / len(stories) < .88 and len(split["validation"]) > 30 and len(split["test"]) > 30


def test_near_duplicates_do_not_cross():
    stories = embedded_stories(600, seed=6)
    stories += [retold(s, i) for i, s in enumerate(stories[:200])]
    stories += [Story("loud", tuple(s.upper().replace(".", "!") for s in stories[7].sentences)), stories[3]]
    place = {name: [shingles(s) for s in part] for name, part in split_stories(stories).items()}
    pairs = [(a, b) for a, b in (("train", "validation"), ("train", "test"), ("validation", "test"))]
    assert not any(near_duplicate(x, y) for a, b in pairs for x in place[a] for y in place[b])
    group = duplicate_groups(stories)
    assert all(group[i] == group[600 + i] for i in range(200)) and group[7] == group[800] and group[3] == group[801]
    assert len(set(group)) > 560


def test_a_chain_is_one_group():
    text = embedded_stories(1)[0].text.replace(".", "").split()
    chain = []
    for i in range(8):  # each differs from the one before by a word or two
        text = text[2:] + [f"new{i}", f"word{i}"]
        chain.append(Story(str(i), (" ".join(text[:9]), *text[9:12], " ".join(text[12:]))))
    assert not near_duplicate(shingles(chain[0]), shingles(chain[-1])) and len(set(duplicate_groups(chain))) == 1


class Letters:
    "A tokenizer of one piece a letter."
    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[1000 + ord(c) for c in t] for t in texts]}

    def decode(self, ids, skip_special_tokens): return "".join(chr(i - 1000) for i in ids if i >= 1000)


@pytest.mark.parametrize("length", [1, 29, 30, 31, 32, 33, 90])
def test_slots(length):
    p, pm, t, tm, truncated = to_slots(["x" * length] * 2, ["y" * length] * 2, Letters())
    assert p.shape == t.shape == pm.shape == tm.shape == (2, 32) and p.dtype == t.dtype == torch.int64 and pm.dtype == tm.dtype == torch.bool
    assert pm[0].sum() == min(length, 30) + 2 and p[0, 0] == CLS and p[0, pm[0].sum() - 1] == SEP
    assert tm[0].sum() == min(length + 1, 32) and truncated.tolist() == [length > 31] * 2
    assert from_slots(t, Letters()) == ["y" * min(length, 32)] * 2


def test_describe():
    a, b = (Story(k, ("p.", "q.", *end)) for k, end in (("a", ("r.", "s.", "t.")), ("b", ("u" * 40 + ".", "v.", "w."))))
    facts = describe([a, a, b], Letters())
    assert (facts["stories"], facts["distinct_stories"], facts["vocabulary"]) == (3, 2, 10)
    assert facts["targets_repeated"] == pytest.approx(2 / 3) and facts["targets_truncated"] == pytest.approx(1 / 3)
    assert facts["mean_target_slots"] == pytest.approx((9 + 9 + 32) / 3) and facts["prompts_truncated"] == 0
    assert describe([], Letters())["stories"] == 0 and slot_stories([a], Letters())[2].shape == (1, 32)


def test_embedded_stories_can_be_cut_again():
    for story in embedded_stories(300, seed=9): assert tuple(split_sentences(story.text)) == story.sentences


@pytest.mark.skipif("LATENTREFINE_ROCSTORIES" not in os.environ, reason="LATENTREFINE_ROCSTORIES names no ROCStories CSV")
def test_official_file():
    stories = read_stories(os.environ["LATENTREFINE_ROCSTORIES"])
    assert len(stories) > 40_000 and len({s.key for s in stories}) == len(stories)
    assert .79 < len(split_stories(stories)["train"]) / len(stories) < .81
