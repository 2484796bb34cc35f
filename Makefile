# Everything runs in its own virtual environment; a second call finds it ready.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin

# The tests of a group run in one process, the groups that take longest first; see tests/support/schedule.py.
DIVIDED := -n 2 --dist loadgroup --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install demo check test bench faults picture lint format clean

help:      ## This list.
	@grep -hE '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.ready      ## Installs odedit into .venv.

demo: $(VENV)/.ready      ## Edits the embedded model, opens a report, leaves results and an MLflow store in demo/.
	@$(BIN)/odedit demo --out demo

check: $(VENV)/.ready-dev lint      ## Style, types, and the tests that take no time (a minute).
	$(BIN)/python -m pytest -q -m 'not slow' $(DIVIDED)

# Clusters that start beside other tests exceed Ray's time for a start.
test: $(VENV)/.ready-dev lint      ## Style, types, and every test (three quarters of an hour on two cores).
	$(BIN)/python -m pytest -q -m 'not ray' $(DIVIDED)
	$(BIN)/python -m pytest -q -m ray $(DIVIDED)

bench: $(VENV)/.ready-dev      ## What an edit and the pipeline cost; tables, JSON and plots in bench/ (about an hour).
	$(BIN)/python -m tests.benchmarks.speed --size mid --out bench
	$(BIN)/python -m tests.benchmarks.speed --size embedded --parts reference,batches --threads 1 --out bench
	$(BIN)/python -m tests.benchmarks.actors --out bench/actors
	$(BIN)/python -m tests.benchmarks.scale --out bench/scale

faults: $(VENV)/.ready-dev      ## Kills, fills, cuts off and damages what a run needs; a table of what that costs (a quarter of an hour).
	$(BIN)/python -m tests.faults.table --out bench

picture: $(VENV)/.ready-dev      ## The README's picture of a report, from a run of its own (a minute; needs Chromium).
	$(BIN)/python -m tests.support.report_picture

lint: $(VENV)/.ready-dev      ## Style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready-dev      ## Rewrites the code in the project's style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:      ## Removes the environment and the demo's output.
	rm -rf $(VENV) demo

# torch first and pinned, so that nothing else chooses a build for it.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "odedit needs Python 3.11 or newer; got $$($(PYTHON) --version). Set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), once: PyTorch (1 of 2, a few hundred MB to some GB) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	@echo "... Ray, transformers, MLflow and others (2 of 2, a few minutes) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
