# Every target builds what it needs in .venv, from nothing but Python, and again only when
# pyproject.toml or constraints.txt has changed. Another Python: make test PYTHON=python3.12

PYTHON  ?= python3
WORKERS ?= 2
JOBS    ?= 2
RECIPES ?= ew si igbv1 mgda pcgrad cagrad imtl stl

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check --quiet

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test lint format bench docs clean

help:
	@echo "make demo    compare eight recipes on two-digit images: a table, and a page with pictures"
	@echo "make test    the whole test suite"
	@echo "make lint    ruff, the formatter and the type checker"
	@echo "make format  let ruff fix what it can"
	@echo "make bench   what a training step costs, as ratios to plain SGD"
	@echo "make docs    build the documentation into site/"
	@echo "make clean   remove $(VENV), caches and built files (never runs/)"

demo: $(VENV)/.has-lab
	$(BIN)/equipoise compare $(RECIPES) --data multidigits --seeds 0,1 --jobs $(JOBS) --out runs/demo

# One torch thread a worker: the problems are small, and two workers already fill two cores.
test: $(VENV)/.has-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/.has-dev $(VENV)/.has-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check src

format: $(VENV)/.has-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.has-lab
	$(BIN)/python benchmarks/step.py

docs: $(VENV)/.has-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The documentation: $(CURDIR)/site/index.html"

clean:
	rm -rf $(VENV) site dist build .pytest_cache .ruff_cache .hypothesis
	find src tests examples benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.has-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing equipoise[$*] into $(VENV) (once) ..."
	@$(PIP) install -c constraints.txt --editable ".[$*]"
	@touch $@
