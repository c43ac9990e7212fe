# The commands of this repository.  `make` lists them.
#
#   make demo PYTHON=python3.12      another interpreter for the virtual environment
#   make demo ARGS="--data FILE"     arguments for `parallelflow demo`
#   make test ARGS="-k varlen"       arguments for pytest

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin
MADE_FROM := requirements.txt tests/compat/requirements.txt pyproject.toml
TORCH  := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' requirements.txt)
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input

# Threads that wait give their core away: on a busy machine small operations are several times faster.
export OMP_WAIT_POLICY ?= passive

.PHONY: help venv demo test lint docs format clean

help:
	@echo "make demo    virtual environment, then the demonstration: runs/demo/"
	@echo "make test    virtual environment, then the tests"
	@echo "make lint    ruff (lint and format) and mypy"
	@echo "make docs    the documentation site, strictly: site/"
	@echo "make format  let ruff rewrite the files"
	@echo "make venv    the virtual environment alone, in $(VENV)"
	@echo "make clean   remove $(VENV) and what tools left behind"

demo: venv
	$(BIN)/parallelflow demo $(ARGS)

test: venv
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Never with --quiet: it silences the warnings before --strict can count them.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The environment holds a copy of what it was made from; it is made again only when that differs.
venv:
	@if cat $(MADE_FROM) | cmp -s - $(VENV)/made-from 2>/dev/null; then exit 0; fi; \
	$(MAKE) --no-print-directory $(VENV)/made-from

.PHONY: $(VENV)/made-from
$(VENV)/made-from:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "ParallelFlow needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Making the virtual environment $(VENV): $(TORCH), then the rest of requirements.txt. A minute or two ..."
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PIP) install -qq $(TORCH)
	@$(PIP) install -qq --no-deps --requirement requirements.txt
	@$(PIP) install -qq --no-deps --no-build-isolation --editable .
	@$(PIP) install -qq --no-deps --target $(VENV)/beside --requirement tests/compat/requirements.txt
	@cat $(MADE_FROM) > $@
	@echo "Done: $$($(BIN)/python -c 'import torch; print("torch", torch.__version__)')"

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
