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

# another interpreter for machines where nothing can be installed: make bench-gpu GPU_PYTHON=python3 RESULTS=/some/folder
# programs are compiled when they first run, which PYTEST_ARGS="-n 8" does side by side where pytest-xdist is there
GPU_PYTHON ?= $(BIN)/python
RESULTS ?= benchmarks/results
GPU_TESTS = $(shell grep -rl --include='test_*.py' 'pytest.mark.gpu' tests)
WITH_SOURCE := PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH}
BENCH_GPU := $(WITH_SOURCE) $(OFFLINE) timeout 590 $(GPU_PYTHON)

.DEFAULT_GOAL := help
.PHONY: help install assets test-assets demo test test-all test-fast test-slow test-gpu test-floor conformance test-versions errors coverage bench bench-gpu bench-gpu-models docs quality style build clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED)  ## create .venv/ and install the package for development

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

assets: $(INSTALLED)  ## fetch the pretrained model of the demo into a cache outside the checkout
	@$(BIN)/python examples/pretrained.py

test-assets: assets
	@$(BIN)/python examples/pretrained.py minilm
	@$(BIN)/python examples/moe_llava/data.py
	@$(BIN)/python tests/upstream/fetch.py
	@$(BIN)/python tests/distributed/fetch_deepspeed.py

demo: assets  ## fine-tune a pretrained language model with MoLE, reload it, plot its experts
	@$(OFFLINE) $(BIN)/python examples/mole/demo.py

test: test-assets  ## the tests that need no GPU, in less than 20 minutes on two cores
	@$(PYTEST) -m "not gpu and not exhaustive" -n $(WORKERS) --dist loadfile --error-table=check $(PYTEST_ARGS)

test-all: test-assets  ## every test that needs no GPU
	@$(PYTEST) -m "not gpu" -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-fast: $(INSTALLED)  ## the tests that take no more than a few seconds each
	@$(PYTEST) $(FAST) $(PYTEST_ARGS)

test-slow: test-assets  ## only the slow tests
	@$(PYTEST) -m "slow and not gpu" -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-gpu: $(if $(findstring $(VENV),$(GPU_PYTHON)),$(INSTALLED))  ## the tests that need a CUDA device; no network
	@$(WITH_SOURCE) $(OFFLINE) OMP_NUM_THREADS=1 $(GPU_PYTHON) -m pytest -o addopts=-ra $(GPU_TESTS) -m gpu $(PYTEST_ARGS)

test-floor:  ## the fast tests on the oldest supported versions, in .venv-floor/
	@floors=$$($(PYTHON) tests/floors.py) && $(MAKE) --no-print-directory test-fast VENV=.venv-floor PINS="$$floors"

conformance: test-assets  ## PEFT's own tests over our tuners, LoRA beside them: one table
	@$(PYTEST)/conformance/peft -m "not gpu" -n $(WORKERS) --dist load -q -rfE $(PYTEST_ARGS)

test-versions:  ## tests/versions.py: the oldest and the newest versions, and Python 3.10 to 3.13
	@$(PYTHON) tests/versions.py

errors: test-assets  ## write docs/reference/errors.md from what the tests of `make test` see
	@$(PYTEST) -m "not gpu and not exhaustive" -n $(WORKERS) --dist loadfile --error-table=write $(PYTEST_ARGS)

coverage: test-assets  ## the tests of `make test`, with the share of src/ that they run
	@$(PYTEST) -m "not gpu and not exhaustive" -n $(WORKERS) --dist loadfile --cov --cov-report=term:skip-covered $(PYTEST_ARGS)

bench: $(INSTALLED)  ## compare the kernel backends with plain LoRA and write the table
	@$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python benchmarks/lora_experts.py --name cpu_fp32

bench-gpu: $(if $(findstring $(VENV),$(GPU_PYTHON)),$(INSTALLED))  ## compare the kernel backends on a CUDA device, in less than ten minutes
	@$(BENCH_GPU) benchmarks/lora_experts.py --device cuda --name cuda_lora_experts --total_seconds 450 --results $(RESULTS)

bench-gpu-models: $(if $(findstring $(VENV),$(GPU_PYTHON)),$(INSTALLED))  ## FFN experts and training steps of whole models on a CUDA device
	@$(BENCH_GPU) benchmarks/ffn_experts.py --device cuda --name cuda_ffn_experts --total_seconds 160 --results $(RESULTS)
	@$(BENCH_GPU) benchmarks/whole_model.py --device cuda --optimizer --name cuda_whole_model --total_seconds 100 --results $(RESULTS)
	@$(BENCH_GPU) benchmarks/whole_model.py --device cuda --optimizer --method mocle --name cuda_whole_model_mocle --total_seconds 100 --results $(RESULTS)

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
