# make run: the whole suite on ./data, $MNIST_LAB_DATA or a download. make test: lint, types and all tests.
# make check: the same without the slow tests, in less than half a minute.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --durations=10

run: $(VENV)/.run
	$(BIN)/python run_all_experiments.py --mode load $(ARGS)

test: $(VENV)/.test lint types
	OMP_NUM_THREADS=1 $(PYTEST) --numprocesses auto --dist loadfile

check: $(VENV)/.test
	$(MAKE) --jobs 2 --output-sync lint types quick-tests

quick-tests: $(VENV)/.test
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with make PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.run: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.test: requirements.txt requirements-extra.txt requirements-dev.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ $(VENV)/.run

.PHONY: run test check quick-tests lint types
