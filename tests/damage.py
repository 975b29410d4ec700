"Seeded damage to the files of a finished study, and what must become of each: refused by name, made again, or the same."
import json
import os
import random
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from latentrefine.core import StudyError
from latentrefine.encoder import clean_hidden, load_encoder
from latentrefine.measure import recorded_digest
from latentrefine.notebooks import stale_because
from latentrefine.reproduce import nodes
from latentrefine.study import TRAINED_ON, kept_batches, trained_on
from latentrefine.training import read_model, read_state

EDITS = int(os.environ.get("LATENTREFINE_EDITS", 600))      # 2,000 for a long run
RARE = ("encoder", "states")      # kinds whose check takes a tenth of a second: one edit in twenty


def flip(data, rng):
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1:]


def cut(data, rng): return data[:rng.randrange(len(data))]
def lengthen(data, rng): return data + rng.randbytes(rng.randrange(1, 40))
def empty(data, rng): return b""


def lose(data, rng):
    place = rng.randrange(len(data))
    return data[:place] + data[place + rng.randrange(1, 30):]


def clear(data, rng):
    place, size = rng.randrange(len(data)), rng.randrange(1, 5000)
    return data[:place] + bytes(len(data[place:place + size])) + data[place + size:]


def edit(data, rng):
    "Another digit or letter in place of one: the file stays readable."
    places = [i for i in (rng.randrange(len(data)) for _ in range(200)) if chr(data[i]).isascii() and chr(data[i]).isalnum()]
    if not places: return flip(data, rng)
    old = chr(data[places[0]])
    new = rng.choice([c for c in ("0123456789" if old.isdigit() else "abcdefgh") if c != old])
    return data[:places[0]] + new.encode() + data[places[0] + 1:]


def values(data, rng):
    "JSON with one value replaced, where the file is JSON."
    try: held = json.loads(data)
    except ValueError: return edit(data, rng)
    one = held[rng.randrange(len(held))] if isinstance(held, list) and held and isinstance(held[0], dict) else held
    if not isinstance(one, dict) or not one: return rng.choice((b"[]", b"null", b"{}", b"7"))
    one[rng.choice(sorted(one))] = rng.choice((None, [], {}, -1, 10 ** 30, "x", float("nan")))
    return json.dumps(held).encode()


WAYS = (flip, cut, lengthen, empty, lose, clear, edit, values)


@contextmanager
def damaged(path, data):
    "The file with other bytes, afterwards what it was, time of change included."
    whole, told = path.read_bytes(), path.stat()
    path.write_bytes(data)
    try: yield
    finally:
        path.write_bytes(whole)
        os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))


def equal(a, b):
    "Whether two results are bit-identical."
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray): return a.shape == b.shape and np.array_equal(a, b)
    if isinstance(a, dict): return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


class Files:
    "The files of a finished study by kind, and how each kind is read."
    def __init__(self, study, encoder, state=None):
        self.study, self.encoder, self.state = study, Path(encoder), state
        self.graph = nodes(study)
        made = {name: node for node in self.graph.values() for name in node.products}
        self.maker = {study.out / name: node for name, node in made.items()}
        self.maker = {path: node for path, node in self.maker.items() if path.is_file()}
        for node in self.graph.values():
            answers = [study.out / name for name in node.products if name.startswith("answers/")]
            figures = [name for path in answers if path.is_file() for name, _ in json.loads(path.read_text())["figures"]]
            self.maker.update({study.out / f"figures/{name}.png": node for name in figures})
        models = [path.parent for path in self.maker if path.name == "model.safetensors" and path.parent != self.encoder]
        self.digest = study.encoder.digest[:10]
        kinds = dict(model=[folder / name for folder in models for name in ("config.json", "model.safetensors")],
                     product=[path for path in self.maker if path.parent.name not in ("models", "states")],
                     rows=[path for path in self.maker if path.parent.name == "tables" and path.suffix in (".json", ".csv")],
                     note=[study.out / TRAINED_ON], slots=[study.out / "models/states/slots.safetensors"],
                     states=[*study.out.glob(f"models/states/hidden-{self.digest}*.npy")], mark=[*study.out.glob("logs/*.done")],
                     state=[state] if state else [],
                     encoder=[path for path in self.encoder.iterdir() if path.suffix in (".json", ".txt", ".safetensors")])
        self.kinds = {kind: sorted(filter(Path.is_file, paths)) for kind, paths in kinds.items() if paths}
        assert len(self.kinds) >= 8, self.kinds.keys()

    def stale(self, node): return stale_because(self.study.out, node.done, node.key)

    def read(self, kind, path):
        "What the program reads from a file, a function's value; StudyError if it refuses it."
        if kind == "model": return read_model(path.parent)
        if kind == "note": return trained_on(self.study)
        if kind == "slots": return (batches := kept_batches(self.study)) and [vars(batch) for batch in batches.values()]
        if kind == "states": return np.array(clean_hidden(self.study.encoder, self.of_states(path), path.parent))
        if kind == "state": return read_state(path)
        if kind == "rows": return recorded_digest(path.with_suffix(".json"))
        if kind == "mark": return self.stale(self.graph[path.name.removesuffix(".done")])
        if kind == "encoder": return (encoder := load_encoder(str(self.encoder))).digest, encoder.name
        return None

    def of_states(self, path):
        "The split whose states a file holds."
        from latentrefine.encoder import data_digest
        return next(b for b in self.study.batches.values() if data_digest(b)[:10] in path.name)

    def check(self, kind, path, data, before):
        "Damage a file and say what became of it; AssertionError if it was taken for what it is not."
        with damaged(path, data):
            if path in self.maker and self.maker[path].products: assert self.stale(self.maker[path]), "the node is not due"
            try: found = self.read(kind, path)
            except StudyError as error:
                names = (str(path), str(path.parent), path.parent.name, str(self.encoder))
                assert any(name in str(error) for name in names) and ";" in str(error), f"not named: {error}"
                return "refused"
            if kind == "product" or kind in ("slots", "state", "rows") and found is None: return "made again"
            if kind == "mark" and found: return "made again"
            if kind == "encoder" and found[0] != before[0]: return "refused"     # models name the encoder's digest
            assert equal(found, before), f"another result: {found} for {before}" if kind != "states" else "other states"
            return "the same"


def campaign(files, edits=EDITS, seed=0):
    "Damage files in `edits` ways; returns what became of them by kind, and the faults found, a text each."
    rng, told, faults = random.Random(seed), {}, []
    before = {}
    common = [kind for kind in files.kinds if kind not in RARE]
    for number in range(edits):
        kind = rng.choice([kind for kind in files.kinds if kind in RARE]) if number % 20 == 0 else rng.choice(common)
        path, way = rng.choice(files.kinds[kind]), rng.choice(WAYS)
        whole = path.read_bytes()
        data = way(whole, rng)
        if data == whole: continue
        if (kind, path) not in before: before[kind, path] = files.read(kind, path)
        try: became = files.check(kind, path, data, before[kind, path])
        except Exception as error: faults.append(f"edit {number}: {way.__name__} of {path.name} ({kind}): {type(error).__name__} {error}")
        else: told.setdefault(kind, set()).add(became)
    return told, faults
