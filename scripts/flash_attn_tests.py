"""FlashAttention's own tests, run against `diffqkv.flash_attn_interface` on the CPU.

    flash_attn_tests.py SOURCE [--ref REF] [--sample N] [--seed N] [--largest N] [pytest's options]

SOURCE: a checkout of FlashAttention, a git repository of it, or where to clone one from. Its tests/test_flash_attn.py
imports a package flash_attn that is made up here: our functions under its names. Only the file's devices are changed.
Prints how many comparisons passed, failed and were left out, and why; the exit status is 1 if any failed or none ran.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from diffqkv import flash_attn_interface

TESTS, PADDING = "tests/test_flash_attn.py", "flash_attn/bert_padding.py"
# A GPU that all tests are meant for; and 250 repetitions of one test, which wait for a race of GPU threads, are 2.
REPLACED = {
    'torch.cuda.get_device_capability("cuda")': "(8, 0)",
    'torch.cuda.get_device_properties("cuda").total_memory': "80 * 2**30",
    '"cuda"': '"cpu"',
    "range(250)": "range(2)",
}
PRIVATE = {
    "test_flash_attn_varlen_paged_kv_num_splits": "calls a private function, _flash_attn_varlen_forward",
    "test_flash_attn_generator_arg_must_be_none": "calls the C++ extension",
}


# ---- the source ------------------------------------------------------------------------------------------------------


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def fetch(source: str, ref: str, folder: Path) -> None:
    """Puts the files that are needed into folder, the tests with REPLACED."""
    if (Path(source) / TESTS).is_file():
        texts = [(Path(source) / name).read_text() for name in (TESTS, PADDING)]
    else:
        if not Path(source).exists():
            clone = folder / "clone"
            git("clone", "--quiet", "--bare", "--depth=1", "--filter=blob:none", f"--branch={ref}", source, str(clone))
            source = str(clone)
        texts = [git("-C", source, "show", f"{ref}:{name}") for name in (TESTS, PADDING)]
    tests, padding = texts
    for old, new in REPLACED.items():
        tests = tests.replace(old, new)
    (folder / Path(TESTS).name).write_text(tests)
    (folder / Path(PADDING).name).write_text(padding)


# ---- the package flash_attn ------------------------------------------------------------------------------------------


def with_its_scaling(function: Callable) -> Callable:
    """function with S_dmask as FlashAttention has it: each weight divided by the largest of its block of a row.

    The tests multiply it back, for which they ask for the size of a block: here one holds the whole row.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if not isinstance(result, tuple) or result[2].numel() == 0:
            return result
        out, lse, s_dmask = result
        largest = s_dmask.abs().amax(-1, keepdim=True)
        return out, lse, s_dmask / torch.where(largest > 0, largest, 1)

    return call


def apply_rotary_emb(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """RoPE of x `[b, s, heads, d]`, as complex numbers; cos, sin `[positions, d_rot / 2]`."""
    b, s, _, _ = x.shape
    positions = torch.arange(s) + torch.as_tensor(seqlen_offsets).expand(b)[:, None]
    angle = torch.complex(cos.float(), sin.float())[positions.long()][:, :, None]
    pairs = cos.shape[1]
    turned, rest = x[..., : 2 * pairs].float(), x[..., 2 * pairs :]
    turned = turned.unflatten(-1, (pairs, 2)) if interleaved else turned.unflatten(-1, (2, pairs)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(turned.contiguous()) * angle)
    turned = turned if interleaved else turned.transpose(-1, -2)
    return torch.cat([turned.flatten(-2).to(x.dtype), rest], -1)


def install(folder: Path) -> None:
    """Makes `import flash_attn` find our functions, and the checkout's own bert_padding."""
    functions = {n: f for n, f in vars(flash_attn_interface).items() if n.startswith("flash_attn_")}
    for name in functions.keys() - {"flash_attn_with_kvcache"}:
        functions[name] = with_its_scaling(functions[name])
    blocks = {"_get_block_size_n": lambda *_: sys.maxsize, "USE_TRITON_ROCM": False}
    modules = {
        "flash_attn": functions,
        "flash_attn.flash_attn_interface": functions | blocks,
        "flash_attn.layers": {},
        "flash_attn.layers.rotary": {"apply_rotary_emb": apply_rotary_emb},
    }
    for name, contents in modules.items():
        sys.modules[name] = module = ModuleType(name)
        vars(module).update(contents, __path__=[])
    spec = importlib.util.spec_from_file_location("flash_attn.bert_padding", folder / Path(PADDING).name)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


# ---- the run ---------------------------------------------------------------------------------------------------------


class Sample:
    """Leaves out what cannot or need not run, takes a sample of the rest, and counts."""

    def __init__(self, size: int, seed: int, largest: int) -> None:
        self.size, self.seed, self.largest = size, seed, largest
        self.left_out: Counter[str] = Counter()
        self.results: Counter[str] = Counter()

    def why_not(self, name: str, parameters: dict[str, Any]) -> str | None:
        if parameters.get("alibi"):
            return "ALiBi is not built"
        if name in PRIVATE:
            return PRIVATE[name]
        s_q, s_k = (parameters.get(name, parameters.get("seqlen", 1)) for name in ("seqlen_q", "seqlen_k"))
        if s_q * s_k > self.largest:
            return f"more than {self.largest} scores per head, for a CPU"
        return None

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        chosen = []
        for item in items:
            callspec = getattr(item, "callspec", None)
            reason = self.why_not(item.originalname, callspec.params if callspec else {})
            if reason is None:
                chosen.append(item)
            else:
                self.left_out[reason] += 1
        size = min(self.size, len(chosen)) if self.size else len(chosen)
        self.left_out["not in the sample"] = len(chosen) - size
        numbers = sorted(random.Random(self.seed).sample(range(len(chosen)), size))
        items[:] = [chosen[number] for number in numbers]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.left_out[f"the file itself: {report.longrepr[2].removeprefix('Skipped: ')}"] += 1
        elif report.failed:
            self.results["failed"] += 1
        elif report.when == "call":
            self.results["passed"] += 1

    def summary(self) -> str:
        lines = [f"{self.results['passed']} passed, {self.results['failed']} failed, {self.left_out.total()} left out:"]
        return "\n".join(lines + [f"  {n:>7} {reason}" for reason, n in self.left_out.items() if n])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="a checkout, a git repository, or where to clone one from")
    parser.add_argument("--ref", default="v2.8.3", help="tag or commit, unless source is a checkout (%(default)s)")
    parser.add_argument("--sample", type=int, default=637, help="how many to run, 0: all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which sample (%(default)s)")
    parser.add_argument("--largest", type=int, default=65536, help="queries times keys at most (%(default)s)")
    args, pytest_options = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            fetch(args.source, args.ref, folder)
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"flash_attn_tests: {getattr(error, 'stderr', None) or error}", file=sys.stderr)
            return 2
        install(folder)
        sample = Sample(args.sample, args.seed, args.largest)
        options = [str(folder / Path(TESTS).name), f"--rootdir={folder}", "-q", "-p", "no:cacheprovider"]
        status = pytest.main([*options, "--tb=short", "--show-capture=no", *pytest_options], plugins=[sample])
    print(sample.summary())
    return int(status != 0 or sample.results["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main())
