# Every target prepares what it needs and is safe to repeat. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help setup up down status logs clean test test-unit lint format demo-hotswap bench-engine bench-hotswap soak soak-hotswap gpu-check-engine gpu-check-gptj gpu-check-hotswap

BOOTSTRAP := infra/local/bootstrap.sh
PYTHON := .venv/bin/python
# Only set-up makes .venv. Half-way through it there is a Python, but not yet what the commands import.
VENV_WORKS = test -x $(PYTHON) && { test ! -e .venv/.roundhouse-installing || $(PYTHON) -c 'import infra.local.up' 2>/dev/null; }
HAVE_VENV = { $(VENV_WORKS); } || { echo "roundhouse: nothing is set up yet: run 'make up'" >&2; exit 1; }
# Tests run beside each other's servers on two cores: more threads would only wait for each other.
TEST_ENV := OMP_NUM_THREADS=1
PYTEST := $(TEST_ENV) $(PYTHON) -m pytest -q

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

setup: ## install what is missing: Debian's packages, .venv/
	@$(BOOTSTRAP)

up: ## set up and start everything; ends with a first answer, the address and the key
	@$(BOOTSTRAP) infra.local up

demo-hotswap: ## beside a running 'make up': ten fine-tunes answer in turn on one worker, with the time of each swap
	@$(HAVE_VENV); $(PYTHON) -m infra.local.demo_hotswap

down: ## stop everything; data are kept in .local/
	@$(HAVE_VENV); $(PYTHON) -m infra.local down

status: ## what runs
	@$(HAVE_VENV); $(PYTHON) -m infra.local status || test $$? = 3 # 3: nothing runs, which is an answer

logs: ## follow the logs; NAMES="gateway scheduler" for some of them
	@$(HAVE_VENV); $(PYTHON) -m infra.local logs --follow $(NAMES)

clean: ## stop everything and remove .local/ (data, logs, keys)
	@if $(VENV_WORKS); then $(PYTHON) -m infra.local clean; \
	elif test -e .local/bootstrap.lock && ! flock -n .local/bootstrap.lock true; then \
		echo "roundhouse: a set-up of this clone is at work: wait for it, or stop it" >&2; exit 1; \
	else rm -rf .local; fi

lint: setup ## ruff and mypy
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

format: setup ## let ruff format and sort
	@$(PYTHON) -m ruff format .
	@$(PYTHON) -m ruff check --fix .

test-unit: setup ## only the tests that need no server
	@$(PYTEST) tests/unit

test: lint ## everything: lint, then all tests against real RabbitMQ, Redis and PostgreSQL of their own
	@$(PYTEST) tests/unit
	@$(TEST_ENV) $(PYTHON) -m infra.local.testservers $(PYTHON) -m pytest -q \
		$(wildcard tests/contract tests/integration tests/e2e)

BENCH_PACKAGES := .local/bench/packages
BENCH_REQUIREMENTS := infra/requirements/bench.txt

bench-engine: setup ## the engine against transformers and llama.cpp, on a quiet machine; ARGS="--rows stream --json FILE"
	@cmp -s $(BENCH_REQUIREMENTS) $(BENCH_PACKAGES)/installed.txt || { rm -rf $(BENCH_PACKAGES) && \
		$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
			--target $(BENCH_PACKAGES) --requirement $(BENCH_REQUIREMENTS) && \
		cp $(BENCH_REQUIREMENTS) $(BENCH_PACKAGES)/installed.txt; }
	@$(PYTHON) -m loadtest.engine $(ARGS)

bench-hotswap: setup ## 20 fine-tunes in memory for 3, on a quiet machine (12 minutes); ARGS="--rows goodput --json FILE"
	@$(PYTHON) -m loadtest.hotswap $(ARGS)

soak-hotswap: setup ## 1,000 swaps beside answers: each answer right, memory flat? ARGS="--model smollm2"
	@$(PYTHON) -m loadtest.hotswap_soak $(ARGS)

soak: setup ## 10,000 requests through the engine: does its memory stay flat? ARGS="--model smollm2 --requests 500"
	@$(PYTHON) -m loadtest.soak $(ARGS)

# No set-up: a machine with a GPU has its own Python, torch, triton and transformers. JSON: where the rows go.
GPU_CHECK = mkdir -p .local && timeout 478 python3 -m loadtest.gpu_engine $(1) --json $(or $(JSON),.local/gpu-$(1).json) $(ARGS)

gpu-check-engine: ## on a machine with a CUDA device: kernels checked, then Llama-8B's shape against transformers
	@$(call GPU_CHECK,engine)

gpu-check-gptj: ## the same with GPT-J-6B's shape
	@$(call GPU_CHECK,gptj)

gpu-check-hotswap: ## the same device: models of Llama-8B's shape that come and go in its slots
	@mkdir -p .local && timeout 478 python3 -m loadtest.gpu_hotswap --json $(or $(JSON),.local/gpu-hotswap.json)
