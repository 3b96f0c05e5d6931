# make bench           install into .venv and run the main benchmark
# make bench-all       everything that can be measured without a GPU, a quarter of an hour; into bench/results/<machine>/
# make bench-kernels   each kernel beside eager torch, torch.compile and libraries; toy sizes where there is no GPU
# make test            install into .venv and run the test suite
# make test-quick      the part of the suite that needs torch alone, about a minute: before each commit
# make test-slow       what the test suite leaves out: all recorded cases and kernel variants, and other long tests
# make test-cpus       the numeric tests as other CPUs compute: other instruction sets and orders of summation, two threads
# make test-oldest     the kernels' tests under the oldest triton that will do, in .venv-oldest
# make test-ptx        kernel tests and whole generations, executed as PTX for sm_80 and sm_90; 20 minutes; needs g++
# make fuzz            random models, samplers, batches and hostile checkpoints: FUZZ_CASES of them; into FUZZ_REPORT
# make soak            mixed requests against a server for MINUTES, 30 if not said; into bench/results/<machine>/
# make audit           bandit over the code, pip-audit over what is installed (that needs a network)
# make docs            build docs/ into site/
# make resources       compile every kernel variant ahead of time and write kernels/resources.json
#
# Variables, read when .venv is made (remove it to choose anew): PYTHON (interpreter), TORCH (what to install where
# torch is missing or older than 2.11), EXTRAS (optional dependencies), PINS (versions of others). ARGS is passed on to
# the benchmark or to pytest. FUZZ_CASES, FUZZ_SEED, FUZZ_REPORT: how many cases, from which seed (default: the time), and
# where the counts go. CPUS, NUMERIC: which settings and tests make up test-cpus. PTX_RECORDS: a folder for what test-ptx
# counts.

PYTHON ?= python3
TORCH ?= torch==2.13.0
EXTRAS ?= test-all,bench,cli
PINS ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

# Compiled once, and kept: without it each of the many processes of the tests would compile torch again.
unexport PYTHONDONTWRITEBYTECODE

# The interpreter of this triton fails with newer numpy.
OLDEST := "triton==3.6.0" "numpy<2.4"

MINUTES ?= 30
FUZZ_CASES ?= 5000
FUZZ_SEED ?= $(shell date +%s)
FUZZ_REPORT ?= fuzz.json.partial

# Tests whose verdict rests on floating-point arithmetic: logits, scores, decisions and whole generations on the CPU.
NUMERIC ?= $(addprefix tests/,bench/test_baselines.py bench/test_embedded.py bench/test_inflate.py decoding/test_reference.py \
  decoding/test_region.py decoding/test_samplers.py distributed engine/test_conformance.py \
  integrations/test_transformers.py kernels/test_steps.py models ops runner/test_execution.py scheduling/test_batches.py)
# Each word is a setting, its variables apart by commas. An x86 CPU needs AVX2 for the second. The first differs from
# every machine's own choice. ATen's default alone fails where oneDNN has AMX: torch's attention in bfloat16 takes its layout.
CPUS ?= ATEN_CPU_CAPABILITY=default,MKL_CBWR=COMPATIBLE,ONEDNN_MAX_CPU_ISA=SSE41 \
  ATEN_CPU_CAPABILITY=avx2,MKL_ENABLE_INSTRUCTIONS=AVX2,ONEDNN_MAX_CPU_ISA=AVX2 \
  MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default,ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=2

.PHONY: bench bench-all bench-kernels test test-quick test-slow test-cpus test-oldest test-ptx fuzz soak audit docs resources lint install

bench: $(VENV)/.installed-bench
	$(BIN)/python bench/throughput.py $(ARGS)

bench-all: install
	$(BIN)/python -m bench.all $(ARGS)

bench-kernels: install
	$(BIN)/python -m pytest bench/kernels --benchmark-json=bench/results/kernels.json $(ARGS)

test: install
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-quick: install
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'quick and not slow' $(ARGS)

test-slow: install
	$(BIN)/python -m pytest -m slow $(ARGS)

test-cpus: install
	@failed=; for setting in $(CPUS); do \
	  echo "== $$setting"; \
	  env $$(echo $$setting | tr , ' ') $(BIN)/python -m pytest -q -n auto --dist worksteal $(NUMERIC) $(ARGS) || \
	    failed="$$failed $$setting"; \
	done; test -z "$$failed" || { echo "failed under:$$failed"; exit 1; }

test-oldest:
	$(MAKE) test VENV=.venv-oldest EXTRAS=test,bench PINS='$(OLDEST)' \
	  ARGS='tests/kernels tests/bench/test_kernel_benchmarks.py tests/ops tests/ptx tests/engine/test_conformance.py $(ARGS)'

# Both at once, one core each. The output of each comes when it has finished.
test-ptx: install
	$(MAKE) --no-print-directory -j2 --output-sync=target test-ptx-80 test-ptx-90

test-ptx-%:
	$(BIN)/python -m pytest -q -p tests.ptx.plugin -n 0 --ptx $* $(if $(PTX_RECORDS),--ptx-records $(PTX_RECORDS)) \
	  tests/kernels tests/ptx --ignore=tests/kernels/test_launch.py $(ARGS)

fuzz: install
	FUZZ_CASES=$(FUZZ_CASES) FUZZ_SEED=$(FUZZ_SEED) FUZZ_REPORT=$(FUZZ_REPORT) \
	  $(BIN)/python -m pytest tests/fuzz -n auto $(ARGS)
	@cat $(FUZZ_REPORT)

soak: install
	$(BIN)/python -m pip install --quiet -e ".[serve]"
	$(BIN)/python -m bench.server.soak --minutes $(MINUTES) $(ARGS)

audit: install
	-$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python tests/audit.py

docs: install
	$(BIN)/python -m mkdocs build --strict

resources: install
	$(BIN)/python -m bench.kernels.resources --write

lint: install
	$(BIN)/python -m pip install --quiet ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/.installed

# A machine's own torch (a GPU image's, say) is used if PYTHON has a recent enough one; else TORCH is installed.
HAS_TORCH := import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)

# Python compiles what is imported; pip would compile 24,000 files, one after another. The main benchmark, and the commands
# of README.md's first screen, need a few packages only.
$(VENV)/.installed-bench: EXTRAS := bench,cli,serve
$(VENV)/.installed $(VENV)/.installed-bench: setup.py pyproject.toml sfs_triton/version.py
	@test -x $(BIN)/pip || { rm -rf $(VENV); \
	  if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then own=--system-site-packages; fi; \
	  $(PYTHON) -m venv $$own $(VENV) || { rm -rf $(VENV); \
	    echo "error: $(PYTHON) -m venv failed (Debian and Ubuntu need the package python3-venv)"; exit 1; }; }
	$(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null || $(BIN)/python -m pip install --quiet --no-compile "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-compile -e ".[$(EXTRAS)]" $(PINS)
	@touch $@
