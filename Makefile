# `make demo` and `make test` each do all the set-up they need, once. Settings, on the command line or in the environment:
#   PYTHON       the interpreter to make .venv with
#   TEXT         for demo: files of text to train on instead of Python's documentation
#   DEMO_ARGS    for demo: more arguments, e.g. --restart
#   PYTEST_ARGS  for test: arguments of pytest, e.g. "-k cache"
#   DIFFQKV_CUDA, DIFFQKV_PYBIND, CMAKE_CUDA_ARCHITECTURES, MAX_JOBS, CXX: see README.md
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
# cmake and ninja may come from the virtual environment.
export PATH := $(BIN):$(PATH)

SOURCES := CMakeLists.txt setup.py $(shell find cmake csrc -type f)
REQUIREMENTS := $(VENV)/.requirements
BUILT := build/.built

.PHONY: help venv build demo test lint clean

help:
	@echo "make demo   train a small Sigma on text, generate from it, time its attention (about five minutes after the set-up)"
	@echo "make test   run all tests"
	@echo "make build  set up .venv and build the library in place"
	@echo "make venv   set up .venv alone"
	@echo "make lint   check the style of Python and C++"
	@echo "make clean  remove what was built (not .venv, not runs)"

venv: $(REQUIREMENTS)

$(REQUIREMENTS): constraints.txt
	@tools/check_machine.sh "$(PYTHON)"
	"$(PYTHON)" -m venv $(VENV)
	@echo "installing torch and the build tools into $(VENV)"
	$(PIP) torch "setuptools>=77" ninja pybind11 cmeel-fmt
	@tools/has_cmake.sh || $(PIP) "cmake>=3.25"
	@touch $@

build: $(BUILT)

# Python files need no rebuild: the install is editable.
$(BUILT): $(REQUIREMENTS) pyproject.toml $(SOURCES)
	@echo "building the library (minutes the first time) and installing what demo and tests need"
	$(PIP) --no-build-isolation -e ".[test]"
	@mkdir -p $(@D)
	@touch $@

demo: $(BUILT)
	PYTHONPATH=examples/python:benchmarks $(BIN)/python -m demo $(TEXT) $(DEMO_ARGS)

test: $(BUILT)
	tools/cpp_tests.sh $(BIN)/python
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(REQUIREMENTS)
	$(PIP) ruff clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

clean:
	rm -rf build python/diffqkv/*.so python/diffqkv/include python/diffqkv/share
