# make quickstart    train on the Python functions of this machine and search with the result (minutes, no GPU)
# make test          all tests (ten to twelve minutes on two cores)
# make test-quick    style, and the tests that need one process only
# make chaos         200 kills at random moments in one run, and the same bytes at its end (some minutes)
# make bench         what a machine measures in a quarter of an hour, into benchmarks/RESULTS.md
# make lint          style

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help quickstart test test-quick chaos bench lint clean

help:
	@sed -n 's/^# //p' Makefile

quickstart: $(VENV)/.installed
	$(BIN)/python -W ignore -m examples.code_search.quickstart

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

test-quick: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not processes"

chaos: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python tests/chaos.py

bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check fastokens==0.3.5
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps dashscope==2.0.2  # Qwen's ranks, no code
	$(BIN)/python -m benchmarks.results

lint: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV) || { echo "Python's venv is missing: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) quickstart
