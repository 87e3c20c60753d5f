# Needs Python 3.11 or newer and make; everything else is installed into .venv from requirements.lock.

ROOT := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
VENV ?= $(ROOT)/.venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first Python that is new enough; `make PYTHON=/some/python3` chooses another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && exit; \
	done; echo python3)

.DEFAULT_GOAL := help
.PHONY: help install run test lint format bench lock clean
.NOTPARALLEL:

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' $(ROOT)/Makefile | expand -t 10

install: $(STAMP) ## install into .venv, from requirements.lock

run: $(STAMP) ## run Gavel with a demonstration auction; Ctrl-C ends it
	@cd $(ROOT) && exec $(BIN)/gavel up --demo

test: lint ## check everything: format, rules, types, imports, all tests, coverage
	@cd $(ROOT) && exec $(BIN)/python tests/run.py

lint: $(STAMP) ## check format, rules, types and imports
	@cd $(ROOT) && $(BIN)/ruff format --check
	@cd $(ROOT) && $(BIN)/ruff check
	@cd $(ROOT) && $(BIN)/mypy
	@cd $(ROOT) && $(BIN)/lint-imports

format: $(STAMP) ## format the code, and repair what ruff can repair
	@cd $(ROOT) && $(BIN)/ruff check --fix-only && $(BIN)/ruff format

bench: $(STAMP) ## measure the engine beside its peers, which takes 25 minutes; writes build/bench/report.html
	@cd $(ROOT) && exec $(BIN)/gavel bench --output build/bench

# The oldest Python that we support chooses, since what only that one needs must be in the lock, too. Local settings of
# pip are left out, so that the lock has the hashes of all published files, for every platform.
LOCK_PYTHON ?= python3.11
lock: ## choose the newest versions again and write requirements.lock
	@$(LOCK_PYTHON) -m venv --clear $(VENV)/lock
	@$(VENV)/lock/bin/python -m pip install --quiet pip-tools
	@cd $(ROOT) && PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= PIP_EXTRA_INDEX_URL= \
		$(VENV)/lock/bin/pip-compile --quiet --upgrade --extra aws --extra load --extra test --all-build-deps \
		--generate-hashes --no-emit-index-url --no-emit-find-links --no-header --strip-extras --allow-unsafe \
		--output-file requirements.lock pyproject.toml
	@rm -rf $(VENV)/lock

clean: ## remove everything that make has made
	@cd $(ROOT) && rm -rf $(VENV) .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache \
		.ruff_cache build gavel.egg-info loadtests/peers/node/node_modules
	@cd $(ROOT) && find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): $(ROOT)/requirements.lock $(ROOT)/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Gavel needs Python 3.11 or newer; install one and name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV), once"
	@$(BIN)/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@cd $(ROOT) && $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@cd $(ROOT) && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
