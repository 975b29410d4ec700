"Runs a library notebook in a process of its own, forked from one in which the large packages are imported already."
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["nbdev.test", "pytest", "matplotlib.pyplot", "IPython.display", "latentrefine.measure"])
PLACES = dict(MPLBACKEND="agg", CUDA_VISIBLE_DEVICES="")      # no window, no GPU


def execute(path, log):
    "Execute the notebook `path` as nbdev does; its output goes to the file `log`. Exit code 1 if it fails."
    with open(log, "w") as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
    os.environ.update(PLACES)
    os.chdir(ROOT)
    from nbdev.test import nbdev_test
    nbdev_test(str(path), n_workers=0, do_print=True)
    sys.stdout.flush()


def run_chapter(path):
    "Whether the notebook `path` ran to its end, and what it said."
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        before = {name: os.environ.get(name) for name in PLACES}
        os.environ.update(PLACES)                             # the server that is forked takes them over
        process = FORKS.Process(target=execute, args=(path, log))
        process.start()
        for name, value in before.items(): os.environ.pop(name) if value is None else os.environ.update({name: value})
        process.join()
        said = log.read_text(errors="replace") if log.exists() else ""
    return process.exitcode == 0 and said.count("- Completed") == 1, said
