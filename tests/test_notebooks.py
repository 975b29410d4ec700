"Every library notebook runs from top to bottom, and every notebook is fit to be kept under version control."
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALL = {p.relative_to(ROOT / "nbs").as_posix(): p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts}
LIBRARY = [name for name, path in ALL.items() if not (path.parent / ".notest").exists()]
EXPERIMENTS = [name for name in ALL if name.startswith("experiments/")]
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|Users|work|private|var/folders)/|\b[A-Z]:\\Users\\")


def read(name): return json.loads(ALL[name].read_text(encoding="utf-8"))


def texts(cell):
    "The source of a cell and whatever its outputs show as text."
    yield "".join(cell["source"])
    for output in cell.get("outputs", []):
        yield "".join(output.get("text", ""))
        yield from ("".join(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/") or kind == "image/svg+xml")


@pytest.mark.parametrize("name", LIBRARY)
def test_runs(name):
    code = "import sys; from nbdev.test import nbdev_test; nbdev_test(sys.argv[1], n_workers=0, do_print=True)"
    run = subprocess.run([sys.executable, "-c", code, str(ALL[name])], cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, "MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": ""})
    assert run.returncode == 0 and run.stdout.count("- Completed") == 1, (run.stdout + run.stderr)[-6000:]


@pytest.mark.parametrize("name", ALL)
def test_is_tidy(name):
    notebook = read(name)
    cells = notebook["cells"]
    assert notebook["metadata"].get("kernelspec", {}).get("name") == "python3", "the kernel must be python3, which everybody has"
    assert [c.get("id") for c in cells] == [f"c{i:02d}" for i in range(len(cells))], "cell ids must be c00, c01, ...: exported files quote them"
    for cell in cells:
        assert not [o for o in cell.get("outputs", []) if o["output_type"] == "error"], f"{cell['id']}: an error is kept as output"
        places = [MACHINE_PATH.search(text) for text in texts(cell)]
        assert not any(places), f"{cell['id']}: names a place on one machine: {next(p[0] for p in places if p)}"


@pytest.mark.parametrize("name", LIBRARY)
def test_is_small(name):
    assert len(read(name)["cells"]) <= 60, "more than 60 cells: split the notebook"
    assert ALL[name].stat().st_size <= 200_000, f"{ALL[name].stat().st_size / 1000:.0f} kB, 200 allowed: show smaller plots"


def literals(source):
    "The values that a cell of plain assignments of literals sets, by name."
    values = {}
    for line in ast.parse(source).body:
        target = line.targets[0] if isinstance(line, ast.Assign) and len(line.targets) == 1 else getattr(line, "target", None)
        assert isinstance(line, (ast.Assign, ast.AnnAssign)) and isinstance(target, ast.Name), f"not an assignment to one name: {ast.unparse(line)}"
        try: values[target.id] = ast.literal_eval(line.value)
        except (ValueError, TypeError): raise AssertionError(f"not a literal: {ast.unparse(line)}") from None
    return values


def test_literals():
    assert literals('preset = "quick"  # why\nseed: int = -1\nrates = [0, .1]') == {"preset": "quick", "seed": -1, "rates": [0, .1]}
    for wrong in ("import os", "a = b", "a = b = 1", "a, b = 1, 2", "a = 1 + 1", "a: int", "a += 1", "print(1)"):
        with pytest.raises(AssertionError): literals(wrong)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_parameters(name):
    tagged = ["".join(c["source"]) for c in read(name)["cells"] if "parameters" in c.get("metadata", {}).get("tags", [])]
    assert len(tagged) == 1, f"{len(tagged)} cells are tagged parameters; one is needed"
    assert {"preset", "seed"} <= literals(tagged[0]).keys()
