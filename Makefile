# make run: the whole suite on ./data, $MNIST_LAB_DATA or a download. make test: lint, types and all tests. make report:
# the plots and one page of what is in results/, with a live demo where npm is at hand.
# make check: the same without the slow tests, in less than half a minute. make faults: kills, damage, limits, odd
# environments, half an hour; make faults KILLS=1000 FILES=10000 takes hours.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
KILLS := 50
FILES := 200
PYTEST := $(BIN)/python -m pytest --durations=10

run: $(VENV)/.run
	$(BIN)/python run_all_experiments.py --mode load $(ARGS)

report: $(VENV)/.run
	$(BIN)/python visualize_results.py --report $(ARGS)

test: $(VENV)/.test lint types
	FAULT_KILLS=3 FAULT_FILES=20 OMP_NUM_THREADS=1 $(PYTEST) --numprocesses auto --dist loadfile tests tests/faults

faults: $(VENV)/.test
	FAULT_KILLS=$(KILLS) FAULT_FILES=$(FILES) OMP_NUM_THREADS=1 $(PYTEST) tests/faults

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

$(VENV)/.test: requirements.txt requirements-extra.txt requirements-cluster.txt requirements-dev.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ $(VENV)/.run

.PHONY: run report test faults check quick-tests lint types
