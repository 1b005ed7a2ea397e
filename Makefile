# One target per stage; each can be repeated:  make embed RECIPE=jobs/configs/demo.toml ARGS="--set embed.batch_size=64"
# `make help` lists them all.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

RECIPE ?= jobs/configs/demo.toml
ARGS ?=
OUT ?=
WORKERS ?= 2
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAGES := filter download embed index neighbors latents train sample evaluate

# The address of a cluster's dashboard. RAY_ADDRESS may give it too, if it begins with http.
CLUSTER ?= $(filter http://% https://%,$(RAY_ADDRESS))
RUN = $(BIN)/python -m $(if $(CLUSTER),jobs.cluster.submit "$(CLUSTER)" $@,jobs.$@) $(RECIPE) $(OWN) $(ARGS)

# All other targets that take a recipe use files or ports of this machine.
WITHOUT_RECIPE := help install test check types format docs clean bench% gpu-% $(VENV)/% .venv-bench/%
LOCAL := $(filter-out $(STAGES) optout status $(WITHOUT_RECIPE),$(MAKECMDGOALS))
ifneq ($(if $(filter file,$(origin CLUSTER)),,$(CLUSTER)),)
$(if $(LOCAL),$(error CLUSTER=$(CLUSTER): make $(firstword $(LOCAL)) runs on this machine only. Write CLUSTER= to run it here, or run it on a node of the cluster with RAY_ADDRESS=<head>:6379))
endif

# Without this Ray writes a token to the home folder, and waiting OpenMP threads keep a core busy.
export RAY_AUTH_MODE ?= disabled
export OMP_WAIT_POLICY ?= PASSIVE
export NO_ALBUMENTATIONS_UPDATE ?= 1
# Without compiled modules each process would compile torch again, which takes ten seconds.
unexport PYTHONDONTWRITEBYTECODE
export DS_ACCELERATOR ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)

.PHONY: help install demo import test check types format bench gpu-day gpu-wheels optout database convert finetune docs explore paper report clean status view capacity $(STAGES) bench-step

help: ## list the targets
	@grep -hE '^[a-z$$()A-Z -]+:.*## ' $(MAKEFILE_LIST) | sed -e 's/$$(STAGES)/<stage>/' -e 's/:.*## /\t/' | expand -t 20
	@echo; echo "stages, in order: $(STAGES)"
	@echo "variables: RECIPE=$(RECIPE)  ARGS=\"--set section.key=value\"  ARGS=--dry-run  ARGS=--help"

install: $(VENV)/installed ## create .venv with pinned versions of everything

$(VENV)/installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not here; name a Python 3.11 or 3.12: make PYTHON=python3.12 install"; exit 2; }
	@echo 'installing into .venv: 6 GB, a few minutes'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]'
	@# On all cores; pip would use one. Without the packages' own tests; some packages have templates that are no Python.
	@$(BIN)/python -m compileall -q -j 0 -x '/tests?/' $(VENV)/lib >/dev/null || true
	@touch $@

demo: install ## the full pipeline on a small synthetic data set; ends with runs/demo/report.html (ARGS=--train: all models from nothing, in about 120 minutes)
	$(BIN)/python -m jobs.demo jobs/configs/demo.toml $(ARGS)

# One picture:  make sample PROMPT="a stag" OUT=stag.png ARGS="--database woodcut --seed 3"
sample: OWN = $(if $(PROMPT),--prompt "$$PROMPT") $(if $(OUT),--out "$(OUT)")

# Many machines:  make train HOSTS=hosts.txt RECIPE=...  with lines such as 'gpu-01 slots=8'
train: OWN = $(if $(HOSTS),--hosts "$(HOSTS)")

$(STAGES): install ## run one stage of RECIPE, here or on the Ray cluster CLUSTER=http://head:8265
	$(RUN)

database: install ## style databases: make database NAME=ukiyo-e SOURCE=folder|tar|csv|parquet ARGS=--by-style
	$(BIN)/python -m jobs.database $(RECIPE) --name "$(NAME)" --source "$(SOURCE)" $(ARGS)

import: install ## your own pictures, in place of filter and download: make import SOURCE=folder|tar|parquet RECIPE=...
	$(BIN)/python -m jobs.imports $(RECIPE) --source "$(SOURCE)" $(if $(DATABASE),--database-source "$(DATABASE)") $(ARGS)

finetune: install ## train a finished model on your pictures: make finetune FROM=model.ckpt|folder|run SOURCE=folder RECIPE=...
	$(BIN)/python -m jobs.finetune $(RECIPE) --from "$(FROM)" --source "$(SOURCE)" $(if $(DATABASE),--database-source "$(DATABASE)") $(ARGS)

convert: install ## import a released model or autoencoder, or export to diffusers: make convert FROM=model.ckpt (or TO=folder) RECIPE=...
	$(BIN)/python -m jobs.convert $(RECIPE) $(if $(FROM),--from "$(FROM)") $(if $(TO),--to "$(TO)") $(ARGS)

explore: install ## a page and an HTTP API for search and sampling: ARGS="--port 7860"
	$(BIN)/python -m jobs.explore $(RECIPE) $(ARGS)

paper: install ## the paper's figures and measurements on RECIPE's finished run: runs/<name>/paper/report.html
	$(BIN)/python -m jobs.paper $(RECIPE) $(ARGS)

optout: OWN = --list "$(LIST)"
optout: install ## remove listed images from databases and neighbor tables: make optout LIST=list.txt RECIPE=... (ARGS=--erase: from all files)
	$(RUN)

report: install ## write the demo's report again, from the files on disk
	$(BIN)/python -m jobs.demo.report $(RECIPE) $(ARGS)

status: install ## progress of every stage of RECIPE, from its manifests: ARGS="--watch 10", ARGS=--json
	@$(RUN)

view: install ## a page of pictures, refused rows and neighbors of RECIPE: ARGS="--shard train/00003 --seed 1"
	@$(BIN)/python -m jobs.view $(RECIPE) $(ARGS)

capacity: install ## storage, hours and cost at full size: of laion2b.toml, or of RECIPE
	@$(BIN)/python -m jobs.capacity $(if $(filter file,$(origin RECIPE)),jobs/configs/laion2b.toml,$(RECIPE)) $(ARGS)

test: install ## run all tests and doctests, in WORKERS processes
	OMP_NUM_THREADS=1 XDG_CACHE_HOME="$(CURDIR)/$(VENV)/cache" $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(ARGS)

check: install ## lint, format, types, then all tests; CI runs this
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# Types are checked beside the first tests: alone, mypy would leave a core idle.
	$(MAKE) -j 2 types test

types: install ## check the types
	$(BIN)/mypy

docs: install ## write the drawings of rooms and the numbers of README and guides
	$(BIN)/python -m docs.generate.rooms
	$(BIN)/python -m docs.generate.numbers

format: install ## let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: bench-retrieval bench-loader bench-step bench-schedule ## the benchmarks that need no finished run

# Each target below runs `python -m benchmarks.<MODULE>`, with RECIPE if OWN names it.
BENCHMARKS := $(addprefix bench-,attribution capacity crashes curve download filters grow indexes load loader near-copies optout partitions pipeline retrieval sampling scale schedule)
bench-attribution bench-curve bench-load bench-near-copies bench-sampling: OWN = $(RECIPE)
bench-capacity bench-download bench-loader bench-near-copies bench-optout bench-pipeline: export OMP_NUM_THREADS := 1
bench-pipeline bench-retrieval: .venv-bench/installed

bench-attribution: MODULE = training.attribution## attribution by sampling against a model trained without a style, on RECIPE=jobs/configs/demo_train.toml (two trainings): docs/attribution.md
bench-capacity: MODULE = pipeline.capacity## rates for the capacity plan: docs/capacity.json
bench-crashes: MODULE = crashes## crash tests of the data stages: docs/crashes.md
bench-curve: MODULE = training.curve## contents of the demo's samples at each checkpoint of RECIPE's run, finished or not: docs/curve.md
bench-download: MODULE = pipeline.download## our download against img2dataset: docs/download.md
bench-filters: MODULE = retrieval.filters## search among the rows that meet a condition, also by Lance and zvec after make .venv-bench/installed: docs/filters.md
bench-grow: MODULE = retrieval.grow## add and delete rows of a database, merge databases: docs/grow.md
bench-indexes: MODULE = retrieval.indexes## ways to build and store a partition, autofaiss among them; what they are: docs/guides/searching.md
bench-load: MODULE = page.load## load test of the explore page with 100 visitors: docs/load.md
bench-loader: MODULE = training.loader## speed of the data loader per core: docs/loader.md
bench-near-copies: MODULE = pipeline.near_copies## recall and false removals of near-copy removal with RECIPE's [clip]: docs/near_copies.md
bench-optout: MODULE = pipeline.optout_search## time to find a list of a million ids: docs/optout.md
bench-partitions: MODULE = pipeline.partitions## neighbors inside the visited partitions, with copies of rows and fewer partitions: docs/partitions.md
bench-pipeline: MODULE = pipeline## filter, embed and neighbors against plain code, one and two workers: docs/pipeline.md
bench-retrieval: MODULE = retrieval## our search and join against other libraries: docs/performance.md (other data: ARGS="--rows 300000 --seed 1 --parts search")
bench-sampling: MODULE = training.sampling## samplers against DDIM with 50 steps on RECIPE's finished run: docs/sampling.md
bench-scale: MODULE = scale## requests, time and memory of 231,350 shards in an object store: docs/scale.md
bench-schedule: MODULE = training.schedule## operations and projected days of the paper's training: docs/training.md

.PHONY: $(BENCHMARKS)
$(BENCHMARKS): install
	$(BIN)/python -m benchmarks.$(MODULE) $(OWN) $(ARGS)

bench-step: install ## overhead of the training loop: docs/step.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.training.step $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node=2 -m benchmarks.training.step $(ARGS)

# Without `install`: a GPU machine without a network has libraries of its own, GPU_PYTHON names its Python.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

gpu-day: ## correctness and speed on one CUDA GPU, in half an hour: docs/gpu.md (ARGS="--minutes 9 --only steps", ARGS=--tiny)
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

gpu-wheels: ## pack the wheels for a GPU machine without a network (ARGS=install: install them there)
	$(GPU_PYTHON) -m benchmarks.gpu.wheels $(or $(ARGS),pack)

# Libraries that need other versions than ours, such as NumPy 2, run in a separate environment.
.venv-bench/installed: benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --disable-pip-version-check -r benchmarks/requirements.txt
	@touch $@

clean: ## delete runs/demo
	rm -rf runs/demo
