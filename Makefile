# Every target does the set-up it needs, once.
PYTHON ?= python3
PYTEST_ARGS ?=
BIN := .venv/bin
# --no-compile: byte-compiling every package would double the time.
PIP := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --no-compile
PIP_INSTALL := $(PIP) -c constraints.txt
# Without the jobserver of make, whose pipe Python does not hand on to ninja.
BUILD := MAKEFLAGS= $(BIN)/python setup.py --quiet build_ext --inplace
CXX_SOURCES = $(foreach suffix,h cpp cu,$(wildcard $(addsuffix .$(suffix),csrc/* csrc/*/* csrc/*/*/*)))

# A worker a core. PYTEST_ARGS="-n 0 --pdb" runs without any; arguments that come last win.
WORKERS := -n logical --maxprocesses 8 --dist worksteal
PYTEST := $(BIN)/python -m pytest $(WORKERS)
# Tests start some hundred Pythons: without bytecode files each would compile PyTorch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-fast test-oldest test-newest lint format bench build clean distclean
.DEFAULT_GOAL := build

# Fewer steps than by default, to finish within minutes, installation included.
demo: build
	$(BIN)/nar-kernels train --data digits --labels data --steps 700 --out runs/demo --overwrite

# Before a commit: lint and all tests but those marked slow.
# mypy needs one core for about as long as the CUDA extension takes.
test:
	@$(MAKE) --no-print-directory -j 2 lint .venv/built-for-tests
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

# What CI runs: every test.
test-all:
	@$(MAKE) --no-print-directory -j 2 lint .venv/built-for-tests .venv/triton-3.6.0
	$(PYTEST) $(PYTEST_ARGS)

# All but the slow tests, with the oldest supported versions and with the newest that pip installs:
# each in a virtual environment of its own, with several GB of CUDA packages.
test-oldest: OTHER_VERSIONS = torch==2.6.0 triton==3.2.0 'numpy<2.2' 'transformers<5'
test-newest: OTHER_VERSIONS = torch triton
test-oldest test-newest: .venv/built-for-tests
	$(PYTHON) -m venv --clear .venv/$@
	.venv/$@/bin/python -m pip install --quiet 'setuptools>=77' pybind11 ninja
	NAR_KERNELS_CUDA_ARCHS=all .venv/$@/bin/python -m pip install --quiet --no-build-isolation $(OTHER_VERSIONS) -e '.[test]'
	.venv/$@/bin/python -m pytest $(WORKERS) -m "not slow" $(PYTEST_ARGS)

# While editing: nothing that takes seconds, and no Triton.
test-fast: .venv/built .venv/installed-dev
	$(BIN)/ruff check
	$(PYTEST) -m "not slow and not seconds and not triton" $(PYTEST_ARGS)

lint: .venv/built .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/mypy
	$(if $(CXX_SOURCES),$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES))

format: .venv/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(if $(CXX_SOURCES),$(BIN)/clang-format -i $(CXX_SOURCES))

bench: .venv/built .venv/installed-dev
	$(BIN)/python benchmarks/bench_corrupt.py
	$(BIN)/python benchmarks/bench_drop_ins.py
	$(BIN)/python benchmarks/bench_nll.py
	$(BIN)/python benchmarks/bench_masked_nll.py --dtype float32
	$(BIN)/python benchmarks/bench_row_counts.py
	$(BIN)/python benchmarks/bench_train_step.py
	$(BIN)/python benchmarks/bench_generate.py
	$(BIN)/python benchmarks/bench_cache.py
	$(BIN)/python benchmarks/bench_unmask.py
	$(BIN)/python benchmarks/bench_choose.py
	$(BIN)/python benchmarks/bench_loader.py
	$(BIN)/python benchmarks/bench_cold.py
	$(BIN)/python benchmarks/bench_scan.py
	$(BIN)/python benchmarks/bench_packing.py
	$(BIN)/python benchmarks/bench_documents.py
	$(BIN)/python benchmarks/bench_blocks.py
	$(BIN)/python benchmarks/bench_block_mask.py
	$(BIN)/python benchmarks/bench_block_attention.py
	$(BIN)/python benchmarks/bench_cart.py
	$(BIN)/python benchmarks/bench_prepare.py

build: .venv/built .venv/installed

ifneq ($(NAR_KERNELS_CUDA)$(NAR_KERNELS_CUDA_ARCHS),)
.PHONY: .venv/built  # the choice may have changed
endif

# The directories are named too: their times change when a file is added or removed.
.venv/built: .venv/requirements setup.py $(sort $(dir $(CXX_SOURCES))) $(CXX_SOURCES)
	@$(BUILD)
# After a failed build there is no library, and the next make tries again.
	@if ls nar_kernels/_cpp.*.so >/dev/null 2>&1; then touch $@; fi

# Tests inspect the CUDA extension also without a GPU: of one architecture, which takes a minute.
# What others have in registers and instructions is looked at by tests/ops/test_gpu_code.py, which
# reads this one: with line numbers, and a warning is an error.
.venv/built-for-tests: .venv/built .venv/installed-dev
	@NVCC_APPEND_FLAGS="-lineinfo -Werror all-warnings -Xcompiler=-Werror $$NVCC_APPEND_FLAGS" \
	    NAR_KERNELS_CUDA_ARCHS="$${NAR_KERNELS_CUDA_ARCHS:-90}" $(BUILD)
	@touch $@

# The Triton of PyTorch 2.11: tests compile and launch the kernels with it, too.
.venv/triton-3.6.0: .venv/bin/python
	@if [ "$$(uname -s)" != Linux ] || ! $(PIP) --no-deps --target $@ triton==3.6.0; then \
	    echo "Triton 3.6.0 is not installed beside the other: its tests will skip"; fi

.venv/requirements: .venv/bin/python constraints.txt
	@echo "Installing what the package needs into .venv (a minute the first time)"
	@$(PIP_INSTALL) setuptools pybind11 ninja
	@touch $@

# After the build, whose output pip would hide: it finds everything compiled.
.venv/installed: pyproject.toml constraints.txt | .venv/built
	@$(PIP_INSTALL) --no-build-isolation -e '.[train,prepare]'
	@touch $@

# All at once: a second run of pip would look everything up again.
.venv/installed-dev: pyproject.toml constraints.txt | .venv/built
	@echo "Installing the development packages into .venv"
	@$(PIP_INSTALL) --no-build-isolation -e '.[train,prepare,test,dev]'
	@touch .venv/installed $@

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || \
	    { echo "make: $(PYTHON) is not there; name a Python: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: nar_kernels needs Python 3.10 or newer, and $(PYTHON) is" \
	      "$$($(PYTHON) --version 2>&1); choose another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "make: $(PYTHON) cannot make virtual environments" \
	      "(Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

clean:
	rm -rf build dist *.egg-info nar_kernels/_*.so nar_kernels/_build_failure.txt .venv/built
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find nar_kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
