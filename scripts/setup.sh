#!/usr/bin/env bash
# Makes the virtual environment that the Makefile works in: setup.sh FOLDER. Every obstacle is one sentence and what to do.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
python=${PYTHON:-python3}
needed_mb=4096

die() {
  echo "setup: $*" >&2
  exit 1
}

# The package itself runs on 3.10; the versions of constraints.txt do not.
command -v "$python" >/dev/null || die "$python not found: install Python 3.11 or newer, or name one with PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  die "$("$python" --version) is too old: name Python 3.11 or newer with PYTHON=..."
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  die "$python has no venv module: install it (Debian: apt-get install python3-venv)"
"$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
  [ "${DIFFQKV_PYBIND:-ON}" = OFF ] ||
  die "$python has no headers: install them (Debian: apt-get install python3-dev), or set DIFFQKV_PYBIND=OFF"
compiler=${CXX:-c++}
command -v "$compiler" >/dev/null ||
  die "no C++ compiler found: install one (Debian: apt-get install g++), or name one with CXX=..."
echo '#include <concepts>
static_assert(std::integral<int>);' | "$compiler" -std=c++20 -fsyntax-only -x c++ - 2>/dev/null ||
  die "$compiler cannot compile C++20: install g++ 11 or newer, or name another compiler with CXX=..."
if [ ! -d "$venv" ]; then
  mkdir -p "$(dirname "$venv")"
  free_mb=$(df -Pm "$(dirname "$venv")" | awk 'NR == 2 { print $4 }')
  [ "$free_mb" -ge "$needed_mb" ] ||
    die "$free_mb MB of disk space left, $needed_mb MB needed: free some, or put the environment elsewhere with VENV=..."
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet -c constraints.txt)
"${pip[@]}" torch || die "torch did not install: see pip's message above"
"${pip[@]}" setuptools ninja pybind11 cmeel-fmt
cmake_version=$(cmake --version 2>/dev/null | sed -n '1s/.* //p') || true
printf '3.25\n%s\n' "${cmake_version:-0}" | sort -C -V || "${pip[@]}" cmake
"${pip[@]}" accelerate clang-format datasets hqq hypothesis lm_eval matplotlib numpy optimum-quanto peft psutil pytest pytest-timeout rich ruff safetensors tokenizers tqdm "transformers[serving]" transformers-mlinter
touch "$venv/.ready"
