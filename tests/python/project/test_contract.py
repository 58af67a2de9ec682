"""What PyTorch and the dynamic linker may expect of the library."""

import gc
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers import (
    DTYPES,
    LAYOUTS,
    WITHOUT_CUDA_KERNEL,
    assert_accurate,
    cache_of,
    int32,
    linear_weights,
    qkv,
)
from paths import PACKAGE, ROOT
from torch.utils.flop_counter import FlopCounterMode

import diffqkv
from diffqkv import reference
from diffqkv.ops import dispatch
from diffqkv.ops import library as compiled

HEADS, DIMS = (8, 2, 4), (16, 24)


def op_calls(dtype=torch.float32, layout="rows", paged=False, batch=2):
    """(op, args, kwargs) for every op."""
    q, k, v = qkv(batch, HEADS, 2, 70, DIMS, dtype)
    seqlens, start = int32(70, 33)[:batch], int32(0, 5)[:batch]
    cache = cache_of(k, v, seqlens, layout=layout, block_size=32 if paged else None)
    k_cache, v_cache = cache.k_cache.nan_to_num(0.5), cache.v_cache.nan_to_num(0.5)  # opcheck compares them
    cached = (q, k_cache, v_cache, seqlens)
    options = cache.options | {"cache_start": start}
    stats = torch.zeros(batch, 4, DIMS[1] + 1)
    update = {name: options[name] for name in ("block_table", "k_layout")}
    rope = {"cos": torch.rand(1, 3, 8), "sin": torch.rand(1, 3, 8)}
    new = (k[:, :, :3], v[:, :, :3], torch.tensor([[0, 1, 32], [-1, 31, 3]])[:batch])
    gate, up = torch.randn(2, 3, 40).to(dtype)
    x, bias = torch.randn(batch, 3, 64).to(dtype), torch.randn(96).to(dtype)
    ops = torch.ops.diffqkv
    return [
        (ops.flash_attention.default, (q, k, v), {"causal": True, "kv_start": start, "kv_end": seqlens}),
        (ops.flash_attention.default, (q.transpose(1, 2).contiguous().transpose(1, 2), k, v), {"softmax_scale": 0.1}),
        (ops.decode_attention.default, cached, options),
        (ops.decode_attention.default, cached, options | {"window_left": 9, "softcap": 2.0, "sinks": torch.randn(8)}),
        (
            ops.selective_v_attention.default,
            (*cached, 5),
            options | {"tail": 2, "return_bound": True, "return_indices": True},
        ),
        (ops.selective_v_attention.default, (*cached, 90), options | {"v_stats": stats, "keep_last": 1}),
        (ops.kv_cache_update.default, (k_cache, v_cache, *new), update | rope | {"v_stats": stats}),
        (ops.kv_cache_update.default, (k_cache, v_cache, *new), update),
        (ops.swiglu.default, (gate, up), {}),
        (ops.swiglu_backward.default, (torch.randn_like(gate), gate, up), {}),
        (ops.packed_linear.default, (x, *linear_weights("own", 96, 64, dtype), None, 96), {}),
        (ops.packed_linear.default, (x.mT.contiguous().mT, *linear_weights("int8", 96, 64, dtype), bias, 96), {}),
        (ops.packed_linear.default, (x, *linear_weights("int4", 96, 64, dtype, True), bias, 96), {}),
        (ops.swiglu.default, torch.randn(batch, 3, 80).to(dtype).chunk(2, -1), {}),
        (ops.rms_norm.default, (gate, torch.randn(40).to(dtype), 1e-6), {}),
        (ops.rotary_embedding.default, (k.transpose(1, 2)[:, :3], *rope.values()), {}),
    ]


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(library, dtype, layout, paged):
    for op, args, kwargs in op_calls(dtype, layout, paged):
        torch.library.opcheck(op, args, kwargs)


def test_opcheck_empty_batch_and_gradient(library):
    for op, args, kwargs in op_calls(batch=0):
        # opcheck cannot copy a permuted tensor without elements
        args = [x.new_zeros(x.shape) if isinstance(x, torch.Tensor) else x for x in args]
        torch.library.opcheck(op, args, kwargs)
    gate, up = torch.randn(2, 5, 16, requires_grad=True).unbind(0)
    torch.library.opcheck(torch.ops.diffqkv.swiglu.default, (gate, up.detach()))


# ---- versions --------------------------------------------------------------------------------------------------------


def update_arguments():
    base = torch.randn(2, 2, 8, 16)  # the caches are views
    k_cache, v_cache = reference.group(base, 2), torch.randn(2, 2, 8, 2, 24)
    new = (torch.randn(2, 2, 3, 16), torch.randn(2, 4, 3, 24), torch.tensor([[0, 1, 2], [5, -1, 7]]))
    return base, (k_cache, v_cache, *new), torch.zeros(2, 4, 25)


def update_calls(library):
    """The op by its function and directly."""
    return (diffqkv.kv_cache_update, library.kv_cache_update)


def test_what_is_written_has_a_new_version(library, api):
    for update in update_calls(library):
        base, args, v_stats = update_arguments()
        update(*args, v_stats=v_stats)
        assert base._version == args[0]._version > 0
        assert args[1]._version > 0 and v_stats._version > 0
        assert all(x._version == 0 for x in args[2:])
        versions = [x._version for x in (*args, v_stats)]
        with pytest.raises((ValueError, RuntimeError), match="positions: got"):
            update(*args[:4], args[4] + 2, v_stats=v_stats)
        assert [x._version for x in (*args, v_stats)] == versions
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                update(*args)
            assert all(x._version > before for x, before in zip(args[:2], versions[:2], strict=True))
            versions = [x._version for x in args]


def test_a_graph_does_not_go_on_with_a_cache_that_was_written(library, api):
    def attend(q, base, v_cache):
        return torch.nn.functional.scaled_dot_product_attention(q, base, base + 0 * v_cache.sum())

    for update in (*update_calls(library), torch.compile(diffqkv.kv_cache_update, fullgraph=True, backend="aot_eager")):
        base, args, _ = update_arguments()
        q = torch.randn(2, 2, 1, 16, requires_grad=True)
        out = attend(q, base, args[1])
        want = base.clone()
        update(*args)
        assert not torch.equal(base, want)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_inference_tensors_are_written_in_any_mode(library):
    """They have no version."""
    for update in update_calls(library):
        with torch.inference_mode():
            base, args, v_stats = update_arguments()
            update(*args, v_stats=v_stats)
        assert base.is_inference()
        torch.testing.assert_close(base[0, :, :3], args[2][0])
        with torch.no_grad():
            update(*args[:4], args[4] * 0 - 1 + torch.tensor([4, 0, 0]), v_stats=v_stats)  # the first tokens to slot 3
        torch.testing.assert_close(base[:, :, 3], args[2][:, :, 0])


def assert_same(actual, expected):
    for a, b in zip(torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, equal_nan=True)


def layer_step(q, k, v, k_cache, v_cache, positions, seqlens, cos, sin):
    """One attention layer: cache update, decode, selection, prefill, swiglu, through the public functions."""
    diffqkv.kv_cache_update(k_cache, v_cache, k, v, positions, cos=cos, sin=sin)
    decoded, lse = diffqkv.decode_attention(q, k_cache, v_cache, seqlens, return_lse=True)
    selected, stats = diffqkv.selective_v_attention(q, k_cache, v_cache, seqlens, 4, tail="mean", return_stats=True)
    prefilled = diffqkv.flash_attention(q, k, v, causal=True)
    activated = diffqkv.swiglu(decoded + 1, selected)
    normed = diffqkv.rms_norm(activated, torch.ones_like(activated[0, 0, 0]), 1e-6)
    turned = diffqkv.rotary_embedding(k.transpose(1, 2), cos, sin)
    return activated, lse, stats.kept_mass, prefilled, normed, turned


def layer_inputs(batch, tokens):
    q, k, v = qkv(batch, HEADS, tokens, tokens, DIMS)
    cache = cache_of(torch.zeros(batch, 2, 64, 16), torch.zeros(batch, 4, 64, 24), int32(*[64] * batch))
    positions = torch.arange(tokens).expand(batch, tokens) + 10
    cos, sin = torch.rand(1, tokens, 16), torch.rand(1, tokens, 16)
    return q, k, v, cache.k_cache, cache.v_cache, positions, int32(*[10 + tokens] * batch), cos, sin


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_compile_dynamic(backend):
    """Two shapes, one graph; the caches are written in place."""
    torch._dynamo.reset()
    compiled = torch.compile(layer_step, fullgraph=True, dynamic=True, backend=backend)
    for batch, tokens in ((2, 3), (3, 7)):
        inputs = layer_inputs(batch, tokens)
        copies = [x.clone() for x in inputs]
        assert_same(compiled(*inputs), layer_step(*copies))
        assert_same(inputs, copies)
        assert inputs[3].count_nonzero() > 0


@torch.no_grad()
def test_compile_inductor(library):
    """The generated code writes into the caches, also where a clone of one is used beside the original."""

    def step(k_cache, v_cache, k, v, positions):
        before = k_cache.clone()
        diffqkv.kv_cache_update(k_cache, v_cache, k, v, positions)
        return before, k_cache * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    _, k, v, k_cache, v_cache, positions, *_ = layer_inputs(2, 3)
    copies = (k_cache.clone(), v_cache.clone())
    assert_same(compiled(k_cache, v_cache, k, v, positions), step(*copies, k, v, positions))
    assert_same((k_cache, v_cache), copies)


@torch.no_grad()
def test_export():
    class Layer(torch.nn.Module):
        def forward(self, *args):
            return layer_step(*args)

    inputs = layer_inputs(2, 3)
    program = torch.export.export(Layer(), tuple(x.clone() for x in inputs))
    if compiled.loaded:
        targets = {str(node.target) for node in program.graph.nodes}
        for op in ("flash_attention", "decode_attention", "kv_cache_update", "selective_v_attention", "swiglu"):
            assert any(f"diffqkv.{op}" in target for target in targets), op
    exported, eager = [x.clone() for x in inputs], [x.clone() for x in inputs]
    assert_same(program.module()(*exported), layer_step(*eager))
    assert_same(exported, eager)


@torch.no_grad()
def test_meta_device():
    inputs = layer_inputs(2, 3)
    for meta, real in zip(layer_step(*(x.to("meta") for x in inputs)), layer_step(*inputs), strict=True):
        assert meta.device.type == "meta" and meta.shape == real.shape and meta.dtype == real.dtype
        assert meta.stride() == real.stride()
    with pytest.raises(ValueError, match=r"k: got .+, want"):
        diffqkv.flash_attention(*(x.to("meta") for x in qkv(1, (4, 3, 2), 1, 2, (8, 8))))


def test_flop_counter(library):
    q, k, v = qkv(2, (8, 2, 4), 5, 70, (16, 24))
    cache = cache_of(k, v, int32(70, 9), block_size=32)
    for causal, half in ((False, 1), (True, 2)):
        with FlopCounterMode(display=False) as counter:
            diffqkv.flash_attention(q, k, v, causal=causal)
        assert counter.get_total_flops() == 2 * 2 * 8 * 5 * 70 * (16 + 24) // half
    with FlopCounterMode(display=False) as counter:
        diffqkv.decode_attention(q, cache.k_cache, cache.v_cache, cache.seqlens, block_table=cache.block_table)
    assert counter.get_total_flops() == 2 * 2 * 8 * 5 * 96 * (16 + 24)

    x = torch.randn(5, 2, 64)
    for form in ("own", "int8", "int4"):
        w = linear_weights(form, 40, 64)
        with FlopCounterMode(display=False) as counter:
            diffqkv.packed_linear(x, w.weight, 40, scales=w.scales, zeros=w.zeros)
        assert counter.get_total_flops() == 2 * 10 * 64 * 40


# ---- packed_linear ---------------------------------------------------------------------------------------------------


class Linear(torch.nn.Module):
    def __init__(self, form, n, k, dtype=torch.float32):
        super().__init__()
        w = linear_weights(form, n, k, dtype, zeros=form == "int4")
        for name, x in w._asdict().items():
            if x is None:  # torch.export has no buffers of None
                setattr(self, name, None)
            else:
                self.register_buffer(name, x)
        self.register_buffer("bias", torch.randn(n).to(dtype))

    def forward(self, x):
        n = self.bias.shape[0]
        return diffqkv.packed_linear(x, self.weight, n, scales=self.scales, zeros=self.zeros, bias=self.bias)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("form", ["own", "int8", "int4"])
@torch.no_grad()
def test_packed_linear_compiles(form, backend, api):
    """One graph for any number of rows, and for any sizes of the layer."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda layer, x: layer(2 * x) + 1, fullgraph=True, dynamic=True, backend=backend)
    layer = Linear(form, 40, 64)
    for shape in ((3, 64), (7, 64), (2, 5, 64)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(layer, x), layer(2 * x) + 1)
    other, x = Linear(form, 70, 128), torch.randn(3, 128)
    torch.testing.assert_close(compiled(other, x), other(2 * x) + 1)


@pytest.mark.parametrize("form", ["own", "int8", "int4"])
@torch.no_grad()
def test_packed_linear_is_exported(form, library):
    layer, rows = Linear(form, 40, 64), torch.export.Dim("rows", min=2)
    program = torch.export.export(layer, (torch.randn(3, 64),), dynamic_shapes=({0: rows},))
    assert any("diffqkv.packed_linear" in str(node.target) for node in program.graph.nodes)
    for n in (3, 11):
        x = torch.randn(n, 64)
        assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("form", ["own", "int8", "int4"])
@torch.no_grad()
def test_packed_linear_of_meta_tensors(form, api):
    layer, x = Linear(form, 40, 64, torch.bfloat16), torch.randn(2, 3, 64).bfloat16()
    out = layer.to("meta")(x.to("meta"))
    assert out.device.type == "meta" and out.shape == (2, 3, 40) and out.dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["own", "int8", "int4"])
@torch.no_grad()
def test_packed_linear_under_autocast(form, api):
    """It computes in x's own dtype, also in plain torch, whose products autocast would change."""
    layer, x = Linear(form, 40, 64), torch.randn(3, 64)
    want = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), want)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want)


def test_packed_linear_has_no_gradient(api):
    """In grad mode that is an error, before anything is computed."""
    layer, x = Linear("own", 40, 64), torch.randn(3, 64, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"^x: got requires_grad=True in grad mode, want torch.no_grad\(\): packed_linear"
    ):
        layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="requires_grad=True in grad mode"):
        compiled(x)
    assert not layer(x.detach()).requires_grad


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")
def test_swiglu_gradient():
    gate, up = torch.randn(2, 6, 16)
    for dtype in DTYPES:
        g, u, dout = (x.to(dtype) for x in (gate, up, torch.randn(6, 16)))
        exact, low = (
            torch.autograd.grad(reference.swiglu(a, b, to), (a, b), dout.to(to))
            for to in (torch.float64, dtype)
            for a, b in [(g.to(to).requires_grad_(), u.to(to).requires_grad_())]
        )
        leaves = g.clone().requires_grad_(), u.clone().requires_grad_()
        for actual, e, lo in zip(torch.autograd.grad(diffqkv.swiglu(*leaves), leaves, dout), exact, low, strict=True):
            assert_accurate(actual, e, lo, factor=3)
    # Central differences, in the highest precision that the op has.
    leaves = gate.requires_grad_(), up.requires_grad_()
    assert torch.autograd.gradcheck(diffqkv.swiglu, leaves, eps=1e-2, atol=1e-2, rtol=1e-2, nondet_tol=0)
    double = tuple(x.detach().double().requires_grad_() for x in leaves)
    assert torch.autograd.gradcheck(reference.swiglu, double)


def test_a_call_that_records_nothing_is_still_seen(library):
    """Without a graph a call goes past the keys of autograd, but not past modes, transforms and forward mode."""
    gate, up = torch.randn(2, 3, 5)
    want = library.swiglu(gate, up)
    for x in (gate.clone().requires_grad_(), gate):
        with torch.set_grad_enabled(x is gate):
            out = diffqkv.swiglu(x, up)
            assert torch.equal(out, want) and not out.requires_grad
    assert diffqkv.swiglu(gate, up.clone().requires_grad_()).grad_fn is not None
    with FlopCounterMode(display=False) as counter:
        diffqkv.flash_attention(*qkv(1, (2, 1, 1), 3, 3, (8, 8)))
    assert counter.get_total_flops() > 0
    with torch._subclasses.FakeTensorMode() as mode:
        assert diffqkv.swiglu(mode.from_tensor(gate), mode.from_tensor(up)).shape == gate.shape
    with torch.inference_mode():
        assert diffqkv.swiglu(gate, up).is_inference()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = qkv(1, (2, 1, 1), 3, 3, (8, 8))
        assert diffqkv.flash_attention(q, k, v).dtype == torch.bfloat16
    with pytest.raises(NotImplementedError, match="torch.func.grad"):
        torch.func.grad(lambda x: diffqkv.swiglu(x, up).sum())(gate)
    traced = torch.fx.experimental.proxy_tensor.make_fx(diffqkv.swiglu)(gate, up)
    assert any("diffqkv.swiglu" in str(node.target) for node in traced.graph.nodes)


def test_inference_ops_refuse_forward_mode(api):
    import torch.autograd.forward_ad as forward_ad

    x, weight, angles = torch.randn(1, 2, 3, 8), torch.ones(8), torch.ones(1, 2, 8)
    k, v = torch.randn(2, 1, 1, 4, 1, 8)
    lengths, positions = torch.tensor([3], dtype=torch.int32), torch.arange(3)[None]
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        calls = {
            "rms_norm": lambda: api.rms_norm(dual, weight, 1e-6),
            "rotary_embedding": lambda: api.rotary_embedding(dual, angles, angles),
            "packed_linear": lambda: api.packed_linear(dual, torch.randn(1, 8, 32), 32),
            "decode_attention": lambda: api.decode_attention(dual, k, v, lengths),
            "selective_v_attention": lambda: api.selective_v_attention(dual, k, v, lengths, 2),
            "kv_cache_update": lambda: api.kv_cache_update(k, v, dual[:, :1], dual[:, :1], positions),
        }
        for op, call in calls.items():
            with pytest.raises(NotImplementedError, match=f"{op}: forward-mode differentiation is not built"):
                call()


def test_swiglu_trains_under_compile():
    torch._dynamo.reset()
    compiled = torch.compile(diffqkv.swiglu, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((3, 8), (5, 16)):
        leaves = [torch.randn(shape, requires_grad=True) for _ in range(2)]
        assert_same(
            torch.autograd.grad(compiled(*leaves).sum(), leaves),
            torch.autograd.grad(diffqkv.swiglu(*leaves).sum(), leaves),
        )


CALLS = 100_000


@pytest.mark.parametrize("index", range(14))
def test_no_leak(library, index, threads):
    """10^5 calls of each op do not grow the process: less than 20 bytes a call."""
    threads(1)
    q, k, v = qkv(1, (2, 1, 1), 1, 4, (8, 8))
    k_cache, v_cache, one = reference.group(k, 1), reference.group(v, 1), int32(4)
    stats, positions = torch.zeros(1, 1, 9), torch.tensor([[2]])
    new, rope = (k[:, :, :1].clone(), v[:, :, :1].clone()), torch.rand(1, 1, 8)
    packed, entry = [x[0].transpose(0, 1) for x in (q, k, v)], (int32(0, 1), int32(0, 4), 1, 4)
    options = {"window_left": 2, "softcap": 2.0, "sinks": torch.zeros(2), "dropout_p": 0.5, "seed": 1}
    out, lse = library.flash_attention(q, k, v, **options)
    row, bias = torch.randn(2, 32)
    floats, integers = linear_weights("own", 32, 32), linear_weights("int4", 32, 32, zeros=True)
    calls = [
        lambda: library.flash_attention(q, k, v),
        lambda: library.flash_attention(q, k, v, causal=True, softmax_scale=0.1, kv_start=one - 4, kv_end=one),
        lambda: library.decode_attention(q, k_cache, v_cache, one),
        lambda: library.decode_attention(q, k_cache, v_cache, one, block_table=int32(0)[None], cache_start=one - 4),
        lambda: library.kv_cache_update(k_cache, v_cache, *new, positions),
        lambda: library.kv_cache_update(k_cache, v_cache, *new, positions, cos=rope, sin=rope, v_stats=stats),
        lambda: library.selective_v_attention(q, k_cache, v_cache, one, 2, tail=2, v_stats=stats, return_bound=True),
        lambda: library.swiglu(q, q),
        lambda: library.swiglu_backward(q, q, q),
        lambda: library.flash_attention_varlen(*packed, *entry, **options),
        lambda: library.flash_attention_backward(out, lse, q, k, v, out, lse, **options),
        lambda: library.flash_attention_varlen_backward(
            out[0].transpose(0, 1), None, *packed, out[0].transpose(0, 1), lse[0], *entry, **options
        ),
        lambda: library.packed_linear(row, *floats, None, 32),
        lambda: library.packed_linear(row, *integers, bias, 32),
    ]
    call, process = calls[index], psutil.Process()
    for _ in range(CALLS // 10):
        call()
    gc.collect()
    before = process.memory_info().rss
    for _ in range(CALLS):
        call()
    gc.collect()
    assert process.memory_info().rss - before < 20 * CALLS


def test_errors_do_not_leak(library):
    process = psutil.Process()

    def fail():
        with pytest.raises(ValueError):
            diffqkv.flash_attention(q, q, q[:, :, :0])

    q = torch.randn(1, 1, 1, 8)
    for _ in range(2000):
        fail()
    gc.collect()
    before = process.memory_info().rss
    for _ in range(10_000):
        fail()
    gc.collect()
    assert process.memory_info().rss - before < 2**20


# ---- the binary ------------------------------------------------------------------------------------------------------

NEEDED = {
    "libtorch.so",
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "libm.so.6",
    "libc.so.6",
    "ld-linux-x86-64.so.2",
}


def tool(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_needed_libraries(library):
    dynamic = tool("readelf", "--dynamic", "--wide", compiled.path)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    assert needed <= NEEDED and "libtorch.so" in needed, needed
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_symbols(library):
    symbols = [line.split()[-2:] for line in tool("nm", "--dynamic", "--undefined-only", compiled.path).splitlines()]
    undefined = {name.partition("@")[0]: kind for kind, name in symbols}
    assert undefined
    demangled = tool("nm", "--dynamic", "--demangle", compiled.path)
    for word in (" at::", " c10::", " _?Py[A-Z_]", " GOMP_", " omp_", " cuda[A-Z]", " cu[A-Z]"):
        found = [line for line in demangled.splitlines() if re.search(rf"\b[UuwW]{word}", line)]
        assert not found, found
    # A CPU build of torch has the first one, not the second.
    cuda = {name: kind for name, kind in undefined.items() if "cuda" in name.lower()}
    assert set(cuda) <= {"aoti_torch_device_type_cuda", "aoti_torch_get_current_cuda_stream"}, cuda
    assert cuda.get("aoti_torch_get_current_cuda_stream", "w") == "w", cuda


LARGEST = 40 * 2**20  # bytes, with the CUDA kernels of all architectures


def test_size(library):
    assert Path(compiled.path).stat().st_size < LARGEST
    has_machine_code = ".nv_fatbin" in tool("readelf", "--sections", "--wide", compiled.path)
    for op in (*dispatch.OPS, *dispatch.BACKWARD.values()):
        assert compiled.has_kernel(op, "cuda") == (has_machine_code and op not in WITHOUT_CUDA_KERNEL), op


def test_loading_leaves_the_driver_alone(library):
    """There may be none; where there is one, a process that only computes on the CPU must not start it."""
    code = """
import sys
import torch
def loaded():
    return {line.split()[-1] for line in open("/proc/self/maps") if "/libcuda" in line}
before = loaded()
torch.ops.load_library(sys.argv[1])
torch.ops.diffqkv.swiglu(torch.ones(8), torch.ones(8))
print("new:", *(loaded() - before))
"""
    assert tool(sys.executable, "-c", code, compiled.path).strip() == "new:"


def test_exports_nothing_but_our_own(library):
    exported = tool("nm", "--dynamic", "--defined-only", "--demangle", compiled.path).splitlines()
    foreign = [line for line in exported if "diffqkv" not in line]
    assert not foreign, foreign


def test_library_runs_without_the_planner(library):
    """explain says what is missing; the ops run."""
    package = str(PACKAGE)
    code = """
import sys
from pathlib import Path
sys.modules["diffqkv._core"] = None
import torch, diffqkv
assert diffqkv.flash_attention(*[torch.ones(1, 1, 1, 8)] * 3).sum() == 8
try:
    diffqkv.explain(1, 1, 1, 8, 8, 1, 1)
except RuntimeError as error:
    assert "_core" in str(error)
    print("explained")
diffqkv.show_config()
"""
    environment = os.environ | {"PYTHONPATH": package}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "explained" in run.stdout, run.stdout + run.stderr


def test_ops_run_without_transformers():
    package = str(PACKAGE)
    code = """
import sys
from pathlib import Path
sys.modules["transformers"] = None
import torch, diffqkv
assert diffqkv.swiglu(torch.ones(8), torch.ones(8)).shape == (8,)
assert "Cache" not in diffqkv.__all__
try:
    diffqkv.Cache
except ImportError as error:
    assert "transformers" in str(error)
    print("explained")
"""
    environment = os.environ | {"PYTHONPATH": package}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "explained" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_show_config(disabled):
    package = str(PACKAGE)
    environment = os.environ | {"PYTHONPATH": package, "DIFFQKV_DISABLE_LIBRARY": disabled}
    run = subprocess.run([sys.executable, "-m", "diffqkv"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    if disabled == "1":
        assert "none: DIFFQKV_DISABLE_LIBRARY=1" in run.stdout and "cpu   plain torch" in run.stdout
    else:
        assert "libdiffqkv.so" in run.stdout and "cpu   compiled kernel" in run.stdout


def test_config_and_explain(library):
    config = diffqkv.config()
    assert set(config) == {
        "version", "library", "reason", "cpu_isa", "cuda_archs", "device", "transformers", "models_reason", "ops"
    }  # fmt: skip
    try:
        installed = metadata.version("transformers")
    except metadata.PackageNotFoundError:  # an environment for the ops alone
        installed = None
    assert config["transformers"] == installed and (config["models_reason"] is None) == (installed is not None)
    assert config["version"] == diffqkv.__version__ and config["library"] == compiled.path
    from diffqkv import _core

    assert config["cpu_isa"] in _core.cpu_isa_levels()
    text = diffqkv.explain(32, 4, 16, 64, 64, 1, 8192, 2, torch.bfloat16)
    assert "heads 32/4/16" in text and "split" in text and "memory" in text
    assert "block" in diffqkv.explain(32, 4, 16, 64, 64, 2048, 2048)
    with pytest.raises(ValueError, match=r"n_q: got .+, want"):
        diffqkv.explain(32, 5, 16, 64, 64, 1, 1)


def test_explain_for_a_gpu(library, monkeypatch):
    shape, options = (32, 4, 16, 64, 64, 1, 32768), {"dtype": torch.bfloat16}
    text = diffqkv.explain(*shape, **options, device="h200")
    assert "h200, 132 multiprocessors, compute capability 9.0" in text and "decode_attention, bulk copies: " in text
    assert "17.5 µs at 4800 GB/s" in text  # 84 MB
    assert "flash_attention: " in diffqkv.explain(32, 4, 16, 64, 64, 2048, 2048, **options, device="rtx4090")
    for device, message in (("h1000", "device: got 'h1000', want 'cpu', a CUDA device, or one of h100, h200"),):
        with pytest.raises(ValueError, match=message):
            diffqkv.explain(*shape, **options, device=device)
    with pytest.raises(NotImplementedError, match="mps"):
        diffqkv.explain(*shape, **options, device="mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device: got cuda, of which there is none here, want one of h100"):
        diffqkv.explain(*shape, **options, device="cuda")
    facts = {
        "name": "A GPU",
        "multi_processor_count": 7,
        "major": 8,
        "minor": 6,
        "shared_memory_per_block_optin": 99 << 10,
        "shared_memory_per_multiprocessor": 100 << 10,
        "regs_per_multiprocessor": 64 << 10,
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**facts))
    monkeypatch.setattr(dispatch, "_is_new_enough", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    text = diffqkv.explain(*shape, **options, device="cuda")
    assert "A GPU, 7 multiprocessors, compute capability 8.6" in text and "floor" not in text


def test_instruction_set_objects_have_no_symbol_that_the_linker_could_share():
    """A weak copy of an inline function, compiled for AVX-512, might be the one that an older CPU runs."""
    folder = Path(os.environ.get("DIFFQKV_BUILD_DIR", ROOT / "build" / "cmake"))
    objects = sorted(folder.glob("CMakeFiles/diffqkv_core_cpu_*/csrc/cpu/kernels/*.o"))
    levels = {path.parents[3].name.removeprefix("diffqkv_core_cpu_").removesuffix(".dir") for path in objects}
    assert levels == {"v2", "v3", "v4", "v4_bf16"}, f"no build of every level in {folder}: run make build"
    table = subprocess.run(["nm", "-C", *map(str, objects)], capture_output=True, text=True, check=True).stdout
    shared = [line for line in table.splitlines() if re.match(r"[0-9a-f ]{16} [WwVvu] ", line)]
    assert not shared, shared
