# Two commands set everything up: `make run` and `make test`.  `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What `make run` runs; empty means the app's own setting in pyproject.toml.
METHOD ?=
EPSILON ?=
ROUNDS ?=
CLIENTS ?= 5
SEED ?=
CONFIG ?=

# CPU builds and tested versions.  With a GPU: make install CONSTRAINTS=
CONSTRAINTS ?= constraints-cpu.txt
STAMP := $(VENV)/.installed

.PHONY: help install run test test-fast lint format clean
.DEFAULT_GOAL := help

help: ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(STAMP) $(BIN)/dp-lora ## Make .venv and install everything into it

# Only what the installation depends on: editing code does not install anew.
$(STAMP): pyproject.toml constraints-cpu.txt
	@echo "Installing into $(VENV): a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) $$($(BIN)/python tools/requirements.py)
	@touch $@

# The app runs from this folder and is never installed: its command is a file that says where it is.
$(BIN)/dp-lora: tools/launcher.py $(STAMP)
	@$(BIN)/python tools/launcher.py $(BIN)

run: install ## Run a private federation of simulated clients (METHOD= EPSILON= ROUNDS= CLIENTS= SEED= CONFIG=)
	@$(BIN)/python -m cli.run --clients $(CLIENTS) \
		$(if $(METHOD),--method $(METHOD)) $(if $(EPSILON),--epsilon $(EPSILON)) \
		$(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SEED),--seed $(SEED)) \
		$(if $(CONFIG),--config '$(CONFIG)')

test: test-fast ## Run all tests
	$(BIN)/python -m pytest -m "slow or deploy"

# One thread each: two workers on two cores, and torch threads that wait for each other cost more.
test-fast: install ## Run the tests that start no other processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not deploy" -n 2 --dist loadfile

lint: install ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## Format and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove what was made here, the runs excepted
	rm -rf $(VENV) .flwr .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
