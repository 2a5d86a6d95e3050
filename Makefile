# Targets run from .venv, which is set up when first needed (Python 3.11 or newer with venv; no GPU).
# Where torch and the rest are installed already, name the interpreter and nothing is set up:
#   make gpu-test PYTHON=python3
# ARGS goes to the command behind a target: make test ARGS='-k manifest'

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test thorough gpu-test sanitize bench bench-e2e sass docs style format types tree clean ready

ARGS ?=
BOOTSTRAP ?= python3
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
# pip would compile every module, one after the other, for 40 s. Few are ever imported: those are
# compiled when they are, and kept.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
export PYTHONDONTWRITEBYTECODE :=
HAS_GPU := $(shell command -v nvidia-smi)

ifdef PYTHON
READY := ready
else
READY := $(VENV)/.test-ready
PYTHON := $(BIN)/python
endif

help: ## List the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(READY) ## Generate and compile kernels for real models, decode with them, check the results
	$(PYTHON) examples/demo.py $(ARGS)

# One process per core, each with one thread.
test: export OMP_NUM_THREADS := 1
test: $(READY) ## Run the tests; those that need a GPU are skipped where there is none
	$(PYTHON) -m pytest -n auto --maxprocesses 16 --dist loadgroup $(ARGS)

thorough: export OMP_NUM_THREADS := 1
thorough: $(READY) ## Run all tests: every planted bug and every shipped kernel in ptxsim, not a sample of them
	$(PYTHON) -m pytest -n auto --maxprocesses 16 --dist loadgroup --thorough $(ARGS)

gpu-test: $(READY) ## Run the GPU tests, write their records in tests/ and the table in docs/ptxsim.md
	$(PYTHON) -m pytest -m gpu --gpu-evidence $(ARGS)
	$(PYTHON) tests/calibration.py

# Where the tests so marked are: collecting all of the suite takes each process longer than its share.
SANITIZED := tests/features tests/test_numerics.py tests/test_head_dim_v.py tests/test_merge_kernel.py
TOOLS ?= memcheck racecheck synccheck

sanitize: $(READY) ## Run a test of every kind of kernel and launch under compute-sanitizer, on a GPU
	for tool in $(TOOLS); do \
	  compute-sanitizer --tool $$tool --max-connections 40 --report-api-errors no --error-exitcode 1 \
	    $(PYTHON) -m pytest -q -m 'gpu and sanitized' $(SANITIZED) $(ARGS); done

bench: $(READY) ## Time the kernels against PyTorch on a GPU
	$(PYTHON) -m bench $(ARGS)

bench-e2e: $(READY) ## Time whole models of transformers on a GPU (ARGS=--help lists the options)
	$(PYTHON) -m bench.end_to_end $(ARGS)

sass: $(READY) ## Write the machine code of the base kernels to build/listings; ARGS=--record records its digests
	$(PYTHON) tests/sass.py $(ARGS)

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(READY) ## Build the documentation site into build/site; warnings are errors
	$(PYTHON) -m mkdocs build --strict --quiet $(ARGS)
	@echo "open build/site/index.html, or run $(PYTHON) -m http.server -d build/site, where search works too"

style: $(VENV)/.style-ready ## Check format, lint, types and generated/ for drift
	$(BIN)/pre-commit run --all-files $(ARGS)

format: $(VENV)/.style-ready ## Mend what style finds, where a tool can
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format --quiet .
	$(BIN)/clang-format -i $$(git ls-files '*.cuh' '*.c' '*.h')
	$(BIN)/gqa-cutlass generate

types: $(VENV)/.style-ready tree ## Check types only
	@MYPYPATH=$(VENV)/tree $(BIN)/mypy tests/typed_program.py
	@MYPYPATH=$(VENV)/tree $(BIN)/mypy -p gqa_cutlass -p bench $(ARGS) | \
	  sed -E 's#^$(VENV)/tree/gqa_cutlass/(codegen|templates)/#\1/#; s#^$(VENV)/tree/##'

# Type checkers, IDEs among them, do not follow the folders that pyproject.toml maps into one
# package, but links (pyproject.toml names them for pyright). Messages name the real files.
tree:
	@rm -rf $(VENV)/tree && mkdir -p $(VENV)/tree/gqa_cutlass
	@ln -s $(CURDIR)/gqa_cutlass/* $(addprefix $(CURDIR)/,codegen templates) $(VENV)/tree/gqa_cutlass
	@ln -s $(CURDIR)/bench $(VENV)/tree/bench

clean: ## Remove everything that make and the tools left behind
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

ready:
	@$(PYTHON) -c 'import gqa_cutlass.codegen' || { \
	  echo "make: $(PYTHON) has no gqa_cutlass; remedy: $(PYTHON) -m pip install --no-deps --no-build-isolation -e ."; \
	  exit 1; }

# Without a GPU only the CPU build of torch is taken (200 MB instead of several GB): from the
# configured package indexes if they have it, or else from PyTorch's own.
$(VENV)/.test-ready: pyproject.toml constraints.txt
	@$(BOOTSTRAP) -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: $(BOOTSTRAP) is older than Python 3.11 or lacks venv; remedy: apt install python3 python3-venv, or BOOTSTRAP=python3.12"; \
	  exit 1; }
	@echo "setting up $(VENV); the first time takes a few minutes"
	@test -x $(BIN)/python || $(BOOTSTRAP) -m venv $(VENV)
ifeq ($(HAS_GPU),)
	@$(INSTALL) '$(TORCH)+cpu' 2>/dev/null || $(INSTALL) --extra-index-url $(TORCH_CPU_INDEX) '$(TORCH)+cpu'
endif
	@$(INSTALL) setuptools
	@$(INSTALL) --no-build-isolation -e '.[test,docs]'
	@$(MAKE) --no-print-directory tree
	@touch $@

$(VENV)/.style-ready: $(VENV)/.test-ready
	@$(INSTALL) --no-build-isolation -e '.[test,docs,style]'
	@touch $@
