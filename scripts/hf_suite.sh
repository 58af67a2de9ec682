#!/usr/bin/env bash
# Runs the generic test suite of the installed transformers on Sigma: hf_suite.sh PYTHON [arguments of pytest].
# The suite is fetched: wheels do not hold it, and sdists only a part. HF_SUITE=FOLDER names a checkout that exists.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift

die() {
  echo "hf-suite: $*" >&2
  exit 1
}

version=$("$python" -c 'import transformers; print(transformers.__version__)') ||
  die "$python has no transformers: run make build first"
suite=${HF_SUITE:-build/hf-suite/transformers-$version}
if [ -z "${HF_SUITE:-}" ] && [ ! -d "$suite" ]; then
  mkdir -p build/hf-suite
  rm -rf "$suite.part"
  git clone --quiet --depth 1 --branch "v$version" https://github.com/huggingface/transformers "$suite.part" ||
    die "transformers v$version could not be cloned: name a checkout of it with HF_SUITE=FOLDER"
  mv "$suite.part" "$suite"
fi
[ -f "$suite/tests/causal_lm_tester.py" ] ||
  die "HF_SUITE: got $suite, want a checkout of transformers v$version (it has tests/causal_lm_tester.py)"
packages=build/hf-suite/packages
"$python" -c 'import parameterized' 2>/dev/null || [ -d "$packages/parameterized" ] ||
  "$python" -m pip --disable-pip-version-check install --quiet --no-deps --target "$packages" parameterized

# No test needs the hub: those that do are skipped by it.
export HF_HUB_OFFLINE=1
export PYTHONPATH=$(realpath "$suite"):$PWD/$packages${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m pytest -c tests/hf_suite/pytest.ini tests/hf_suite "$@"
