#!/usr/bin/env bash
# Builds the C++ tests in the build folder of the Python package: build_cpp_tests.sh BUILD_FOLDER.
set -euo pipefail
build=$1
has() { echo "#include <$1>" | "${CXX:-c++}" -std=c++17 -E -x c++ - >/dev/null 2>&1; }
if ! has catch2/catch.hpp && ! has catch2/catch_test_macros.hpp; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get -qq update && apt-get -qq install -y catch2 >/dev/null
  else
    echo "tests: Catch2 not found: install it (Debian: apt-get install catch2)" >&2
    exit 1
  fi
fi
cmake -S . -B "$build" -DDIFFQKV_BUILD_TESTS=ON >/dev/null
cmake --build "$build" --parallel "${MAX_JOBS:-$(nproc)}" --target diffqkv_tests diffqkv_cuda_tests
