# Everything works on a fresh clone with Python 3.11 or newer and make; `make` alone lists the targets.
# Everything is installed into .venv, in the versions that constraints.txt names.
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --require-virtualenv
INSTALL := $(PIP) install --quiet --constraint constraints.txt
MANIFESTS := pyproject.toml sdk/pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo up test lint protos clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.dev  ## Install what development needs into .venv (the others do it by themselves)

demo: $(VENV)/.runtime  ## Run the whole system on this machine for about a minute, and print what clients saw
	$(BIN)/warmserve demo $(ARGS)

up: $(VENV)/.runtime  ## Run the whole system on this machine until Ctrl-C
	$(BIN)/warmserve up $(ARGS)

# Two processes, each with an etcd and a Redis of its own; a file's tests stay together.
test: $(VENV)/.dev  ## Run all tests; ARGS="-k word" chooses some
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 10 $(ARGS)

lint: $(VENV)/.dev  ## Check style, types, import rules, protos, and that the stubs are those of the protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	PYTHON=$(BIN)/python tools/generate_stubs.sh --check

protos: $(VENV)/.dev  ## Make sdk/warmserve/v1 from protos/
	PYTHON=$(BIN)/python tools/generate_stubs.sh

clean:  ## Remove .venv and what tools left behind
	rm -rf $(VENV) build dist *.egg-info sdk/build sdk/*.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "There is no $(PYTHON) here: install Python 3.11 or newer, or name yours: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else 1)' || { \
	  echo "$(PYTHON) is `$(PYTHON) --version 2>&1`, but 3.11 or newer is needed: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu: python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone, so that its version is the one in constraints.txt whatever else asks for.
$(VENV)/.runtime: $(MANIFESTS) | $(BIN)/python
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	$(INSTALL) torch
	$(INSTALL) --editable './sdk[admin]' --editable '.[all]'
	@PYTHON=$(BIN)/python tools/fetch_redis.sh
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(INSTALL) --editable './sdk[admin]' --editable '.[all,dev]'
	@touch $@
