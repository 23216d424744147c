# `make help` lists what there is. Needs Python 3.11 or later with venv, and make; everything else is installed into
# .venv, locked by hash.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --quiet --disable-pip-version-check
ARGS ?=

.PHONY: help run test test-fast check fmt lock faults bench clean install sbom

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  \033[36m%-12s\033[0m %s\n", $$1, $$2}'

run: $(VENV)/.local ## Start everything here: PostgreSQL, Temporal, API, workers (ARGS="--port 8001")
	@exec $(BIN)/trellis run $(ARGS)

test: $(VENV)/.dev check ## Lint, types, contracts, and the whole test suite with coverage (ARGS="-k name")
	$(BIN)/python -m pytest --cov --cov-report=term $(ARGS)

test-fast: $(VENV)/.dev ## The test suite without checks and coverage (ARGS="-k name")
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.dev ## Formatting, lint, strict types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(VENV)/.dev ## Format the code and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

faults: $(VENV)/.dev ## Break the real stack for MINUTES (3) with a SEED, then audit the books (ARGS="--kill-everything 20")
	$(BIN)/python -m tests.faults $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(ARGS)

bench: $(VENV)/.dev ## Measure (ARGS=--quick)
	$(BIN)/python -m bench $(ARGS)

lock: $(VENV)/.dev ## Lock the dependencies anew, by hash and without any index address (ARGS=--upgrade)
	for group in runtime local test dev; do \
	  $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-annotate --custom-compile-command "make lock" $(ARGS) pyproject.toml \
	    $$([ $$group = runtime ] || echo --group $$group) -o requirements/$$group.txt || exit 1; \
	done

install: $(VENV)/.dev ## Install everything into .venv

sbom: ## What the image contains, as CycloneDX: build/trellis.cdx.json (needs Docker)
	DOCKER_BUILDKIT=1 docker build --target sbom --output build .

clean: ## Remove what was built and installed; the data of `make run` stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage* htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or later is needed; set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too old: Python 3.11 or later is needed; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Two stages, so that `make run` waits for no test tool. The project itself is installed editable and without build
# isolation: its build backend comes from the lock as well.
$(VENV)/.local: requirements/local.txt pyproject.toml | $(VENV)/bin/python
	@echo "Installing what trellis needs to run; this takes a minute."
	$(PIP) install --require-hashes -r requirements/local.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.local
	@echo "Installing the tools for tests and checks."
	$(PIP) install --require-hashes -r requirements/dev.txt
	@touch $@
