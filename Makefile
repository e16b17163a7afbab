# Everything runs in an environment of its own, made on first use and again when setup.py changes.
#   make smoke PYTHON=python3.12      another interpreter
#   make test EXTRAS=gpu,dev          another TensorFlow
#   make test PINS=tensorflow-cpu==2.20.0 VENV=.venv-2.20     a version, in an environment of its own
#   make test PYTEST="-k storage"     more arguments for pytest

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
EXTRAS ?= cpu,dev,gcs,tensorboard,video
PYTEST ?=
# Many tests wait for processes that they have started.
PARALLEL ?= -n 2 --dist worksteal
PINS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SMOKE := runs/smoke

.DEFAULT_GOAL := help
.PHONY: help install smoke smoke-replicas smoke-gcs placement chaos test test-slow test-numeric proofs test-matrix locks lint types format clean

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): setup.py
	@echo "setting up $(VENV) with $(PYTHON): a few minutes, most of them for TensorFlow"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]" $(PINS)
	@touch $@

install: $(STAMP) ## set up the environment

TRAIN_SMOKE = $(BIN)/python -m trainer train --config=smoke --workdir=$(SMOKE)

smoke: $(STAMP) ## train the small network from scratch into runs/smoke
	@rm -rf $(SMOKE)
	@$(TRAIN_SMOKE) || { code=$$?; [ $$code -ne 75 ] || \
		echo "make smoke starts anew; this goes on: $(TRAIN_SMOKE)"; exit $$code; }

# Networks too small to learn anything, and not compiled: about a minute for both.
QUICK = $(BIN)/python -m trainer train --config=smoke --jit=off \
	--set=model.channel_max=8 --set=training.total_kimg=0.064
WORKERS = "cluster": {"worker": ["localhost:47311", "localhost:47312"]}
WORKER = TF_CONFIG='{$(WORKERS), "task": {"type": "worker", "index": $(1)}}' \
	$(QUICK) --workdir=$(SMOKE)-replicas/workers

smoke-replicas: $(STAMP) ## train for a moment on two logical CPUs, then in two worker processes
	@rm -rf $(SMOKE)-replicas
	$(QUICK) --set=run.cpu_replicas=2 --workdir=$(SMOKE)-replicas/mirrored
	@echo; $(call WORKER,1) & $(call WORKER,0) && wait $$!

smoke-gcs: $(STAMP) ## convert, train, kill, resume, generate, export on a local Cloud Storage
	$(BIN)/python -m tests.gcs.smoke

chaos: $(STAMP) ## kill, stop and damage a small run, on a local Cloud Storage that fails, and compare
	$(BIN)/python -m tests.training.chaos --kills=20 --steps=60
	$(BIN)/python -m tests.training.chaos --kills=5 --steps=24 --workers=2
	$(BIN)/python -m tests.training.chaos --light --kills=10 --pauses=10 --corruptions=10 --steps=150

placement: $(STAMP) ## show how far the same steps are apart on other placements
	$(BIN)/python -m tests.training.placement

test: $(STAMP) ## run the tests, without the slow ones
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not proof" $(PYTEST)

test-slow: $(STAMP) ## run the slow tests
	$(BIN)/python -m pytest $(PARALLEL) -m slow $(PYTEST)

# TensorFlow turns oneDNN on by itself on CPUs with AVX-512 alone, and then rounds otherwise.
ONEDNN ?= 0
NUMERIC := tests/augment tests/conformance tests/families tests/layers tests/metrics tests/objectives $(addprefix tests/training/test_,$(addsuffix .py, \
	loss_scale optimizer precision step step_trace))

test-numeric: $(STAMP) ## run the tests of numbers, without the slow ones: ONEDNN=0 or 1
	TF_ENABLE_ONEDNN_OPTS=$(ONEDNN) $(BIN)/python -m pytest $(PARALLEL) \
		-m "not slow and not proof" $(NUMERIC) $(PYTEST)

proofs: $(STAMP) ## run the long proofs, which rarely change
	$(BIN)/python -m pytest $(PARALLEL) -m proof $(PYTEST)

# The oldest TensorFlow, with what its time had; the one that Cloud TPUs have; the newest.
test-matrix: ## run the tests, without the slow ones, on every supported TensorFlow
	$(MAKE) test VENV=$(VENV)-2.17 EXTRAS=$(EXTRAS),io \
		PINS="tensorflow-cpu==2.17.1 numpy==1.26.4 protobuf==4.25.9"
	$(MAKE) test VENV=$(VENV)-2.20 PINS=tensorflow-cpu==2.20.0
	$(MAKE) test VENV=$(VENV)-2.21 PINS=tensorflow-cpu==2.21.0

# What the images install, to the byte: uv answers for every dependency with its hashes. Which
# registry it asks, the environment says (UV_DEFAULT_INDEX, UV_INDEX, UV_FIND_LINKS).
LOCK = $(BIN)/uv pip compile --quiet --upgrade setup.py --python-version 3.11 \
	--python-platform x86_64-manylinux_2_31 --constraints docker/constraints.in --generate-hashes \
	--no-emit-index-url --no-annotate --custom-compile-command "make locks" \
	--extra gcs --extra tensorboard

locks: $(STAMP) ## pin anew what the images install
	for target in gpu tpu; do \
		$(LOCK) --extra $$target --output-file docker/requirements-$$target.txt && \
		$(LOCK) --extra $$target --extra dev --extra video \
			--constraints docker/requirements-$$target.txt \
			--output-file docker/requirements-$$target-test.txt || exit 1; \
	done

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
