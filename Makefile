# make demo   train a small GPT on real text, BF16 against infir2 (about 10 minutes on 2 cores)
# make demo-schedule   one stable run, three decay branches of it
# make test   set up and run every check: ruff, mypy, import-linter, pytest
# Both find a Python 3.12 or 3.13 by themselves and build .venv once; PYTHON=... overrides.

VENV ?= .venv
BIN := $(VENV)/bin
SITES := .cache

.PHONY: demo demo-schedule test lint env clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

$(VENV)/.ready: pyproject.toml tools/setup.sh
	@PYTHON="$(PYTHON)" sh tools/setup.sh $(VENV)

env: $(VENV)/.ready

demo: env
	@$(BIN)/megatron-fp8 demo

demo-schedule: env
	@$(BIN)/megatron-fp8 demo schedule

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: env lint
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) $(SITES) runs
