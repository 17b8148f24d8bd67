# Everything a person does here. Each target creates what it needs: `make demo` and `make test` work in a fresh clone with Python >= 3.10.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
RUN ?= runs/demo
# `make cuda` builds the CUDA extension; nothing else here waits for it.
# Byte code is made of what is imported, when it is: of all of PyTorch and transformers it takes a minute.
PIP := PYTRANSFORMER_CUDA=0 $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint requirements/constraints.txt
# All kernels are compiled in the first test that asks for one.
COMPILE_SECONDS := 3000
# What runs in the emulator. The norm ops' tests take every backend, and there the CUDA one alone.
EMULATED := tests/cuda tests/ops/test_norm.py tests/ops/test_norm_checks.py tests/ops/test_shared_memory.py
# One thread for each test process: they share the cores.
TEST_ENV := OMP_NUM_THREADS=1 PYTHONPATH=.

.PHONY: help demo test test-all coverage cuda sanitize gate gate-changed gate-figures lint types gpu gpu-hopper gpu-bench bench peers readme-numbers huggingface-classes clean venv

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 18

$(VENV)/.run: requirements/constraints.txt requirements/triton.txt pyproject.toml setup.py
	@echo "Setting up $(VENV) (once; one to two minutes, PyTorch is the largest part) …"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, found " + sys.version)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) --requirement requirements/triton.txt
	@$(PIP) --editable '.[model,plot]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "Adding the development tools …"
	@$(PIP) --editable '.[dev]'
	@touch $@

venv: $(VENV)/.dev ## the virtual environment with the development tools

demo: $(VENV)/.run ## verify the kernels, train a small model on real text, draw, generate (≤ 10 minutes on 2 cores)
	@PATH="$$PWD/$(BIN):$$PATH" RUN=$(RUN) bash tools/demo.sh

test: $(VENV)/.dev ## the tests, without a GPU: Triton's kernels interpreted, the CUDA kernels emulated under sanitizers (20 minutes on 2 cores)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" --ignore=tests/compile --ignore=tests/cuda
	$(TEST_ENV) $(BIN)/python -m tests.support.emulator --flavor address -n $(WORKERS) -m "not slow" $(EMULATED)

coverage: $(VENV)/.dev ## the same tests, and which lines of the package they reach (a third slower, so not part of `make test`)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" --ignore=tests/compile --ignore=tests/cuda --cov --cov-report=term:skip-covered --cov-report=xml:.coverage.xml

cuda: $(VENV)/.dev ## the CUDA extension, in place (nvcc needed); ARCHS="80 90" or ARCHS=all, by default the GPUs that are here
	$(BIN)/python csrc/build.py $(if $(ARCHS),--archs "$(ARCHS)")

sanitize: $(VENV)/.dev ## every CUDA kernel test on the CPU, under AddressSanitizer and UBSan, then under ThreadSanitizer
	$(TEST_ENV) $(BIN)/python -m tests.support.emulator --flavor address -n $(WORKERS) $(EMULATED)
	$(TEST_ENV) $(BIN)/python -m tests.support.emulator --flavor thread -n $(WORKERS) $(EMULATED)

gate: $(VENV)/.dev ## every kernel × shipped configuration compiled for sm_80, sm_90 and sm_100 (or ARCHS=80,90) and judged, without a GPU
	$(TEST_ENV) PYTRANSFORMER_TEST_COMPILE=1 $(if $(ARCHS),PYTRANSFORMER_COMPILE_ARCHS=$(ARCHS)) $(BIN)/python -m pytest --timeout $(COMPILE_SECONDS) tests/compile

test-all: test gate sanitize ## all of it: the slow tests, and the kernels under the oldest supported Triton
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -m slow --ignore=tests/compile --ignore=tests/cuda
	bash tools/test_oldest_triton.sh

gate-changed: $(VENV)/.dev ## the gate for what the committed figures do not know, and one launch of each kernel that they do
	$(TEST_ENV) PYTRANSFORMER_TEST_COMPILE=1 PYTRANSFORMER_COMPILE_CHANGED=1 $(BIN)/python -m pytest --timeout $(COMPILE_SECONDS) -n $(WORKERS) --dist loadfile tests/compile

gate-figures: $(VENV)/.dev ## commits to what the kernels compile to now (benchmarks/results/gate, docs/kernels.md)
	$(TEST_ENV) PYTRANSFORMER_TEST_COMPILE=1 PYTRANSFORMER_UPDATE_FIGURES=1 $(BIN)/python -m pytest --timeout $(COMPILE_SECONDS) tests/compile
	$(BIN)/python tools/kernel_table.py

lint: $(VENV)/.dev ## ruff (lint and format), and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tools/readme_numbers.py --check
	$(BIN)/python tools/kernel_table.py --check

types: $(VENV)/.dev ## mypy --strict on pytransformer/
	$(BIN)/mypy

huggingface-classes: $(VENV)/.dev ## every model class of the installed transformers beside eager attention (20 minutes); writes tests/interop/huggingface_classes.json
	$(TEST_ENV) $(BIN)/python -m tests.interop.huggingface_walk

bench: $(VENV)/.dev ## every benchmark row on this machine, tables and pictures in runs/bench; on a CPU a smoke run at tiny sizes (≤ 2 minutes)
	$(BIN)/pytransformer bench --peers --plot
	PYTHONPATH=. $(BIN)/python -m pytest benchmarks/pytest_suites --benchmark-only --benchmark-columns=median,iqr,rounds

readme-numbers: $(VENV)/.dev ## README.md's numbers and pictures from the committed results
	$(BIN)/python tools/readme_numbers.py

gpu: ## everything that needs a GPU, with the python3, torch and triton already there, offline; MINUTES=25 for more of the grid, REHEARSE=1 without a GPU; results in $$OUT
	PYTHONPATH=. $(PYTHON) -m pytransformer.benchmarks.programs.gpu $(if $(MINUTES),--minutes $(MINUTES)) $(if $(REHEARSE),--rehearse)

gpu-hopper: ## the first minutes of Hopper's Gluon kernels on an H100 or H200: part by part with a time limit each, then beside others; REHEARSE=1 without a GPU; results in $$OUT
	PYTHONPATH=. $(PYTHON) -m pytransformer.benchmarks.programs.gpu_hopper $(if $(MINUTES),--minutes $(MINUTES)) $(if $(REHEARSE),--device cpu)

gpu-bench: ## the benchmarks of `make gpu` alone, without tests and sanitizers; one that was cut off goes on
	PYTHONPATH=. $(PYTHON) -m pytransformer.benchmarks.programs.gpu --parts build,quick,full $(if $(MINUTES),--minutes $(MINUTES))

peers: $(VENV)/.dev ## wheels of the packages we compare with into peers/, for a GPU machine without a network; there: tools/fetch_peers.py --install
	$(BIN)/python tools/fetch_peers.py

clean: ## removes what was built, not the virtual environment
	rm -rf build dist *.egg-info runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .benchmarks .coverage .coverage.xml gpu-results
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
