"Every library notebook and every guide runs from top to bottom, and every notebook is fit to be read and to be kept under version control."
import ast
import json
import re
import shutil
from pathlib import Path

import papermill
import pytest
import yaml
from chapters import run_chapter

from latentrefine.notebooks import run_notebook

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
ALL = {p.relative_to(NBS).as_posix(): p for p in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts}
LIBRARY = [name for name, path in ALL.items() if not (path.parent / ".notest").exists() and name != "train.ipynb"]
RESULTS = [name for name in ALL if name.startswith("results/")]
GUIDES = [name for name in ALL if name.startswith("guides/")]
LISTED = yaml.safe_load((NBS / "results" / "results.yaml").read_text(encoding="utf-8"))
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|Users|work|private|var/folders)/|\b[A-Z]:\\Users\\")
ADDRESS = re.compile(r" at 0x[0-9a-f]{6}")
COLUMNS, LINES, F_STRING = 110, 25, 300

TOO_LARGE = set()      # notebooks that may have longer or wider cells: empty, and it stays so


def read(name): return json.loads(ALL[name].read_text(encoding="utf-8"))


def code_cells(name):
    "(id, source) of the code cells of a notebook, lines for IPython left empty."
    cells = [cell for cell in read(name)["cells"] if cell["cell_type"] == "code"]
    return [(cell.get("id"), re.sub(r"^[%!].*$", "", "".join(cell["source"]), flags=re.M)) for cell in cells]


def texts(cell):
    "The source of a cell and whatever its outputs show as text."
    yield "".join(cell["source"])
    for output in cell.get("outputs", []):
        yield "".join(output.get("text", ""))
        shown = output.get("data", {}).items()
        yield from ("".join(value) for kind, value in shown if kind.startswith("text/") or kind == "image/svg+xml")


def tagged(name):
    "Sources of the cells tagged `parameters`."
    return ["".join(c["source"]) for c in read(name)["cells"] if "parameters" in c.get("metadata", {}).get("tags", [])]


# Running

@pytest.mark.parametrize("name", [name for name in LIBRARY if "/" not in name])
def test_runs(name):      # those of systems and baselines run in test_chapters.py, on another core
    done, said = run_chapter(ALL[name])
    assert done, said[-6000:]


@pytest.fixture(scope="module")
def guided(trained, tmp_path_factory):
    "A copy of the trained study, into which guides may write."
    out = tmp_path_factory.mktemp("guides") / "out"
    shutil.copytree(trained.out, out)
    return out


@pytest.mark.parametrize("name", GUIDES)
def test_guide_runs(guided, tiny_preset, tmp_path, name):
    given = dict(preset=tiny_preset, out=str(guided))
    known = papermill.inspect_notebook(str(ALL[name])).keys() if tagged(name) else ()
    run_notebook(name, {key: given[key] for key in given if key in known}, tmp_path / "guide.ipynb", tmp_path / "log.ipynb")


# Form

@pytest.mark.parametrize("name", ALL)
def test_is_tidy(name):
    notebook = read(name)
    cells = notebook["cells"]
    assert notebook["metadata"].get("kernelspec", {}).get("name") == "python3", "the kernel must be python3, which everybody has"
    ids = [c.get("id") for c in cells]
    assert ids == [f"c{i:02d}" for i in range(len(cells))], "cell ids must be c00, c01, ...: exported files quote them"
    for cell in cells:
        assert not [o for o in cell.get("outputs", []) if o["output_type"] == "error"], f"{cell['id']}: an error is kept as output"
        places = [MACHINE_PATH.search(text) for text in texts(cell)]
        assert not any(places), f"{cell['id']}: names a place on one machine: {next(p[0] for p in places if p)}"
        assert not any(ADDRESS.search(text) for text in texts(cell)), f"{cell['id']}: shows the address of an object"


@pytest.mark.parametrize("name", LIBRARY)
def test_is_small(name):
    assert len(read(name)["cells"]) <= 60, "more than 60 cells: split the notebook"
    size = ALL[name].stat().st_size
    assert size <= 200_000, f"{size / 1000:.0f} kB, 200 allowed: show smaller plots"


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_is_short(name): assert len(read(name)["cells"]) <= 15


def problems(place, source):
    "What is too long or too wide in the source of a cell."
    lines = source.splitlines()
    if len(lines) > LINES: yield f"{place}: {len(lines)} lines"
    yield from (f"{place}, line {n}: {len(line)} columns" for n, line in enumerate(lines, 1) if len(line) > COLUMNS)
    for node in ast.walk(ast.parse(source)):
        length = len(ast.get_source_segment(source, node) or "") if isinstance(node, ast.JoinedStr) else 0
        if length > F_STRING: yield f"{place}: an f-string of {length} characters"


def too_large(name):
    "The problems of all code cells of a notebook."
    for cell in code_cells(name): yield from problems(*cell)


@pytest.mark.parametrize("name", [name for name in ALL if name not in TOO_LARGE])
def test_cells_are_short(name): assert not list(too_large(name))


def test_the_list_of_what_is_too_large_only_shrinks():
    fits = sorted(name for name in TOO_LARGE if name not in ALL or not list(too_large(name)))
    assert not fits, "take these out of TOO_LARGE"
    source = 'x = f"' + "{a}" * 120 + '"'
    assert [kind for kind in ("columns", "f-string") if any(kind in found for found in problems("c00", source))] == ["columns", "f-string"]
    assert list(problems("c00", "a = 1\n" * 26)) == ["c00: 26 lines"] and not list(problems("c00", "a = 1\n" * 25))


def shape(source):
    "Python source as a syntax tree with names, strings and numbers left out."
    dump = ast.dump(ast.parse(source))
    dump = re.sub(r"(id|attr|name|arg|module|asname)='[^']*'", r"\1=''", dump)
    return re.sub(r"Constant\(value=(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[^(),]+)", "Constant(value=", dump)


def test_no_two_notebooks_differ_only_in_names():
    assert shape("a = f(1, 'x')\nb.c = a") == shape("z = g(2.5, \"it's\")\ny.d = z") != shape("a = f(1)\nb.c = a")
    found = {}
    for name in ALL: found.setdefault(shape("\n".join(source for _, source in code_cells(name))), []).append(name)
    alike = [names for names in found.values() if len(names) > 1]
    assert not alike, "make one notebook of these, with a parameter"


# Parameters

def literals(source):
    "The values that a cell of plain assignments of literals sets, by name."
    values = {}
    for line in ast.parse(source).body:
        target = line.targets[0] if isinstance(line, ast.Assign) and len(line.targets) == 1 else getattr(line, "target", None)
        plain = isinstance(line, (ast.Assign, ast.AnnAssign)) and isinstance(target, ast.Name)
        assert plain, f"not an assignment to one name: {ast.unparse(line)}"
        try: values[target.id] = ast.literal_eval(line.value)
        except (ValueError, TypeError): raise AssertionError(f"not a literal: {ast.unparse(line)}") from None
    for line in source.splitlines():
        assert "=" not in line.partition("#")[2], f"papermill reads the comment of {line!r} as an assignment"
    return values


def test_literals():
    assert literals('preset = "quick"  # why\nseed: int = -1\nrates = [0, .1]') == {"preset": "quick", "seed": -1, "rates": [0, .1]}
    wrong = ("import os", "a = b", "a = b = 1", "a, b = 1, 2", "a = 1 + 1", "a: int", "a += 1", "print(1)", "a = 1  # not b=2")
    for source in wrong:
        with pytest.raises(AssertionError): literals(source)


@pytest.mark.parametrize("name", ["train.ipynb", *RESULTS])
def test_parameters(name):
    cells = tagged(name)
    assert len(cells) == 1, f"{len(cells)} cells are tagged parameters; one is needed"
    assert {"preset", "stories", "out", "seed", "overrides"} <= literals(cells[0]).keys()


@pytest.mark.parametrize("name", GUIDES)
def test_parameters_of_a_guide(name):
    cells = tagged(name)
    assert len(cells) <= 1
    for cell in cells: assert {"preset", "out"} <= literals(cell).keys()


# Results

def test_every_result_is_listed():
    assert {f"results/{entry.get('notebook', entry['name'])}.ipynb" for entry in LISTED} == set(RESULTS)
    assert len({entry["name"] for entry in LISTED}) == len(LISTED)


@pytest.mark.parametrize("entry", LISTED, ids=lambda entry: entry["name"])
def test_a_result_measures_once_and_tells_from_a_template(entry):
    name = f"results/{entry.get('notebook', entry['name'])}.ipynb"
    code = "\n".join(source for _, source in code_cells(name))
    assert entry["title"] and entry["question"].strip().endswith("?")
    assert (NBS / "answers" / f"{entry['name']}.md.j2").is_file()
    assert code.count(f'measured(study, "{entry["name"]}"') == 1 and f'Result(study, "{entry["name"]}")' in code
    once = entry.get("seeds") == "first" or entry.get("first", False)
    assert ("seeds" in literals(tagged(name)[0])) == (not once)


IN_CODE = {"klflow", "lrd", "cosmos", "cola"}      # results whose verdict is still worded in their notebook; this list shrinks


@pytest.mark.parametrize("entry", [entry for entry in LISTED if entry["name"] not in IN_CODE], ids=lambda entry: entry["name"])
def test_a_verdict_is_worded_in_its_template(entry):
    "Answer, limits and verdict are the three parts of a template; code passes the headline and values."
    template = (NBS / "answers" / f"{entry['name']}.md.j2").read_text(encoding="utf-8")
    assert template.count("\n---\n") == 2
    trees = [ast.parse(source) for _, source in code_cells(f"results/{entry.get('notebook', entry['name'])}.ipynb")]
    calls = [node for tree in trees for node in ast.walk(tree)
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "answer"]
    assert calls and not [call for call in calls if len(call.args) > 1 or "verdict" in {given.arg for given in call.keywords}]
