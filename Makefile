# make bench   install into .venv and run the main benchmark
# make test    install into .venv and run the test suite
#
# Variables: PYTHON (interpreter to build .venv with), TORCH (what to install where torch is missing),
# EXTRAS (optional dependencies), ARGS (passed on to the benchmark or to pytest).

PYTHON ?= python3
TORCH ?= torch==2.13.0
EXTRAS ?= test,bench,cli
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: bench test lint install

bench: install
	$(BIN)/python bench/throughput.py $(ARGS)

test: install
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: install
	$(BIN)/python -m pip install --quiet ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/.installed

# A machine's own torch (a GPU image's, say) is used if PYTHON has one; else TORCH is installed.
$(VENV)/.installed: setup.py pyproject.toml sfs_triton/__init__.py
	@if $(PYTHON) -c "import torch" 2>/dev/null; then \
	  test -d $(VENV) || $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  test -d $(VENV) || $(PYTHON) -m venv $(VENV); \
	fi
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRAS)]"
	@touch $@
