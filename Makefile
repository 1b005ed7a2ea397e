# One target per stage, each safe to repeat:  make embed RECIPE=jobs/configs/demo.toml ARGS="--set embed.batch_size=64"
# `make help` lists them all.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

RECIPE ?= jobs/configs/demo.toml
ARGS ?=
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAGES := filter download embed index neighbors latents train sample evaluate

# Ray would otherwise write a token to the home folder; a busy second thread only spins on a small machine.
export RAY_AUTH_MODE ?= disabled
export OMP_WAIT_POLICY ?= PASSIVE
export NO_ALBUMENTATIONS_UPDATE ?= 1
export DS_ACCELERATOR ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)

.PHONY: help install demo test check format bench bench-retrieval database report clean $(STAGES)

help: ## list what can be made
	@grep -hE '^[a-z$$()A-Z ]+:.*## ' $(MAKEFILE_LIST) | sed -e 's/$$(STAGES)/<stage>/' -e 's/:.*## /\t/' | expand -t 14
	@echo; echo "stages, in order: $(STAGES)"
	@echo "variables: RECIPE=$(RECIPE)  ARGS=\"--set section.key=value\"  ARGS=--dry-run  ARGS=--help"

install: $(VENV)/installed ## make .venv with everything pinned

$(VENV)/installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not here; name a Python 3.11 or 3.12: make PYTHON=python3.12 install"; exit 2; }
	@echo 'installing into .venv: 6 GB, some two minutes'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev,s3]'
	@touch $@

demo: install ## the whole road on a small drawn world; ends with runs/demo/report.html
	$(BIN)/python -m jobs.demo jobs/configs/demo.toml $(ARGS)

$(STAGES): install ## run one stage of RECIPE
	$(BIN)/python -m jobs.$@ $(RECIPE) $(ARGS)

database: install ## build a style database: make database NAME=ukiyo-e SOURCE=folder RECIPE=...
	$(BIN)/python -m jobs.database $(RECIPE) --name "$(NAME)" --source "$(SOURCE)" $(ARGS)

report: install ## write the demo's report again from what is on disk
	$(BIN)/python -m jobs.report $(RECIPE) $(ARGS)

test: install ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

check: install ## ruff, format, mypy, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

format: install ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: bench-retrieval ## every benchmark there is

bench-retrieval: install .venv-bench/installed ## our engine beside ScaNN, faiss, hnswlib, usearch: docs/performance.md
	$(BIN)/python -m benchmarks.retrieval $(ARGS)

# Libraries that need other versions than ours, such as NumPy 2, are measured from an environment of their own.
.venv-bench/installed: benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --disable-pip-version-check -r benchmarks/requirements.txt
	@touch $@

clean: ## remove the demo's outputs
	rm -rf runs/demo
