# make run          set up, start a stack on this machine with a real model, answer one question, serve until Ctrl-C
# make run ONCE=1   the same, and exit after the answer
# make test         set up and run every test
# make quick        the tests to run all day (about 100 s on two cores, once set up)
# make check        ruff, mypy --strict, the house rules, lines per room
#
# Set-up is a stamp file in .venv, made again when pyproject.toml changes. Running needs less than testing, so that
# the first `make run` downloads no test tools. No system package is needed: the Redis-compatible server comes as a
# wheel.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := $(VENV)/bin
MODEL ?= smollm2-135m
# Of `make nightly`: seconds of faults on a real stack, and their seed.
CHAOS_S ?= 3600
CHAOS_SEED ?= 1
# Of `make nightly`: simulated worlds.
WORLDS ?= 100000

# Set-up compiles nothing (below), so what gets imported has to stay compiled for the next process.
unexport PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_ROOT_USER_ACTION := ignore
# On a terminal pip shows its progress; in a log it is silent unless something is wrong.
# Compiling every module of every package takes as long as all the rest; Python compiles the few it imports.
PIP_INSTALL = $(BIN)/python -m pip install --no-compile $(if $(MAKE_TERMOUT),,--quiet)
# One OpenMP team of one thread per process: on a busy machine a second thread makes small products 50x slower.
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help run test quick check bench nightly docs proto clean
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
	echo "Baton needs Python 3.11 or newer, and none was found; install it, or name one: make PYTHON=/path/to/python3.11" >&2; exit 2; fi
	@echo "Making $(VENV) with $$($(PYTHON) --version)."
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.local: pyproject.toml | $(BIN)/python
	@echo "Installing Baton and what a laptop needs into $(VENV) (the first time takes a minute or two)."
	@$(PIP_INSTALL) --editable '.[local]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing Baton and its test tools into $(VENV) (the first time takes a minute or two)."
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $(VENV)/.local $@

run: $(VENV)/.local
	@exec $(BIN)/baton serve --ask demo $(if $(ONCE),--once) $(ARGS)

test: $(VENV)/.dev
	@$(BIN)/baton model pull $(MODEL)
	@$(PYTEST) $(ARGS)

quick: $(VENV)/.dev
	@$(PYTEST) -n 2 -m "not slow and not model and not gpu" $(ARGS)

check: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(PYTEST) -s tests/test_house.py tests/test_docs.py

bench: $(VENV)/.dev
	@$(BIN)/baton model pull $(MODEL)
	@$(BIN)/python -m baton.bench.serve_vs_transformers $(ARGS)

nightly: $(VENV)/.dev
	@$(BIN)/baton model pull $(MODEL)
	@$(PYTEST) $(ARGS)
	@$(BIN)/baton simulate --seed 0 --seeds $(WORLDS) --jobs 2
	@$(BIN)/python -m tests.planted.hunt
	@$(BIN)/python -m baton.bench.freeze --transport tcp --transport shm --transport nccl --runs 100
	@$(BIN)/python -m baton.bench.overload --times 10
	@$(BIN)/python -m baton.chaos --duration $(CHAOS_S) --seed $(CHAOS_SEED)

# Files that are generated and committed; tests/test_docs.py fails when they are stale.
docs: $(VENV)/.dev
	@$(BIN)/baton config show --docs > docs/configuration.md
	@$(BIN)/python -m baton.core.machines docs/protocol.md

proto: $(VENV)/.dev
	@$(BIN)/python -m grpc_tools.protoc -I proto --python_out=src --pyi_out=src --grpc_python_out=src proto/baton/wire/*.proto

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info
