# Two commands on a fresh machine: `make demo` opens the web app, `make test` runs every test. Both set up first.

PYTHON ?= python3
VENV ?= .venv
# The newest version tested. Another build: make setup TORCH="torch==2.11.0"
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test lint format notebooks kernels clean

setup: $(VENV)/.installed

# torch first, in the tested version, and the torchvision that goes with it: other packages would accept any.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" torchvision
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python -m demo.app --open

test: setup lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy medmamba medmamba_command.py hub demo

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Cross-compiles the CPU kernel for every platform, from any platform. Needed only after a change in its source.
kernels: setup
	$(BIN)/python medmamba/kernels/csrc/build.py

notebooks: setup
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
