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
# Tests mostly wait for servers: three processes, each with its own, keep two cores busy.
TEST_PROCESSES ?= 3
PARALLEL := -n $(TEST_PROCESSES) --dist worksteal
# The name in kind-config.yaml.
CLUSTER ?= trellis

# Every program that is missing, at once.
needs = missing=; for program in $(1); do command -v $$program >/dev/null || missing="$$missing $$program"; done; \
  [ -z "$$missing" ] || { echo "Not found:$$missing. See docs/contributing-cluster.md."; exit 1; }

.PHONY: help run test test-fast check fmt lock faults bench clean install sbom chart cluster-up cluster-down deploy

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  \033[36m%-12s\033[0m %s\n", $$1, $$2}'

run: $(VENV)/.local ## Start everything here: PostgreSQL, Temporal, API, workers (ARGS="--port 8001")
	@exec $(BIN)/trellis run $(ARGS)

test: $(VENV)/.dev check ## Lint, types, contracts, and the whole test suite with coverage (ARGS="-k name")
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term $(ARGS)

test-fast: $(VENV)/.dev ## The test suite without checks and coverage (ARGS="-k name")
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

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

bench: $(VENV)/.bench ## Cost per order beside its alternatives (ARGS="--quick --only trellis dbos")
	$(BIN)/python -m bench $(ARGS)

# `bench` comes on top of the others in the same .venv: what both have must be the same version.
lock: $(VENV)/.dev ## Lock the dependencies anew, by hash and without any index address (ARGS=--upgrade)
	for group in runtime local test dev; do \
	  $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-annotate --custom-compile-command "make lock" $(ARGS) pyproject.toml \
	    $$([ $$group = runtime ] || echo --group $$group) -o requirements/$$group.txt || exit 1; \
	done
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-annotate --custom-compile-command "make lock" $(ARGS) --constraint requirements/dev.txt \
	  --group bench -o requirements/bench.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-annotate --custom-compile-command "make lock" $(ARGS) --group sbom -o requirements/sbom.txt

install: $(VENV)/.dev ## Install everything into .venv

sbom: ## What the image contains, as CycloneDX: build/trellis.cdx.json (needs Docker)
	DOCKER_BUILDKIT=1 docker build --target sbom --output build .

chart: ## Check the chart, as far as that needs no cluster (needs helm; ARGS="install" for a case of tests/cluster)
	tests/cluster/run $(or $(ARGS),static)

cluster-up: ## A local Kubernetes of one node, by kind-config.yaml (needs kind and Docker)
	@$(call needs,docker kind kubectl)
	kind get clusters 2>/dev/null | grep -qx $(CLUSTER) || kind create cluster --name $(CLUSTER) --config kind-config.yaml --wait 120s
	@echo "Up. Next: make deploy"

cluster-down: ## Remove it, with all that is on it
	@$(call needs,docker kind)
	kind delete cluster --name $(CLUSTER)

deploy: ## Build the image and install the chart on it, or upgrade it (ARGS="--set api.replicas=2")
	@$(call needs,docker kind kubectl helm)
	@kind get clusters 2>/dev/null | grep -qx $(CLUSTER) || { echo "There is no cluster $(CLUSTER): make cluster-up"; exit 1; }
	DOCKER_BUILDKIT=1 docker build --quiet --tag trellis:dev .
	@# A tag by content: Kubernetes starts new pods if, and only if, the image is another one.
	set -eu; tag=$$(docker image inspect --format '{{.Id}}' trellis:dev | cut -c 8-19); \
	  docker tag trellis:dev trellis:$$tag; \
	  kind load docker-image --name $(CLUSTER) trellis:$$tag; \
	  helm upgrade --install trellis charts/trellis --kube-context kind-$(CLUSTER) --values charts/trellis/values-dev.yaml \
	    --set image.tag=$$tag --wait --timeout 10m $(ARGS)
	@echo "The API: http://localhost:30080 (docs at /docs). Or, at the usual port: kubectl port-forward svc/trellis-api 8000"

clean: ## Remove what was built and installed; the data of `make run` stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage* htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or later is needed; set PYTHON=/path/to/python3"; exit 1; }
	@found=$$($(PYTHON) -c 'import sys, venv, ensurepip; print(sys.version_info >= (3, 11))') \
	  || { echo "$(PYTHON) does not work, or has no venv (on Debian: python3-venv); set PYTHON=/path/to/python3"; exit 1; }; \
	  [ "$$found" = True ] || { echo "$(PYTHON) is too old: Python 3.11 or later is needed; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Two stages, so that `make run` waits for no test tool. The project itself is installed editable and without build
# isolation: its build backend comes from the lock as well. `--no-deps`: a lock is complete, so nothing is left to be
# resolved, and older versions of pip, such as 23.2, resolve an extra (`coverage[toml]`) to the newest there is, whose
# hash no lock has.
$(VENV)/.local: requirements/local.txt pyproject.toml | $(VENV)/bin/python
	@echo "Installing what trellis needs to run; this takes a minute."
	$(PIP) install --require-hashes --no-deps -r requirements/local.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.local
	@echo "Installing the tools for tests and checks."
	$(PIP) install --require-hashes --no-deps -r requirements/dev.txt
	@touch $@

$(VENV)/.bench: requirements/bench.txt $(VENV)/.local
	@echo "Installing what is measured against, and what draws the plots."
	$(PIP) install --require-hashes --no-deps -r requirements/bench.txt
	@touch $@
