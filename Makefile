# Everything runs in an environment of its own, made on first use and again when setup.py changes.
#   make smoke PYTHON=python3.12      another interpreter
#   make test EXTRAS=gpu,dev          another TensorFlow
#   make test PYTEST="-k storage"     more arguments for pytest

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
EXTRAS ?= cpu,dev,gcs,tensorboard,video
PYTEST ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SMOKE := runs/smoke

.DEFAULT_GOAL := help
.PHONY: help install smoke test test-slow lint types format clean

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): setup.py
	@echo "setting up $(VENV) with $(PYTHON): a few minutes, most of them for TensorFlow"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]"
	@touch $@

install: $(STAMP) ## set up the environment

smoke: $(STAMP) ## train the small network from scratch into runs/smoke
	@rm -rf $(SMOKE)
	$(BIN)/python -m trainer.task --config=configs/smoke.yaml --workdir=$(SMOKE)

test: $(STAMP) ## run the tests, without the slow proofs
	$(BIN)/python -m pytest -m "not slow" $(PYTEST)

test-slow: $(STAMP) ## run the slow proofs
	$(BIN)/python -m pytest -m slow $(PYTEST)

lint: $(STAMP) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## check types
	$(BIN)/mypy

format: $(STAMP) ## put style and formatting right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build products; the environment and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find trainer tests -name __pycache__ -type d -prune -exec rm -rf {} +
