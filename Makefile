# make demo   trains a small Sigma on real text, generates from it, and compares its attention with torch's
#             TEXT="a.txt b.txt" trains on those files; DEMO_ARGS=--restart forgets an earlier run
# make test   all tests, C++ and Python; PYTEST_ARGS="-k cache" chooses
# make test-flash-attn   FlashAttention's own tests against our functions of its names, a sample of them, on the CPU
#             FLASH_ATTN=a checkout, a git repository or a URL; FLASH_ATTN_ARGS="--sample 0 --seed 1 -k kvcache"
# make fuzz   random calls against an oracle of their own for MINUTES=30; OP=decode_attention and SEED=1 choose
# make test-matrix   the Python tests with the oldest and the newest transformers; TRANSFORMERS="5.13.0 5.20.0" chooses
#             others, TORCH="2.11.0 newest" adds the tests of the ops with those
# make test-hf-suite   the tests that transformers runs on its own models, on Sigma; HF_SUITE=FOLDER is a checkout of it
# make build  the library, in place
# make lint   style
# Each sets up what it needs: a virtual environment in VENV, the versions of constraints.txt, the library.
VENV ?= .venv
TRANSFORMERS ?= oldest newest
export DIFFQKV_BUILD_DIR := $(abspath build/cmake)
export PYTHON ?= python3
BIN := $(VENV)/bin
# cmake and ninja may come from the environment.
export PATH := $(abspath $(BIN)):$(PATH)
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml
FLASH_ATTN ?= https://github.com/Dao-AILab/flash-attention

.PHONY: demo test test-flash-attn test-matrix test-hf-suite fuzz build lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	PYTHONPATH=examples/python $(BIN)/python -m demo $(TEXT) $(DEMO_ARGS)

test: $(VENV)/.built
	scripts/build_cpp_tests.sh $(DIFFQKV_BUILD_DIR)
	ctest --test-dir $(DIFFQKV_BUILD_DIR) --output-on-failure
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-flash-attn: $(VENV)/.built
	$(BIN)/python scripts/flash_attn_tests.py $(FLASH_ATTN) $(FLASH_ATTN_ARGS)

fuzz: $(VENV)/.built
	PYTHONPATH=tests/python/support $(BIN)/python -m fuzz --minutes $(or $(MINUTES),30) $(addprefix --op ,$(OP)) $(addprefix --seed ,$(SEED))

test-matrix: $(VENV)/.built
	$(BIN)/python scripts/test_matrix.py --transformers "$(TRANSFORMERS)" --torch "$(TORCH)" $(PYTEST_ARGS)

test-hf-suite: $(VENV)/.built
	scripts/hf_suite.sh $(BIN)/python $(PYTEST_ARGS)

build: $(VENV)/.built

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/lint_models.py
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

clean:
	rm -rf build dist python/*.egg-info python/diffqkv/*.so python/diffqkv/include python/diffqkv/share $(VENV)/.built

$(VENV)/.ready: scripts/setup.sh constraints.txt
	scripts/setup.sh $(VENV)

$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	@echo "building the library: some minutes the first time"
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-build-isolation --no-deps -e .
	touch $@
