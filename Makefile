# Two commands are all a newcomer needs: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench interop clean

help:  ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 10

setup: $(STAMP)  ## create .venv with the exact versions of constraints.txt

$(STAMP): setup.py constraints.txt scripts/make_venv.sh
	@sh scripts/make_venv.sh "$(PYTHON)" "$(VENV)"
	@touch $@

demo: $(STAMP)  ## pack records, train on 2 ranks with clusters, print a table (10 minutes at most on 2 cores)
	@$(BIN)/python -m training.demo

test: lint  ## lint, types and all tests
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

lint: $(STAMP)  ## ruff (lint and format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)  ## let ruff write the format and mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP)  ## benchmarks that run on this machine
	@$(BIN)/python -m benchmarks.head

interop: $(STAMP)  ## genuine mxnet reads what we write, and we read what it writes (own environment, Python <= 3.11)
	@sh tests/interop/run.sh

clean:  ## remove the environments and the demo's run
	rm -rf $(VENV) .venv-interop runs/demo
