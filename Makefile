# make demo   set up, build the demonstration model, serve it and show what steering does
# make test   every test (FAST=1: without the slow ones)
# make check  format, lint and types
# make clean  remove what these commands made

PYTHON ?= python3
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
# The torch build; elsewhere e.g. a local wheel. Its version is pinned with all the others.
TORCH ?= torch
# How many processes the tests are shared out to, file by file; 0: none but the one that you see.
JOBS ?= 2

.PHONY: demo test check format setup clean

demo: setup
	@DESHIFT_CACHE=$${DESHIFT_CACHE:-.deshift} $(BIN)/deshift demo --port $(PORT) $(if $(ONCE),--once)

test: setup
	$(BIN)/pytest --numprocesses $(JOBS) --dist loadfile $(if $(FAST),-m "not slow") $(ARGS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.stamp

$(VENV)/.stamp: pyproject.toml deploy/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Deshift needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1 || echo not found)." \
	       "Name another: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' has no venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): torch, then the rest (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --constraint deploy/constraints.txt $(TORCH)
	@$(BIN)/python -m pip install -qq --constraint deploy/constraints.txt --editable '.[dev,eval,otel]'
	@touch $@

clean:
	rm -rf $(VENV) .deshift build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find server steering tests -name __pycache__ -type d -prune -exec rm -rf {} +
