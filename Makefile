# Two commands matter: `make demo` and `make test`. Each sets everything up on its first call.
SHELL := /bin/bash
VENV ?= .venv
ARGS ?=
# Huge pages for glibc's heap: XLA's CPU buffers come and go each step, and faulting them in as pages
# of 4 KiB is a good part of the kernel's share of the time.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# The first Python that is new enough; override with `make PYTHON=/path/to/python3.12`.
PYTHON := $(shell for p in $(PYTHON) python3 python3.13 python3.12 python3.14; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 && echo "$$p" && break; done)
# With an NVIDIA GPU in the machine, JAX comes with CUDA.
EXTRAS := demo,dev$(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo ,cuda13)
STAMP := $(VENV)/.installed-$(shell { cat pyproject.toml; echo "$(EXTRAS)"; } | cksum | cut -d' ' -f1)

# Ring 2 compiles the kernels for an H100 without one, with the oldest and the newest JAX.
AOT_floor := ==0.11.2
AOT_newest :=

.PHONY: help demo test lint format types unit parity aot setup clean
.PRECIOUS: .venv-aot-%/.installed
help:
	@echo "make demo   train, sparsify, evaluate and report on real text (ARGS=--smoke: under a minute)"
	@echo "make test   lint, types, the test suite, and the kernels compiled for an H100"
	@echo "make parity the same numbers as transformers (installs PyTorch into .venv-parity, several GB)"
	@echo "make lint | types | unit | aot | format | clean"

setup: $(STAMP)
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "dsa-jax needs Python 3.12 or newer: install it, or name one with make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@test -x $(VENV)/bin/python || "$(PYTHON)" -m venv $(VENV)
	@echo "Setting up $(VENV) with [$(EXTRAS)] (once)"
	@$(VENV)/bin/python -m pip install --quiet --upgrade pip
	@$(VENV)/bin/python -m pip install --quiet --upgrade -e '.[$(EXTRAS)]'
	@rm -f $(VENV)/.installed-* && touch $@

demo: $(STAMP)
	@$(VENV)/bin/python -m train demo $(ARGS)

test: lint types unit aot

lint: $(STAMP)
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

types: $(STAMP)
	@$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

unit: $(STAMP)
	@$(VENV)/bin/python -m pytest -n 2 $(ARGS)

parity: .venv-parity/.installed
	@CUDA_VISIBLE_DEVICES= .venv-parity/bin/python -m pytest tests/parity tests/oracle $(ARGS)

.venv-parity/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "dsa-jax needs Python 3.12 or newer" >&2; exit 1; }
	@test -x $(@D)/bin/python || "$(PYTHON)" -m venv $(@D)
	@echo "Setting up $(@D) with [parity,dev] (once)"
	@$(@D)/bin/python -m pip install --quiet --upgrade pip
	@$(@D)/bin/python -m pip install --quiet --upgrade -e '.[parity,dev]'
	@touch $@

# Both ends at once: a compile uses one core.
aot:
	@$(MAKE) --no-print-directory --output-sync -j 2 aot-floor aot-newest

aot-%: .venv-aot-%/.installed
	@echo "kernels ahead of time, $* JAX"
	@.venv-aot-$*/bin/python -m pytest -q -m aot -p no:cacheprovider tests/pallas_kernels tests/train/test_plan_compile.py

# The plugin without its CUDA libraries: enough to compile.
.venv-aot-%/.installed: Makefile
	@test -n "$(PYTHON)" || { echo "dsa-jax needs Python 3.12 or newer" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(@D) && $(@D)/bin/python -m pip install --quiet --upgrade pip
	@$(@D)/bin/python -m pip install --quiet 'jax$(AOT_$*)' flax optax orbax-checkpoint numpy jaxtyping absl-py rich tokenizers pytest pytest-timeout hypothesis
	@$(@D)/bin/python -m pip install --quiet --no-deps 'jax-cuda13-plugin$(AOT_$*)' 'jax-cuda13-pjrt$(AOT_$*)'
	@touch $@

format: $(STAMP)
	@$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-aot-* .venv-parity runs build dist *.egg-info
