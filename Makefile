# `make` alone lists the targets.  Options: PYTHON=/path/to/python3.12 for the set-up, SEED=2 for the demo,
# ARGS="…" for what a target should pass on.

PYTHON ?= python3
SEED ?=
ARGS ?=
BENCH ?= actor_overhead
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-agent test test-slow test-fleet test-kernels test-gpu check bench fuzz clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/'

setup: ## .venv with the pinned CPU set and the project; nothing is done twice
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "set-up: no $(PYTHON) here; install Python 3.11 or newer, or name it: make setup PYTHON=/path/to/python3.12" >&2; exit 2; }
	@SETUP_PYTHON="$(if $(filter file,$(origin PYTHON)),,$(PYTHON))" "$(PYTHON)" scripts/setup_env.py

demo: setup ## make the small policy, warm-start it, train it with real vLLM on the CPU (SEED=2, ARGS="…")
	@$(BIN)/atpo demo $(if $(SEED),--run.seed $(SEED)) $(ARGS)

demo-agent: setup ## the same with a chat policy that calls a search engine in JSON (SEED=2, ARGS="…")
	@$(BIN)/atpo demo agent $(if $(SEED),--run.seed $(SEED)) $(ARGS)

# The name lets the suite find every process it has started, orphans too (tests/conftest.py).  Two files run side by
# side: many tests wait for processes.  ARGS="-n 0" runs one after another.
PYTEST = ATPO_TEST_SESSION=make-$$$$ $(BIN)/python -m pytest -q --durations=10 --durations-min=5
SIDE_BY_SIDE = -n 2 --dist loadfile --no-loadscope-reorder

test: setup ## the suite but its slow tests and test-fleet's; those that need a GPU are skipped without one (ARGS="-k tree")
	@$(PYTEST) -m "not fleet and not slow" $(SIDE_BY_SIDE) $(ARGS)

test-slow: setup ## whole runs, killed, hung and gone on; ranks, sharding and compiled layers (ARGS="-k end_to_end")
	@$(PYTEST) -m "slow and not fleet" $(SIDE_BY_SIDE) $(ARGS)

test-fleet: setup ## whole runs over machines and services: Ray, Slurm and Kubernetes, a joined learner, shards (ARGS="-k ray")
	@$(PYTEST) -m fleet -n 0 $(ARGS)

KERNELS := $(CURDIR)/build/kernels
$(KERNELS)/.installed: requirements/kernels.txt | setup
	@echo "Installing Triton, Liger-Kernel and torchao into $(KERNELS): 170 MB, once."
	@rm -rf $(KERNELS) && mkdir -p $(KERNELS)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(KERNELS) -r requirements/kernels.txt
	@touch $@

test-kernels: $(KERNELS)/.installed ## the kernels of the learner's extra `gpu`, on a CPU in Triton's interpreter (ARGS="-k head")
	@ATPO_TEST_SESSION=make-$$$$ TRITON_INTERPRET=1 PYTHONPATH=$(KERNELS) $(BIN)/python -m pytest -q -m kernels -n 0 $(ARGS)

# No set-up: that would bring the CPU set.  One process, for the tests share the card.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
test-gpu: ## on a machine with a CUDA device: the tests that need one (ARGS="-k sharded"); PYTHON=… without a .venv
	@$(GPU_PYTHON) scripts/gpu_ready.py
	@PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" ATPO_TEST_SESSION=make-$$$$ \
	  $(GPU_PYTHON) -m pytest -q -m gpu $(ARGS)

check: setup ## ruff and mypy (strict) over the packages, tests, scripts and benchmarks
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup ## benchmarks/$(BENCH).py (BENCH=actor_overhead, concurrent_episodes, learner, buffer, transport, soak; ARGS="…")
	@$(BIN)/python benchmarks/$(BENCH).py $(ARGS)

fuzz: setup ## mutated messages at the sockets of a running buffer, honest peers beside them (ARGS="--seconds 60 --seed 7")
	@$(BIN)/python scripts/fuzz_sockets.py $(ARGS)

clean: ## remove caches and build leftovers; .venv, models/ and runs/ stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
