# Two commands on a fresh machine: `make demo` opens the web app, `make test` runs the tests. Both set up first.
# `make help` lists the rest; every step of the workflows in .github is one of these targets.

PYTHON ?= python3
VENV ?= .venv
# The newest pair tested. torchvision's compiled operators load only beside the build of torch they were compiled for,
# so the two are pinned together. Another pair: make setup TORCH="torch==2.8.0 torchvision==0.23.0"
TORCH ?= torch==2.14.1 torchvision==0.29.1
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
# One process per core with one thread each: two processes that share all cores wait for each other.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile
SPACE ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test test-all test-exhaustive lint workflows format hooks layers docs docs-serve coverage notebooks kernels \
	kernels-check dist dist-check space space-publish clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.installed ## a virtual environment with everything, in .venv

# uv downloads and unpacks in parallel, in a fifth of pip's time; pip installs where uv cannot, for example from an index
# that only pip's configuration names.
INSTALL = $(BIN)/uv pip install --quiet --python $(BIN)/python $(1) 2>$(VENV)/uv.log \
	|| $(BIN)/python -m pip install --quiet --no-compile $(1)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	-@$(BIN)/python -m pip install --quiet --no-compile uv
	$(call INSTALL,$(TORCH) -e ".[dev]")
	touch $@

# Packages that only slow tests need, for comparison. torch is named so that none of them changes it.
$(VENV)/.peers: $(VENV)/.installed
	$(call INSTALL,$(TORCH) -e ".[peers]")
	touch $@

demo: setup ## open the web app
	$(BIN)/python -m demo.app --open

# mypy takes half a minute of one core, so `make lint` runs while tests wait for timers, files and browsers.
BESIDE_LINT = mkdir -p build && { $(MAKE) --no-print-directory lint >build/lint.log 2>&1 & } && lint=$$!; \
	$(1); tests=$$?; wait $$lint || { cat build/lint.log; exit 1; }; exit $$tests

test: setup ## lint, types and the tests but the slow ones
	@$(call BESIDE_LINT,$(PYTEST) -m "not slow and not exhaustive")

test-all: setup $(VENV)/.peers ## every test but the exhaustive ones
	@$(call BESIDE_LINT,$(PYTEST) -m "not exhaustive")

test-exhaustive: setup ## the whole parameter grid of the scan on a CPU, for hours
	$(PYTEST) -m exhaustive

lint: setup ## ruff, mypy, and that dependencies point one way
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

workflows: setup ## check the files of .github
	$(BIN)/actionlint
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml

format: setup ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: setup ## run `make lint` before each commit
	$(BIN)/pre-commit install

layers: setup ## draw the layers and what imports what
	$(BIN)/lint-imports --verbose
	$(BIN)/python -m benchmarks.layers

docs: setup ## build the documentation strictly, into build/site
	$(BIN)/mkdocs build --strict

docs-serve: setup ## the documentation at http://127.0.0.1:8000, rebuilt on change
	$(BIN)/mkdocs serve

coverage: setup ## every test but the exhaustive ones with coverage, into build/coverage
	$(PYTEST) -m "not exhaustive" --cov --cov-report=html:build/coverage --cov-report=term:skip-covered

notebooks: setup ## run the tutorials and store their outputs
	$(BIN)/python notebooks/execute.py

kernels: setup ## cross-compile the CPU library for every platform, after a change in its source
	$(BIN)/python medmamba/kernels/csrc/build.py

kernels-check: setup ## compile the CPU library from source and compare it with the committed one, byte for byte
	$(BIN)/python medmamba/kernels/csrc/build.py --check

dist: setup ## the source archive and the wheel, in dist
	rm -rf dist
	$(BIN)/python -m hatchling build -d dist

dist-check: ## install the wheel of dist into a fresh environment and classify an image with it
	$(PYTHON) -m venv build/try
	build/try/$(notdir $(BIN))/python -m pip install --quiet --no-compile dist/medmamba-*.whl
	cd build && try/$(notdir $(BIN))/python -m medmamba predict ../demo/examples/blood_neutrophil.webp

space: setup ## the folder of the Space, in build/space, and its tests
	$(BIN)/python -m hub.space build build/space
	$(BIN)/python -m pytest tests/hub/test_space.py

space-publish: ## upload build/space: make space-publish SPACE=organisation/name
	@test -n "$(SPACE)" || { echo "say where: make space-publish SPACE=organisation/name"; exit 2; }
	$(BIN)/hf upload "$(SPACE)" build/space . --repo-type space

clean: ## remove what the targets above make
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
