# make bench   install into .venv and run the main benchmark
# make test    install into .venv and run the test suite
#
# Variables, read when .venv is made (remove it to choose anew): PYTHON (interpreter), TORCH (what to install where
# torch is missing or older than 2.11), EXTRAS (optional dependencies). ARGS is passed on to the benchmark or to pytest.

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

# A machine's own torch (a GPU image's, say) is used if PYTHON has a recent enough one; else TORCH is installed.
HAS_TORCH := import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)

$(VENV)/.installed: setup.py pyproject.toml sfs_triton/__init__.py
	@test -x $(BIN)/pip || { rm -rf $(VENV); \
	  if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then own=--system-site-packages; fi; \
	  $(PYTHON) -m venv $$own $(VENV) || { rm -rf $(VENV); \
	    echo "error: $(PYTHON) -m venv failed (Debian and Ubuntu need the package python3-venv)"; exit 1; }; }
	$(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRAS)]"
	@touch $@
