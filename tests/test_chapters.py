"The chapters of systems and baselines run from top to bottom; a file of its own, so that a second core takes them."
import os

import pytest
from chapters import run_chapter
from test_notebooks import ALL, LIBRARY

# The suite has a time limit: LATENTREFINE_ALL_CHAPTERS=1 runs the other baselines, whose systems test_systems.py tests, too.
ALWAYS = ("50_gpt2", "51_parallel", "52_axe", "54_mdlm", "55_write_out")


@pytest.mark.parametrize("name", [name for name in LIBRARY if "/" in name])
def test_runs(name):
    left_out = name.startswith("baselines/") and not any(one in name for one in ALWAYS)
    if left_out and not os.environ.get("LATENTREFINE_ALL_CHAPTERS"): pytest.skip("LATENTREFINE_ALL_CHAPTERS=1 runs it")
    done, said = run_chapter(ALL[name])
    assert done, said[-6000:]
