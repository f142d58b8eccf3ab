# `make chat` and `make test` are all that a reader needs; each makes the environment when it is missing or older than the pins.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PINS := pyproject.toml constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: chat test check clean

chat: $(VENV)/.run  ## talk to the demo model
	@$(BIN)/steer chat

test: $(VENV)/.test  ## run the tests
	@$(BIN)/python -m pytest

check: $(VENV)/.test  ## format, lint, types and import contracts
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

clean:  ## remove the environment and caches
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@echo "making $(VENV) (a minute or two, once)" >&2
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(PINS) | $(BIN)/python
	@echo "installing steer into $(VENV)" >&2
	@$(PIP) torch==2.13.0 && $(PIP) -e .
	@touch $@

$(VENV)/.test: $(PINS) | $(BIN)/python
	@echo "installing steer and its tests' needs into $(VENV)" >&2
	@$(PIP) torch==2.13.0 && $(PIP) -e '.[test]'
	@touch $@ $(VENV)/.run
