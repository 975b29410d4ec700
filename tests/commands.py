"What several test files need to call the command line and to make its input."
import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import yaml

from latentrefine.command import main

PROVENANCE = ("notebook", "preset", "seconds", "commit", "versions", "hardware")


def call(*words):
    "Exit code, stdout and stderr of a call in this process."
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err): code = main([str(w) for w in words])
    return code, out.getvalue(), err.getvalue()


def refused(*words, says=()):
    "The message of a call that must end with code 2, one error, and no traceback."
    code, out, err = call(*words)
    lines = [line for line in err.splitlines() if "latentrefine: error:" in line]
    assert code == 2, (code, out, err)
    assert len(lines) == 1 and "Traceback" not in out + err, err
    # the folder of a test bears its name: not to be taken for a word of the message
    bare = re.sub(r"\S*/pytest-of-[^/]+/pytest-\d+/[^/\s]*", "", err)
    for word in says: assert str(word) in (err if isinstance(word, Path) else bare), (word, err)
    return err


def write_preset(path, base, **change):
    "A copy of the preset `base` with top-level fields changed."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**yaml.safe_load(Path(base).read_text()), **change}, sort_keys=False))
    return path


def as_file(path, stories):
    "Stories as a file of JSON lines."
    path.write_text("".join(json.dumps(dict(sentences=story.sentences)) + "\n" for story in stories))
    return path


def as_lines(path, records):
    "Records as a file of JSON lines; a text stands as it is."
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def files_of(out):
    "Modification times of everything a run makes, logs aside."
    return {p.relative_to(out).as_posix(): p.stat().st_mtime_ns for p in out.rglob("*")
            if p.is_file() and p.relative_to(out).parts[0] not in ("logs", ".snakemake")}
