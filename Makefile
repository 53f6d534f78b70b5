PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# A file stays with one worker: its tests share what they prepared.
WORKERS ?= --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
API := esapn_kernels esapn_kernels.optim esapn_kernels.averaging esapn_kernels.distributed esapn_kernels.reference \
  esapn_kernels.info esapn_kernels.testing esapn_kernels.ops.lookup esapn_kernels.ops.compose esapn esapn.search esapn.config

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install again demo test sanitize asan test-newest clients sharded test-sharded gpu gpu-bench docs lint format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 14

install: $(STAMP) ## build .venv with everything that the others need

demo: $(STAMP) ## a short lookup benchmark, then rows within a budget beside plain tables, into runs/demo
	@mkdir -p runs/demo
	$(BIN)/python bench/lookup.py --quick --out runs/demo/lookup.json
	$(BIN)/python examples/budget.py --out runs/demo

test: $(STAMP) ## run the tests and doctests; PYTEST_ARGS="-k lookup" narrows them
	@$(BIN)/python -m pytest $(WORKERS) --sanitize=0.05 $(PYTEST_ARGS)

sanitize: $(STAMP) ## the kernels' tests with every launch checked for races and bounds, in three orders
	@$(BIN)/python -m pytest tests/kernels $(WORKERS) --sanitize=1 $(PYTEST_ARGS)

# Compiled into a copy of the package: the module in place stays the fast one.
ASAN := build/asan
ASAN_CXX ?= g++
ASAN_FLAGS := -std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all \
  -fvisibility=hidden -fno-exceptions -fno-rtti -fPIC -Wno-psabi -DPy_LIMITED_API=0x030A0000
ASAN_TESTS := compose lookup lookup_bwd resize demote room arena update deferred nonfinite cpu_native
CSRC := $(wildcard esapn_kernels/csrc/*)

asan: $(STAMP) $(patsubst esapn_kernels/csrc/%.cpp,$(ASAN)/%.o,$(filter %.cpp,$(CSRC))) ## the native kernels' tests under address and undefined-behaviour sanitizers
	@rm -rf $(ASAN)/tree && mkdir -p $(ASAN)/tree
	@cp -r conftest.py pyproject.toml README.md esapn_kernels tests $(ASAN)/tree
	@rm -f $(ASAN)/tree/esapn_kernels/_native*
	$(ASAN_CXX) $(ASAN_FLAGS) -shared $(filter %.o,$^) -o $(ASAN)/tree/esapn_kernels/_native.abi3.so
	@cd $(ASAN)/tree && ESAPN_CPU_BACKEND=native ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1048576:malloc_fill_byte=255 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($(ASAN_CXX) -print-file-name=libasan.so) $$($(ASAN_CXX) -print-file-name=libstdc++.so)" \
	  $(abspath $(BIN))/python -m pytest --capture=sys -k native -p no:cacheprovider $(WORKERS) \
	  $(wildcard $(ASAN_TESTS:%=tests/kernels/test_%.py)) $(PYTEST_ARGS)

$(ASAN)/%.o: esapn_kernels/csrc/%.cpp $(CSRC) | $(STAMP)
	@mkdir -p $(ASAN)
	$(ASAN_CXX) $(ASAN_FLAGS) -I"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')" -c $< -o $@

# Beside torch's own Triton, not in its place; TRITON=3.8.0 takes another.
TRITON = $(shell $(BIN)/python -c 'from esapn_kernels.info import TESTED_TRITON as t; print(t[-1])')
NEWEST = $(abspath $(VENV))/triton-$(TRITON)
KERNELS := compile compose group lookup nonfinite sanitizer segments
SHORT := not float16 and not bfloat16 and not float64 and not sm_80 and not sm_100

test-newest: $(STAMP) ## the kernels' tests, shortened, on the newest Triton that is known
	@test -d $(NEWEST)/triton || $(BIN)/python -m pip install --quiet \
	  --disable-pip-version-check --no-deps --upgrade --target $(NEWEST) triton==$(TRITON)
	@PYTHONPATH=$(NEWEST) $(BIN)/python -m pytest $(KERNELS:%=tests/kernels/test_%.py) -k "$(SHORT)" \
	  $(WORKERS) $(PYTEST_ARGS)

# An environment of their own: they bring many packages, which nothing else here needs.
CLIENTS := .venv-clients

clients: $(CLIENTS)/.installed ## RecBole, transformers and others on our class, in .venv-clients; prints docs/clients.md's table
	@$(CLIENTS)/bin/python -m pytest tests/clients -W ignore $(WORKERS) $(PYTEST_ARGS)

# An environment of its own: TorchRec's FBGEMM loads with one version of torch alone.
SHARDED := .venv-sharded

sharded: $(SHARDED)/.installed ## build .venv-sharded: TorchRec for tables over many ranks

test-sharded: $(SHARDED)/.installed ## tables over 1 to 4 ranks against one process, in .venv-sharded
	@$(SHARDED)/bin/python -m pytest tests/sharded esapn_kernels/sharded $(PYTEST_ARGS)

# With $(PYTHON), which has the torch that fits the GPU: nothing is installed.
OUT ?= runs/gpu

gpu: ## on a GPU: races, tests, times and memory checks in under nine minutes, into OUT (runs/gpu)
	@$(PYTHON) bench/gpu.py --out $(OUT)

gpu-bench: ## on a GPU: the benchmarks of the lookup, and of tails and demotion, into OUT
	@mkdir -p $(OUT)
	@PYTHONPATH=$(CURDIR) $(PYTHON) bench/lookup.py --ids 65536 1048576 --repeats 20 --out $(OUT)/lookup.json
	@PYTHONPATH=$(CURDIR) $(PYTHON) bench/hops.py --device cuda --ids 500 1048576 --turns 20 --out $(OUT)/hops.json

docs: $(STAMP) ## write the API reference to build/api, from the docstrings
	@rm -rf build/api
	@$(BIN)/pdoc --no-show-source --docformat google -o build/api $(API)

lint: $(STAMP) ## ruff check, ruff format --check, mypy, and who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(STAMP) ## apply what ruff can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove caches, builds and runs, but no .venv
	rm -rf build dist runs *.egg-info .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	rm -f esapn_kernels/_native*.so
	find . \( -path ./$(VENV) -o -path ./$(CLIENTS) -o -path ./$(SHARDED) \) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$(PYTHON) must be Python 3.10 or newer (set PYTHON=...)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) has no venv module (on Debian: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# What failed for want of a compiler is tried again where there is one.
ifeq ($(wildcard esapn_kernels/_native*.so),)
ifneq ($(shell command -v c++ || command -v g++ || command -v clang++),)
$(STAMP): again
endif
endif

$(STAMP): setup.py constraints.txt $(wildcard esapn_kernels/csrc/*) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,tune,bench,serving,docs,dev]'
	@touch $@

$(CLIENTS)/.installed: setup.py constraints.txt tests/clients/requirements.txt $(wildcard esapn_kernels/csrc/*)
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  --no-deps -r tests/clients/requirements.txt
	@touch $@

$(SHARDED)/.installed: setup.py constraints.txt requirements-sharded.txt $(wildcard esapn_kernels/csrc/*)
	$(PYTHON) -m venv $(SHARDED)
	$(SHARDED)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	$(SHARDED)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-sharded.txt
	@touch $@
