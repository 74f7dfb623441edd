# The two commands: `make run` (the default experiment, from nothing) and `make test` (lint, types, all tests).
# `make check` is for who moves code: lint, types, and the tests that are fast and need neither a network nor a fetched model.

PYTHON ?= python3
MODEL ?= smollm2-135m
SCENARIO ?= scenarios/5g.yaml
PIP_FLAGS ?=
JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
VENV := .venv
BIN := $(VENV)/bin
STAMPS := .make
AS_ROOT := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
export PYTHONDONTWRITEBYTECODE = 1
PYTEST = $(BIN)/python -m pytest -p no:cacheprovider
BESIDE = -n $(JOBS) --dist loadgroup --no-loadscope-reorder

.PHONY: run quick test check lint types unit bench docs setup clean

run: setup
	$(AS_ROOT) $(BIN)/testbed run $(SCENARIO)

quick: setup
	$(AS_ROOT) $(BIN)/testbed run scenarios/quick.yaml

test: setup lint types unit

check: lint types
	$(PYTEST) $(BESIDE) -q -m 'not slow and not full and not netns and not netem and not model and not alone' $(PYTEST_FLAGS)

lint: $(STAMPS)/venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/venv
	$(BIN)/mypy

# First what may run side by side, then what measures links. Namespaces need root; where sudo would have to ask and cannot, the
# tests that need it are skipped and say so. A lane in which PYTEST_FLAGS leave no test (status 5) has not failed.
unit: $(STAMPS)/venv $(STAMPS)/browser
	@if [ "$$(id -u)" = 0 ]; then root=; elif sudo -n true 2>/dev/null; then root="sudo -E"; else root=; fi; \
	status=0; set -x; \
	$$root $(PYTEST) $(BESIDE) $(PYTEST_FLAGS) -m 'not alone' || [ $$? = 5 ] || status=1; \
	$$root $(PYTEST) $(PYTEST_FLAGS) -m alone || [ $$? = 5 ] || status=1; \
	exit $$status

bench: setup
	$(BIN)/python -m benchmarks.codec_speed
	$(AS_ROOT) $(BIN)/python -m benchmarks.link_fidelity --quick

# The pages as a site, below build/site.
docs: $(STAMPS)/venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file .ci/mkdocs.yml

setup: $(STAMPS)/system $(STAMPS)/venv $(STAMPS)/model-$(MODEL)

$(STAMPS)/system: .ci/system-packages
	@mkdir -p $(STAMPS)
	@sh .ci/system-packages
	@touch $@

# What tests of pages open them in.
$(STAMPS)/browser: .ci/system-packages
	@mkdir -p $(STAMPS)
	@sh .ci/system-packages chromium
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
