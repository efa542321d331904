# What people and CI share. `make quickstart` and `make test` need nothing but Python and a compiler-free machine.

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: install quickstart test unit check format clean

install: $(VENV)/.installed

# torch comes first: DeepSpeed's installation asks for it and must find this one, not fetch another.
# setuptools_scm is what seqeval's setup.py asks for; fetched by it in the middle of its own run, it lacks a part.
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

# All tests are collected, those of tests/unit run.
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

clean:
	rm -rf data runs exported
