# The two commands: `make run` (the default experiment, from nothing) and `make test` (lint, types, all tests).
# `make check` is for who moves code: lint, types, and the tests that are fast and need neither a network nor a fetched model.

PYTHON ?= python3
MODEL ?= smollm2-135m
SCENARIO ?= scenarios/5g.yaml
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMPS := .make
AS_ROOT := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
export PYTHONDONTWRITEBYTECODE = 1

.PHONY: run quick test check lint types unit bench setup clean

run: setup
	$(AS_ROOT) $(BIN)/testbed run $(SCENARIO)

quick: setup
	$(AS_ROOT) $(BIN)/testbed run scenarios/quick.yaml

test: setup lint types unit

check: lint types
	$(BIN)/python -m pytest -q -p no:cacheprovider -m 'not slow and not full and not netns and not netem and not model' $(PYTEST_FLAGS)

lint: $(STAMPS)/venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/venv
	$(BIN)/mypy

# Namespaces need root; where sudo would have to ask and cannot, the tests that need it are skipped and say so.
unit: $(STAMPS)/venv
	@if [ "$$(id -u)" = 0 ]; then root=; elif sudo -n true 2>/dev/null; then root="sudo -E"; else root=; fi; \
	set -x; $$root $(BIN)/python -m pytest -p no:cacheprovider $(PYTEST_FLAGS)

bench: setup
	$(BIN)/python -m benchmarks.codec_speed
	$(AS_ROOT) $(BIN)/python -m benchmarks.link_fidelity --quick

setup: $(STAMPS)/system $(STAMPS)/venv $(STAMPS)/model-$(MODEL)

$(STAMPS)/system: .ci/system-packages
	@mkdir -p $(STAMPS)
	@sh .ci/system-packages
	@touch $@

$(STAMPS)/venv: pyproject.toml constraints.txt | $(STAMPS)/system
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than 3.11; name a newer one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) has no venv module; install it with: apt-get install python3-venv" >&2; exit 1; }
	@mkdir -p $(STAMPS)
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(STAMPS)/model-$(MODEL): | $(STAMPS)/venv
	$(BIN)/testbed models fetch $(MODEL)
	@touch $@

clean:
	rm -rf $(VENV) $(STAMPS) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
