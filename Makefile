# make quickstart: makes .venv, trains, tests and exports SimpleNet on real photographs, and predicts.
# make test: makes .venv and runs all tests.
# make trials: the tests with kills, unreadable images, wrong options and large folders, repeated many times.
# make matrix: the tests with other versions of Python, torch and anomalib.
# make clean: removes build and tool caches. make distclean: removes .venv as well.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test trials matrix lint clean distclean

quickstart: .venv/quickstart
	$(BIN)/python -m anomalib_simplenet.quickstart

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

trials: .venv/dev
	TRIALS=full $(BIN)/python -m pytest -m trial tests

matrix:
	$(PYTHON) tests/matrix.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf .venv

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/quickstart: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install -e '.[quickstart]'
	touch $@

.venv/dev: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@ .venv/quickstart
