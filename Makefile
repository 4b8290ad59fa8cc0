# The commands of the project. Each does its own set-up: see scripts/bootstrap.sh.
#
#   make quickstart EXTRA=cuda13         with an accelerator's jax (cuda13 or tpu)
#   make test ARGS="-k topk_select"      ARGS go to the command that runs
#   make PYTHON=/opt/py/bin/python ...   the Python to make the environment with
#   make VENV=/scratch/venv ...          where to make it
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup setup-dev quickstart test test-slow bench lint types format

export VENV ?= .venv
EXTRA ?=
ARGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## */\1\t/p' Makefile | awk -F '\t' '{ printf "%-12s %s\n", $$1, $$2 }'
	@sed -n '3,6s/^#//p' Makefile

setup:  ## make .venv and install the project
	@scripts/bootstrap.sh $(EXTRA)

setup-dev:  ## the same with ruff, pyrefly, import-linter, pre-commit
	@scripts/bootstrap.sh $(EXTRA) dev

quickstart: setup  ## decode a real model at several Top-k ratios; writes report.html
	$(BIN)/python -m experiments.quickstart.run $(ARGS)

test: setup  ## the default tier of tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not gpu and not tpu" $(ARGS)

test-slow: setup  ## every test that this machine can run without an accelerator
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --slow -m "not gpu and not tpu" $(ARGS)

bench: setup  ## tokens per second of decoding
	$(BIN)/python -m experiments.bench.run $(ARGS)

lint: setup-dev  ## ruff, formatting, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup-dev  ## pyrefly
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: setup-dev  ## rewrite files as ruff formats them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
