# `make` lists the targets. Everything installs into .venv/ on first use; nothing else has to be there but Python.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=
PINS ?= -c constraints.txt

BIN := $(VENV)/bin
KEY := $(shell cat setup.py constraints.txt | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/.installed-$(KEY)
QUALITY_INSTALLED := $(VENV)/.quality-$(KEY)
DOCS_INSTALLED := $(VENV)/.docs-$(KEY)
SOURCES := src tests examples $(wildcard benchmarks) setup.py

OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_EVALUATE_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 \
	TOKENIZERS_PARALLELISM=false
PYTEST := $(OFFLINE) OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest tests
# the tests of others are all slow, and collecting them takes as long as running many of our own
# a file runs in one process, so that what its fixtures make is made once
FAST := -m "not gpu and not slow" -n $(WORKERS) --dist loadfile --ignore=tests/conformance/peft --ignore=tests/upstream

# Arguments: PYTEST_ARGS="-k router -x" goes to pytest, and WORKERS is how many processes it takes.
#   make test PYTEST_ARGS='-m "slow and not gpu"'                      only the slow tests
#   make test PYTEST_ARGS="--cov --cov-report=term:skip-covered"       the share of src/ that tests run
#   make test-fast VERSIONS=floor, make test-all VERSIONS=newest       other versions, see tests/versions.py
#   make bench-gpu BENCH=models                                        FFN experts and whole models instead of layers
# GPU_PYTHON is another interpreter for machines where nothing can be installed: make bench-gpu GPU_PYTHON=python3 RESULTS=/some/folder
# Programs are compiled when they first run, which PYTEST_ARGS="-n 8" does side by side where pytest-xdist is there.
VERSIONS ?=
BENCH ?= layers
GPU_PYTHON ?= $(BIN)/python
RESULTS ?= benchmarks/results
GPU_TESTS = $(shell grep -rl --include='test_*.py' 'pytest.mark.gpu' tests)
GPU_INSTALLED := $(if $(findstring $(VENV),$(GPU_PYTHON)),$(INSTALLED))
WITH_SOURCE := PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH}
BENCH_GPU := $(WITH_SOURCE) $(OFFLINE) timeout 590 $(GPU_PYTHON)

.DEFAULT_GOAL := help
.PHONY: help install assets test-assets demo test test-fast test-all test-gpu conformance bench bench-gpu docs style quality build clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED)

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.10 or newer, or name one with 'make PYTHON=...'."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is older than 3.10: name a newer one with 'make PYTHON=...'."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot create $(VENV): on Debian and Ubuntu install python3-venv."; exit 1; }

$(INSTALLED): | $(BIN)/python
	@echo "Installing into $(VENV)/ (once; a few minutes)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PINS) -e '.[test]'
	@rm -f $(VENV)/.installed-*
	@touch $@

$(QUALITY_INSTALLED) $(DOCS_INSTALLED): $(VENV)/.%-$(KEY): $(INSTALLED)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@rm -f $(VENV)/.$*-*
	@touch $@

assets: $(INSTALLED)
	@$(BIN)/python examples/pretrained.py

demo: assets  ## fine-tune a pretrained language model with MoLE, reload it, plot its experts
	@$(OFFLINE) $(BIN)/python examples/mole/demo.py

ifneq ($(strip $(VERSIONS)),)
test test-fast test-all:
	@$(PYTHON) tests/versions.py --target $@ $(VERSIONS)
else
# what tests need from the network, in a cache outside the checkout
test-assets: assets
	@$(BIN)/python examples/pretrained.py minilm
	@$(BIN)/python examples/moe_llava/data.py
	@$(BIN)/python tests/upstream/fetch.py
	@$(BIN)/python tests/distributed/fetch_deepspeed.py

test: test-assets  ## the tests that need no GPU, in less than 20 minutes on two cores
	@$(PYTEST) -m "not gpu and not exhaustive" -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-fast: $(INSTALLED)  ## the tests that take no more than a few seconds each
	@$(PYTEST) $(FAST) $(PYTEST_ARGS)

test-all: test-assets  ## every test that needs no GPU
	@$(PYTEST) -m "not gpu" -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

conformance: test-assets  ## PEFT's own tests over our tuners, LoRA beside them: one table
	@$(PYTEST)/conformance/peft -m "not gpu" -n $(WORKERS) --dist load -q -rfE $(PYTEST_ARGS)
endif

test-gpu: $(GPU_INSTALLED)  ## the tests that need a CUDA device; no network
	@$(WITH_SOURCE) $(OFFLINE) OMP_NUM_THREADS=1 $(GPU_PYTHON) -m pytest -o addopts=-ra $(GPU_TESTS) -m gpu $(PYTEST_ARGS)

bench: $(INSTALLED)  ## compare the kernel backends with plain LoRA and write the table
	@$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python benchmarks/lora_experts.py --name cpu_fp32

bench-gpu: $(GPU_INSTALLED)  ## the same on a CUDA device, in less than ten minutes; BENCH=models: whole models
ifeq ($(BENCH),models)
	@$(BENCH_GPU) benchmarks/ffn_experts.py --device cuda --name cuda_ffn_experts --total_seconds 160 --results $(RESULTS)
	@$(BENCH_GPU) benchmarks/whole_model.py --device cuda --optimizer --name cuda_whole_model --total_seconds 100 --results $(RESULTS)
	@$(BENCH_GPU) benchmarks/whole_model.py --device cuda --optimizer --method mocle --name cuda_whole_model_mocle --total_seconds 100 --results $(RESULTS)
else
	@$(BENCH_GPU) benchmarks/lora_experts.py --device cuda --name cuda_lora_experts --total_seconds 450 --results $(RESULTS)
endif

docs: $(DOCS_INSTALLED)  ## the pages of docs/ as a site, in site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

quality: $(QUALITY_INSTALLED)  ## lint, format check and types
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy

style: $(QUALITY_INSTALLED)  ## fix what the linter and the formatter can
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

build: $(INSTALLED)  ## the wheel, in dist/
	@$(BIN)/python -m pip wheel -qq --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist

clean:  ## remove caches and build products; keeps .venv/ and the downloaded models
	@rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
