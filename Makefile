# Every target does all its own set-up on a machine that has only Python >= 3.11 and git.
#   make setup | quickstart | test | test-all | lint | bench | docs
#   make setup PYTHON=python3.12          another interpreter
#   make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"     a machine with GPUs

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check

# Where PyPI's own wheel of torch is the large CUDA one (Linux), the CPU wheel of the same version is preferred:
# from a directory that pip is configured to look in, or from PyTorch's index, when either is within reach.
TORCH ?= $(shell sed -n '/^torch==/p' constraints.txt) --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu

.DELETE_ON_ERROR:
.PHONY: setup dev quickstart test test-all lint bench docs clean

setup: $(VENV)/.demo-installed
dev: $(VENV)/.dev-installed

quickstart: setup
	$(BIN)/earthshine quickstart

# Whole files go to each of two workers, which tests/conftest.py gives one thread each, the longest files first.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: dev
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.trainers-installed
	$(PYTEST)

lint: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(VENV)/.bench-installed
	set -e; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python "$$file"; done

# The site is complete in itself: open site/index.html, no server and no network needed.
docs: $(VENV)/.docs-installed
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) dist site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis

# Stamps make a second run instant. A change of the interpreter is not noticed: `make clean` first.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# The stamp holds the choice of torch, so another choice is installed even into an environment that has one. What torch
# itself needs comes with the next step, from the pins.
ifneq ($(shell cat $(VENV)/.torch-installed 2>/dev/null),$(strip $(TORCH)))
.PHONY: $(VENV)/.torch-installed
endif
$(VENV)/.torch-installed: $(VENV)/.created
	$(PIP) --no-deps $(TORCH)
	@echo '$(strip $(TORCH))' > $@

# Torch is left out of the pins from here on: it is installed, and a user may have chosen another.
$(VENV)/constraints.txt: constraints.txt $(VENV)/.torch-installed
	grep -v '^torch==' constraints.txt > $@

# The build backend comes first and pinned, so that the build itself needs nothing newer from outside.
$(VENV)/.demo-installed: $(VENV)/constraints.txt pyproject.toml
	@echo "Installing the packages that earthshine needs: a few minutes at most"
	@$(PIP) -q -c $(VENV)/constraints.txt hatchling editables
	@$(PIP) -q -c $(VENV)/constraints.txt --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.demo-installed
	@echo "Installing the packages that tests and lint need"
	@$(PIP) -q -c $(VENV)/constraints.txt --no-build-isolation -e '.[demo,track,dev]'
	@touch $@

$(VENV)/.trainers-installed: $(VENV)/.dev-installed
	@echo "Installing other people's trainers, in which Muon is tested, and what builds the documentation"
	@$(PIP) -q -c $(VENV)/constraints.txt --no-build-isolation -e '.[demo,track,dev,trainers,docs]'
	@touch $@

$(VENV)/.bench-installed: $(VENV)/.dev-installed
	@echo "Installing the packages that benchmarks need"
	@$(PIP) -q -c $(VENV)/constraints.txt --no-build-isolation -e '.[demo,track,dev,bench]'
	@touch $@

$(VENV)/.docs-installed: $(VENV)/.demo-installed
	@echo "Installing the packages that the documentation needs"
	@$(PIP) -q -c $(VENV)/constraints.txt --no-build-isolation -e '.[demo,docs]'
	@touch $@
