"The chapters of systems and baselines run from top to bottom; a file of its own, so that a second core takes them."
import pytest
from chapters import run_chapter
from test_notebooks import ALL, LIBRARY


@pytest.mark.parametrize("name", [name for name in LIBRARY if "/" in name])
def test_runs(name):
    done, said = run_chapter(ALL[name])
    assert done, said[-6000:]
