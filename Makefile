# make demo   train a small GPT on real text, BF16 against infir2 (about 10 minutes on 2 cores)
# make demo-sft  packed SFT on a generated reasoning set, BF16 against infir2
# make demo-convert   a released model -> Megatron -> CPT -> Hugging Face -> FP8 -> text
# make demo-schedule   one stable run, three decay branches of it
# make test   set up and check: ruff, mypy, import-linter, pytest without the long training tests
# make test-all   the same with them (about an hour on 2 cores)
# All find a Python 3.12 or 3.13 by themselves and build .venv once; PYTHON=... overrides.

VENV ?= .venv
BIN := $(VENV)/bin
# Two tests at a time, files whole; a training run in a test takes one core.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
SITES := .cache

.PHONY: demo demo-sft demo-convert demo-schedule test test-all lint env clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

$(VENV)/.ready: pyproject.toml tools/setup.sh
	@PYTHON="$(PYTHON)" sh tools/setup.sh $(VENV)

env: $(VENV)/.ready

demo: env
	@$(BIN)/megatron-fp8 demo

demo-sft: env
	@$(BIN)/megatron-fp8 demo sft

demo-convert: env
	@$(BIN)/megatron-fp8 convert demo

demo-schedule: env
	@$(BIN)/megatron-fp8 demo schedule

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: env lint
	$(PYTEST) -m "not slow"

test-all: env lint
	$(PYTEST)

clean:
	rm -rf $(VENV) $(SITES) runs
