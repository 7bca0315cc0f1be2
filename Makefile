# Every target sets itself up: `make demo` and `make test` work on a fresh clone with Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo check format test test-gpu test-slow bench bench-gpu kills clean

setup: .venv/.done

.venv/.done: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moa needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/moa demo

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

bench: setup
	$(BIN)/python -m experiments.bench

bench-gpu: setup
	$(BIN)/python -m experiments.bench.gpu

kills: setup
	$(BIN)/python -m experiments.kills --out experiments/results/kills.json

clean:
	rm -rf .venv runs
