"""What PyTorch may expect of the training attention: tracing, compilation, autocast, torch.func."""

import pytest
import torch
from helpers import DTYPES, TRAINING_DTYPES, int32, qkv
from torch.utils.flop_counter import FlopCounterMode

import diffqkv
from diffqkv import reference
from diffqkv.ops import library as compiled

HEADS, DIMS = (8, 2, 4), (16, 24)


def assert_same(actual, expected):
    for a, b in zip(torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def packed_qkv(dtype=torch.float32):
    """q, k, v of 30 tokens, and the other positional arguments."""
    tensors = [x[0].transpose(0, 1).contiguous() for x in qkv(1, HEADS, 30, 30, DIMS, dtype)]
    return tensors, (int32(0, 11, 30), int32(0, 17, 30), 19, 17)


OPTIONS = [
    {},
    {"causal": True, "window_left": 5, "softcap": 2.0, "softmax_scale": 0.3},
    {"kv_start": int32(0, 3), "kv_end": int32(9, 12), "dropout_p": 0.4, "seed": 2**40, "offset": 7},
]


# ---- tracing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "causal", "padded"])
@pytest.mark.parametrize("dtype", TRAINING_DTYPES)
def test_opcheck(library, dtype, options, with_sinks):
    """All utilities, gradients of q, k, v and sinks included."""
    for varlen in (False, True):
        if varlen:
            tensors, rest = packed_qkv(dtype)
            forward, backward = library.flash_attention_varlen, library.flash_attention_varlen_backward
        else:
            tensors, rest = qkv(2, HEADS, 9, 13, DIMS, dtype), ()
            forward, backward = library.flash_attention, library.flash_attention_backward
        sinks = torch.randn(8) if with_sinks else None
        out, lse = forward(*tensors, *rest, sinks=sinks, **options)
        torch.library.opcheck(forward, (*tensors, *rest), {"sinks": sinks, **options})
        for dlse in (None, torch.randn_like(lse)):
            args = (torch.randn_like(out), dlse, *tensors, out, lse, *rest)
            torch.library.opcheck(backward, args, {"sinks": sinks, **options})
        leaves = [x.clone().requires_grad_() for x in tensors]
        sinks = None if sinks is None else sinks.requires_grad_()
        torch.library.opcheck(forward, (*leaves, *rest), {"sinks": sinks, **options})


def test_opcheck_of_an_empty_batch(library):
    tensors = [torch.zeros(x.shape, requires_grad=True) for x in qkv(0, HEADS, 3, 5, DIMS)]
    torch.library.opcheck(library.flash_attention, tensors)
    tensors, rest = [torch.zeros(0, h, 8, requires_grad=True) for h in HEADS], (int32(0), int32(0), 0, 0)
    torch.library.opcheck(library.flash_attention_varlen, (*tensors, *rest))


def step_inputs(batch, tokens):
    leaves = [x.requires_grad_() for x in (*qkv(batch, HEADS, tokens, tokens, DIMS), torch.randn(8))]
    return *leaves, int32(*[tokens - 1] * batch), int32(0, tokens, batch * tokens)


def loss_of(q, k, v, sinks, kv_end, cu_seqlens):
    """Both functions with most of their options."""
    out, lse = diffqkv.flash_attention(
        q, k, v, causal=True, window=(9, -1), softcap=3.0, sinks=sinks, kv_end=kv_end, return_lse=True
    )
    packed = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    other = diffqkv.flash_attention_varlen(
        *packed, cu_seqlens, cu_seqlens, 200, 200, causal=True, dropout_p=0.25, seed=5
    )
    return out.square().sum() + lse.where(lse.isfinite(), 0).sum() + other.sin().sum()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_training_step_compiles(backend):
    """With the library, one graph for all shapes; here no size happens to be another one too."""
    torch._dynamo.reset()
    fast = torch.compile(loss_of, fullgraph=True, dynamic=True, backend=backend)
    for batch, tokens in ((5, 13), (7, 21)):
        inputs = step_inputs(batch, tokens)
        with torch._dynamo.config.patch(error_on_recompile=compiled.loaded):
            loss, expected = fast(*inputs), loss_of(*inputs)
        assert_same(loss, expected)
        assert_same(torch.autograd.grad(loss, inputs[:4]), torch.autograd.grad(expected, inputs[:4]))


def test_lengths_and_seeds_are_not_compiled_in(library):
    """max_seqlen, seed and offset change from call to call."""

    def step(q, k, v, cu_seqlens, longest, seed):
        return diffqkv.flash_attention_varlen(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, dropout_p=0.25, seed=seed, offset=seed + 1
        )

    (q, k, v), _ = packed_qkv()
    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for longest, seed in ((19, 5), (20, 7), (25, 8)):
        with torch._dynamo.config.patch(error_on_recompile=True):
            out = fast(q, k, v, int32(0, 11, 30), longest, seed)
        assert_same(out, step(q, k, v, int32(0, 11, 30), longest, seed))


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, *inputs):
            return loss_of(*inputs)

    inputs = step_inputs(2, 13)
    with torch.no_grad():
        program = torch.export.export(Loss(), inputs)
        if compiled.loaded:
            targets = {str(node.target) for node in program.graph.nodes}
            assert {"diffqkv.flash_attention.default", "diffqkv.flash_attention_varlen.default"} <= targets
        assert_same(program.module()(*inputs), loss_of(*inputs))


def test_meta_device(api):
    *leaves, kv_end, cu_seqlens = step_inputs(2, 13)
    real = api.flash_attention(*leaves[:3], sinks=leaves[3], kv_end=kv_end, return_lse=True)
    gradients = torch.autograd.grad(real[0].sum() + real[1].sum(), leaves)
    *leaves, kv_end, cu_seqlens = (x.detach().to("meta").requires_grad_(x.requires_grad) for x in step_inputs(2, 13))
    meta = api.flash_attention(*leaves[:3], sinks=leaves[3], kv_end=kv_end, return_lse=True)
    meta_gradients = torch.autograd.grad(meta[0].sum() + meta[1].sum(), leaves)
    for a, b in zip((*meta, *meta_gradients), (*real, *gradients), strict=True):
        assert a.device.type == "meta" and a.shape == b.shape and a.dtype == b.dtype
    packed = [x.transpose(1, 2).flatten(0, 1) for x in leaves[:3]]
    out, lse = api.flash_attention_varlen(*packed, cu_seqlens, cu_seqlens, 13, 13, return_lse=True)
    assert out.shape == (26, 8, 24) and lse.shape == (8, 26)
    assert [x.shape for x in torch.autograd.grad(out.sum() + lse.sum(), packed)] == [x.shape for x in packed]
    with pytest.raises(ValueError, match=r"max_seqlen_k: got -1, want"):
        api.flash_attention_varlen(*packed, cu_seqlens, cu_seqlens, 13, -1)


@pytest.mark.parametrize("causal, half", [(False, 1), (True, 2)])
def test_flop_counter(library, causal, half):
    leaves = [x.requires_grad_() for x in qkv(2, HEADS, 5, 70, DIMS)]
    with FlopCounterMode(display=False) as counter:
        out = diffqkv.flash_attention(*leaves, causal=causal)
    forward = 2 * 2 * 8 * 5 * 70 * (16 + 24) // half
    assert counter.get_total_flops() == forward
    with counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 8 * 5 * 70 * (3 * 16 + 2 * 24) // half

    tensors, rest = packed_qkv()
    leaves, pairs = [x.requires_grad_() for x in tensors], 11 * 17 + 19 * 13
    with FlopCounterMode(display=False) as counter:
        diffqkv.flash_attention_varlen(*leaves, *rest, causal=causal).sum().backward()
    assert counter.get_total_flops() == 2 * 8 * pairs * (16 + 24 + 3 * 16 + 2 * 24) // half
    meta, cu_seqlens = [x.detach().to("meta") for x in tensors], [x.to("meta") for x in rest[:2]]
    with FlopCounterMode(display=False) as counter:
        diffqkv.flash_attention_varlen(*meta, *cu_seqlens, *rest[2:], causal=causal)
    assert counter.get_total_flops() == 2 * 8 * 30 * 17 * (16 + 24) // half


# ---- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast(api, dtype, autocast_dtype):
    """As if q, k and v had come in autocast's dtype; gradients come back in theirs, sinks stay float32."""
    sinks = torch.randn(8)
    for tensors, rest, name in ((qkv(2, HEADS, 9, 13, DIMS, dtype), (), "flash_attention"),
                                (*packed_qkv(dtype), "flash_attention_varlen")):  # fmt: skip
        function = getattr(api, name)
        leaves = [x.clone().requires_grad_() for x in (*tensors, sinks)]
        cast = [x.to(autocast_dtype).requires_grad_() for x in tensors] + [sinks.clone().requires_grad_()]
        with torch.autocast("cpu", dtype=autocast_dtype):
            out, lse = function(*leaves[:3], *rest, causal=True, sinks=leaves[3], return_lse=True)
        want, want_lse = function(*cast[:3], *rest, causal=True, sinks=cast[3], return_lse=True)
        assert out.dtype == autocast_dtype and torch.equal(out, want) and torch.equal(lse, want_lse)
        gradients = torch.autograd.grad(out.float().square().sum(), leaves)
        expected = torch.autograd.grad(want.float().square().sum(), cast)
        for leaf, a, b in zip(leaves, gradients, expected, strict=True):
            assert a.dtype == leaf.dtype and torch.equal(a, b.to(leaf.dtype))


def test_autocast_leaves_float64_alone_and_mends_mixtures(api):
    q, k, v = qkv(1, HEADS, 5, 7, DIMS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert api.flash_attention(q.double(), k.double(), v.double()).dtype == torch.float64
        mixed = api.flash_attention(q, k.bfloat16(), v.half())
        sinks = api.flash_attention(q.half(), k.half(), v.half(), sinks=torch.zeros(8, dtype=torch.float16))
    assert mixed.dtype == sinks.dtype == torch.bfloat16
    with torch.autocast("cpu", enabled=False):
        assert api.flash_attention(q, k, v).dtype == torch.float32


def test_autocast_of_direct_calls(library):
    q, k, v = qkv(1, HEADS, 5, 7, DIMS)
    expected = library.flash_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(library.flash_attention(q, k, v), expected)


def test_autocast_does_not_touch_inference(api):
    """Decoding keeps its dtype, and its lse its precision."""
    q, k, v = qkv(1, HEADS, 1, 70, DIMS)
    args = (q, k.unsqueeze(3), v.unflatten(1, (2, 2)).transpose(2, 3), int32(70))
    expected = api.decode_attention(*args, return_lse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(api.decode_attention(*args, return_lse=True), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_autocast_compiles(backend):
    def step(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return diffqkv.flash_attention(q, k, v, causal=True)

    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (5, 9):
        leaves = [x.requires_grad_() for x in qkv(2, HEADS, tokens, tokens, DIMS)]
        out, expected = fast(*leaves), step(*leaves)
        assert out.dtype == torch.bfloat16
        assert_same(out, expected)
        assert_same(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves))


# ---- torch.func ------------------------------------------------------------------------------------------------------


def each(function, *stacked):
    """function of each index of the first dimension, stacked: what vmap means."""
    results = [function(*(x[i] for x in stacked)) for i in range(stacked[0].shape[0])]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return torch.stack(results)


def mapped_qkv(n=3):
    return [torch.stack(x) for x in zip(*(qkv(2, HEADS, 5, 7, DIMS) for _ in range(n)), strict=True)]


def test_vmap(library):
    q, k, v = mapped_qkv()
    end = torch.tensor([[7, 3], [5, 5], [1, 0]], dtype=torch.int32)
    sinks = torch.randn(8)

    def attention(q, k, v, end):
        return library.flash_attention(q, k, v, causal=True, sinks=sinks, kv_end=end, window_left=4)

    assert_same(torch.vmap(attention)(q, k, v, end), each(attention, q, k, v, end))
    # Other dimensions, also the last one; what is not mapped is shared.
    moved = torch.vmap(attention, in_dims=(4, 1, 2, 1))(
        q.movedim(0, 4).contiguous(), k.movedim(0, 1), v.movedim(0, 2), end.T.contiguous()
    )
    assert_same(moved, each(attention, q, k, v, end))
    shared = torch.vmap(attention, in_dims=(0, None, None, None))(q, k[0], v[0], end[0])
    assert_same(shared, each(lambda x: attention(x, k[0], v[0], end[0]), q))
    nested = torch.vmap(torch.vmap(library.flash_attention, in_dims=(0, None, None)))(q[:, None], k, v)
    assert_same(nested, each(lambda q, k, v: tuple(x[None] for x in library.flash_attention(q, k, v)), q, k, v))


@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradients_of_a_mapped_function(library, with_sinks):
    q, k, v = mapped_qkv()
    sinks = torch.randn(8) if with_sinks else None

    def loss(q, k, v, sinks):
        out, lse = library.flash_attention(q, k, v, causal=False, softcap=2.0, sinks=sinks)
        return out.square().sum() + lse.sin().sum()

    leaves = [x.clone().requires_grad_() for x in (q, k, v, *([sinks] if with_sinks else []))]
    given = leaves if with_sinks else [*leaves, None]
    mapped = torch.vmap(loss, in_dims=(0, 0, 0, None))(*given).sum()
    expected = sum(loss(*(x[i] for x in given[:3]), given[3]) for i in range(len(q)))
    assert_same(torch.autograd.grad(mapped, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("with_sinks", [False, True])
def test_mapped_gradients(library, with_sinks):
    """A Jacobian of many backward passes at once."""
    q, k, v = qkv(1, (2, 1, 2), 2, 3, (8, 8), torch.float64)
    sinks = (torch.randn(2, dtype=torch.float64),) if with_sinks else ()

    def jacobian(attention):
        return torch.autograd.functional.jacobian(attention, (q, k, v, *sinks), vectorize=True)

    expected = jacobian(lambda q, k, v, *s: reference.attention(q, k, v, sinks=s[0] if s else None))
    assert_same(jacobian(lambda q, k, v, *s: library.flash_attention(q, k, v, sinks=s[0] if s else None)[0]), expected)


def test_vmap_refuses_what_has_no_rule(library):
    q, k, v = mapped_qkv()
    with pytest.raises(ValueError, match=r"sinks: got a mapped dimension, want"):
        torch.vmap(lambda q, k, v, sinks: library.flash_attention(q, k, v, sinks=sinks))(q, k, v, torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"dropout_p: got 0.5, want 0 under torch.vmap"):
        torch.vmap(lambda q, k, v: library.flash_attention(q, k, v, dropout_p=0.5))(q, k, v)
    tensors, rest = packed_qkv()
    with pytest.raises(NotImplementedError, match=r"flash_attention_varlen: torch.vmap is not built"):
        torch.vmap(lambda *x: library.flash_attention_varlen(*x, *rest))(*(torch.stack([x, x]) for x in tensors))


# ---- what is not built -----------------------------------------------------------------------------------------------


def test_second_derivatives_are_refused(library):
    q, k, v = (x.requires_grad_() for x in qkv(1, HEADS, 5, 7, DIMS))
    packed, rest = [x.requires_grad_() for x in packed_qkv()[0]], packed_qkv()[1]
    for name, inputs, out in (
        ("flash_attention_backward", (q, k, v), library.flash_attention(q, k, v)[0]),
        ("flash_attention_varlen_backward", packed, library.flash_attention_varlen(*packed, *rest)[0]),
        ("swiglu_backward", (q, k), library.swiglu(q, k[:, :1, :5].expand(q.shape))),
    ):
        gradients = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        with pytest.raises(NotImplementedError, match=f"{name}: the gradient of a gradient is not built"):
            torch.autograd.grad(sum(x.square().sum() for x in gradients), inputs)


def test_what_torch_func_has_no_rule_for_is_refused(library):
    q, k, v = qkv(1, HEADS, 5, 7, DIMS)

    def attention(q):
        return diffqkv.flash_attention(q, k, v)

    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(NotImplementedError, match="flash_attention: torch.func.* is not built"):
            transform(lambda q: attention(q).sum())(q)
    with pytest.raises(NotImplementedError, match="flash_attention: forward-mode differentiation is not built"):
        torch.func.jvp(attention, (q,), (q,))
    packed, rest = packed_qkv()
    with pytest.raises(NotImplementedError, match="flash_attention_varlen: forward-mode differentiation is not built"):
        torch.func.jvp(lambda v: diffqkv.flash_attention_varlen(*packed[:2], v, *rest), (packed[2],), (packed[2],))
