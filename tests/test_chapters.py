"The chapters of systems and baselines run from top to bottom; a file of its own, so that a second core takes them."
import pytest
from test_notebooks import LIBRARY, run_chapter


@pytest.mark.parametrize("name", [name for name in LIBRARY if "/" in name])
def test_runs(name): run_chapter(name)
