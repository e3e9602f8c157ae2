# Everything a contributor runs. The virtual environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-slow test-faults check format benchmark clean

help:
	@echo "make demo       train a small ternary model on generated stories (a few minutes)"
	@echo "make test       run the tests"
	@echo "make test-slow  run the tests that take minutes"
	@echo "make test-faults  kill, fill, cut off and damage everything, and see that nothing is lost (minutes)"
	@echo "make check      lint and types"
	@echo "make format     format the code"
	@echo "make benchmark  all benchmarks that fit into an hour; appends to benchmarks/results/history.jsonl"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev,hub]'
	@touch $@ $(VENV)/.core

demo: $(VENV)/.core
	$(BIN)/ternlm demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow and not faults"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

test-faults: $(VENV)/.dev
	$(BIN)/python -m pytest -m faults tests/faults

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: $(VENV)/.dev
	$(BIN)/python benchmarks/suite.py $(ONLY)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
