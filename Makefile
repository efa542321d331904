# Commands for people and CI. `make quickstart` and `make test` need only Python, and no compiler.

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: install quickstart test unit check format clean

install: $(VENV)/.installed

# torch is installed first: DeepSpeed's installation imports it and must find this version, not fetch another.
# seqeval's setup.py needs setuptools_scm; if it fetches that itself while it runs, a part is missing.
$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt setuptools setuptools_scm wheel numpy torch
	$(PIP) install --quiet -c constraints.txt --no-build-isolation deepspeed
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev,monitor]'
	touch $@

quickstart: install
	PATH="$(BIN):$$PATH" $(BIN)/python examples/quickstart.py

test: install
	PATH="$(BIN):$$PATH" $(BIN)/python -m pytest

# Collect all tests, but run only those in tests/unit.
unit: install
	PATH="$(BIN):$$PATH" $(BIN)/python -m pytest -q --collect-only >/dev/null
	PATH="$(BIN):$$PATH" $(BIN)/python -m pytest tests/unit

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Remove what the quickstart wrote.
clean:
	rm -rf data/quickstart runs/quickstart exported/quickstart
