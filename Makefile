# make quickstart: environment, SimpleNet trained on real photographs, tested, exported, pictures.
# make test: environment, all tests.
PYTHON ?= python3
BIN := .venv/bin

# make trials: kills, odd images and options, large folders, many times. make matrix: other versions.
.PHONY: quickstart test trials matrix lint clean

quickstart: .venv/quickstart
	$(BIN)/python -m anomalib_simplenet.quickstart

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

trials: .venv/dev
	TRIALS=full $(BIN)/python -m pytest -m trial tests

matrix:
	$(PYTHON) tests/matrix.py

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
