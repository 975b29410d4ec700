"README and index repeat the committed tables, and README stays short."
import json
import re

import pytest

from latentrefine.core import ROOT
from latentrefine.registry import load_chapters
from latentrefine.front import front_findings, front_systems, front_table

CPU = ROOT / "outputs" / "cpu"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name, made", [("table", lambda: front_table(CPU)), ("findings", lambda: front_findings(CPU)),
                                        ("systems", front_systems)])
def test_readme_says_what_the_tables_say(name, made):
    load_chapters()
    shown = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end {name} -->", README, re.S)
    assert shown and shown[1] == made(), f"README's {name} is not that of outputs/cpu: run nbs/index.ipynb"


def test_index_shows_the_same_table():
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = ["".join(output["data"].get("text/markdown", "")) for cell in cells if cell["cell_type"] == "code"
             for output in cell["outputs"] if "data" in output]
    assert front_table(CPU) in shown


def test_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.split()) <= 900
    places = {place.partition("#")[0] for place in re.findall(r"\]\(([^)]+)\)", README) if "://" not in place}
    assert not [place for place in places if not (ROOT / place).exists()]
