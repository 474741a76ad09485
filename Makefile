# make quickstart: environment, SimpleNet trained on real photographs, tested, exported, pictures.
# make test: environment, all tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint clean

quickstart: .venv/quickstart
	$(BIN)/python -m anomalib_simplenet.quickstart

test: .venv/dev
	$(BIN)/python -m pytest

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/quickstart: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install -e '.[quickstart]'
	touch $@

.venv/dev: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@ .venv/quickstart
