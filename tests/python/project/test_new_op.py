"""A copy of the tree gets a new op by CONTRIBUTING's list, is built for the CPU, and computes."""

import os
import re
import shutil
import subprocess
import sys

from pages import PAGES
from paths import ROOT

NEW_OP = PAGES["CONTRIBUTING.md"].partition("## A new op")[2].partition("\n## ")[0]

# A file, a line of it (the first that has this text), and what follows that line.
ADDED = [
    (
        "csrc/params/params.h",
        "namespace diffqkv {",
        """
// rescale: out = factor * x over numel contiguous elements of fp32.
struct RescaleParams {
  const float* x = nullptr;
  float* out = nullptr;
  int64_t numel = 0;
  float factor = 1.0f;
};
""",
    ),
    (
        "csrc/cpu/kernels/kernels.h",
        "KERNEL(void, swiglu, ",
        "  KERNEL(void, rescale, (const RescaleParams&, int64_t begin, int64_t end)) \\\n",
    ),
    (
        "csrc/cpu/run.h",
        "void run(const SwigluParams&",
        "void run(const RescaleParams& params, const Caller& caller);\n",
    ),
    (
        "python/diffqkv/reference.py",
        "MAX_ADDED = 4",
        '''

def rescale(x: Tensor, factor: float) -> Tensor:
    """factor * x."""
    return factor * x
''',
    ),
    ("python/diffqkv/ops/__init__.py", "from .swiglu import", "from .rescale import rescale\n"),
    ("python/diffqkv/ops/__init__.py", '    "swiglu",', '    "rescale",\n'),
]
NEW_FILES = {
    "csrc/cpu/rescale.cpp": """
#include "cpu/isa.h"
#include "cpu/items.h"
#include "cpu/kernels/kernels.h"
#include "cpu/run.h"

namespace diffqkv::cpu {

void run(const RescaleParams& p, const Caller& caller) {
  constexpr int64_t kElementsPerItem = 4096;
  const int64_t items = (p.numel + kElementsPerItem - 1) / kElementsPerItem;
  for_items(items, caller.threads, caller.parallel, [&](int64_t i, int64_t) {
    cpu_kernels().rescale(p, i * kElementsPerItem, std::min(p.numel, (i + 1) * kElementsPerItem));
  });
}

}  // namespace diffqkv::cpu
""",
    "csrc/cpu/kernels/rescale.cpp": """
#include "cpu/kernels/kernels.h"

namespace diffqkv::DIFFQKV_ISA {
void rescale(const RescaleParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) p.out[i] = p.factor * p.x[i];
}
}  // namespace diffqkv::DIFFQKV_ISA
""",
    "csrc/ops/rescale.cpp": """
#include "ops/checks.h"
#include "ops/device.h"
#include "ops/registration.h"
#include "ops/views.h"

namespace diffqkv {
namespace {

Tensor rescale(const Tensor& x, double factor) {
  const TensorChecks checks("x", x, {ScalarType::Float});
  DIFFQKV_CHECK(factor >= 0 && factor < 100, "factor: got ", text_of(factor), ", want a number from 0 to 100");
  const Tensor packed = torch::stable::contiguous(x), out = torch::stable::new_empty(x, x.sizes());
  const RescaleParams params = {data_of<const float>(packed), data_of<float>(out), x.numel(), float(factor)};
  Device("rescale", x).run(params);
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(diffqkv, m) { m.def("rescale(Tensor x, float factor) -> Tensor"); }
DIFFQKV_REGISTER_CPU(rescale)

}  // namespace
}  // namespace diffqkv
""",
    "python/diffqkv/ops/rescale.py": '''
import torch
from torch import Tensor

from . import checks, dispatch
from .arguments import as_number
from .calls import call
from .checks import any_tensor, wrong
from .op import Op


def _check(x: Tensor, factor: float) -> None:
    checks.kind("x", x, x, (torch.float32,))
    if not 0 <= factor < 100:
        raise wrong("factor", factor, "a number from 0 to 100")


def _composed(x: Tensor, factor: float) -> Tensor:
    return x * factor


def _fake(x: Tensor, factor: float) -> Tensor:
    return x.new_empty(x.shape)


_OP = dispatch.register(Op("rescale", check=_check, fake=_fake, composed=_composed))


def rescale(x: Tensor, factor: float) -> Tensor:
    """factor * x."""
    any_tensor("x", x)
    run = dispatch.uses_kernel(_OP, x)
    return call(_OP.kernel if run else _OP.composed, x, as_number("factor", factor))
''',
}
CALLS = """
import sys
import torch
import diffqkv
from diffqkv import reference
from diffqkv.ops.dispatch import OPS

assert diffqkv.config()["library"] == sys.argv[1], diffqkv.config()
x = torch.randn(3, 20001).T
paths = diffqkv.rescale, OPS["rescale"].composed
for path in paths:
    torch.testing.assert_close(path(x, 2.5), reference.rescale(x, 2.5))
texts = []
for path in paths:
    try:
        path(x, -1.0)
    except ValueError as error:
        texts.append(str(error))
assert texts == ["factor: got -1.0, want a number from 0 to 100"] * 2, texts
torch.library.opcheck(torch.ops.diffqkv.rescale.default, (x, 2.5), test_utils=("test_schema", "test_faketensor"))
compiled = torch.compile(lambda x: diffqkv.rescale(x, 3.0) + 1, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(x), 3 * x + 1)
print("the new op works")
"""


def test_the_list_for_a_new_op_is_complete(tmp_path, library):
    tree = tmp_path / "diffqkv"
    for name in ("CMakeLists.txt", "cmake", "csrc", "python"):
        source, target = ROOT / name, tree / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            tree.mkdir()
            shutil.copy(source, target)
    for name, anchor, text in ADDED:
        lines = (tree / name).read_text().splitlines(keepends=True)
        at = next(i for i, line in enumerate(lines) if anchor in line)
        (tree / name).write_text("".join([*lines[: at + 1], text, *lines[at + 1 :]]))
    for name, text in NEW_FILES.items():
        (tree / name).write_text(text)

    build = tmp_path / "build"
    options = ["-G", "Ninja", "-DDIFFQKV_CUDA=OFF", "-DDIFFQKV_PYBIND=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (["cmake", "-S", tree, "-B", build, *options], ["cmake", "--build", build, "--target", "diffqkv"]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    path = build / "libdiffqkv.so"
    environment = os.environ | {"PYTHONPATH": str(tree / "python"), "DIFFQKV_LIBRARY": str(path)}
    done = subprocess.run([sys.executable, "-c", CALLS, str(path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "the new op works" in done.stdout, done.stderr[-3000:]


def test_the_list_for_a_new_op_names_every_file_that_it_touches():
    for name in [*(name for name, *_ in ADDED), *(name.replace("rescale", "x") for name in NEW_FILES)]:
        assert re.search(rf"\b{re.escape(name.rpartition('/')[2])}", NEW_OP), name
