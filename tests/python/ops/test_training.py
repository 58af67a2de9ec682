"""flash_attention and flash_attention_varlen with every option, and their gradients, against the reference."""

import itertools

import pytest
import torch
from helpers import (
    DIMS,
    DTYPES,
    HEADS,
    LAYOUTS,
    NAN,
    TRAINING_DTYPES,
    assert_accurate,
    assert_lse,
    cache_of,
    int32,
    qkv,
    strided,
)

from diffqkv import reference

D = torch.float64
DROPOUT = {"dropout_p": 0.3, "seed": -(2**40) - 7, "offset": 3}


def as_reference(options):
    """The arguments of an op as those of the reference."""
    options = dict(options)
    window = (options.pop("window_left", -1), options.pop("window_right", -1))
    return options | {"window": window}


def packed(x):
    """`[b, heads, s, d]` -> `[b * s, heads, d]`."""
    return x.transpose(1, 2).flatten(0, 1)


def leaves_of(tensors, sinks, dtype=None):
    """Copies that require gradients; in dtype, if one is given, sinks included."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    return leaves, None if sinks is None else sinks.detach().to(dtype or sinks.dtype).requires_grad_()


def differentiate(function, tensors, sinks, dout, dlse, *args, **options):
    """out, lse, and the gradients of q, k, v and sinks. dlse may be None; it counts where lse is finite."""
    out, lse = function(*tensors, *args, sinks=sinks, **options)
    outputs, gradients = [out], [dout.to(out.dtype)]
    if dlse is not None:
        outputs, gradients = [out, lse], [*gradients, dlse.to(lse.dtype)]
    inputs = tensors if sinks is None else [*tensors, sinks]
    return out, lse, torch.autograd.grad(outputs, inputs, gradients)


def check(ops, tensors, *args, sinks=None, **options):
    """Results and gradients of both outputs; args: those of flash_attention_varlen behind q, k and v."""
    dtype = tensors[0].dtype
    name, specification = "flash_attention", reference.attention
    if args:
        name, specification = "flash_attention_varlen", reference.attention_varlen
    function = getattr(ops, name)
    with torch.no_grad():
        shape = function(*tensors, *args, sinks=sinks, **options)[0].shape
    dout = torch.randn(shape).to(dtype)
    dlse = torch.randn(shape[:-1] if not args else shape[1::-1])
    out, lse, gradients = differentiate(function, *leaves_of(tensors, sinks), dout, dlse, *args, **options)
    assert out.dtype == dtype and out.is_contiguous() and lse.is_contiguous()

    def run(to):
        return differentiate(
            lambda *a, **o: specification(*a, return_lse=True, dtype=to, **as_reference(o)),
            *leaves_of(tensors, sinks, to), dout, dlse, *args[:2], **options,
        )  # fmt: skip

    (exact, exact_lse, exact_gradients), (low, _, low_gradients) = run(D), run(dtype)
    assert_accurate(out.detach(), exact.detach(), low.detach())
    assert_lse(lse.detach(), exact_lse.detach(), torch.promote_types(dtype, torch.float32))
    for what, actual, e, lo in zip(("q", "k", "v", "sinks"), gradients, exact_gradients, low_gradients, strict=False):
        assert actual.dtype == (sinks if what == "sinks" else tensors[0]).dtype
        assert actual.is_contiguous() or ops.name == "composed"
        # The gradient of float32 sinks comes from dout and out, and is no more exact than those.
        assert_accurate(actual if dtype == D else actual.to(dtype), e, lo, factor=3)


# ---- forward and backward --------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_left": 9, "window_right": 4},
    "causal window": {"causal": True, "window_left": 7},
    "softcap": {"softcap": 1.5},
    "dropout": DROPOUT,
    "everything": {"causal": True, "window_left": 20, "softcap": 3.0, "softmax_scale": 0.4, **DROPOUT},
}


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", TRAINING_DTYPES)
def test_heads_and_dims(ops, dtype, heads, dims):
    check(ops, qkv(1, heads, 13, 21, dims, dtype), causal=True)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("s_q", [2, 37])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", TRAINING_DTYPES)
def test_options(ops, dtype, options, s_q, with_sinks):
    sinks = torch.randn(12) if with_sinks else None
    check(ops, qkv(2, (12, 4, 6), s_q, 45, (24, 40), dtype), sinks=sinks, **options)


@pytest.mark.parametrize("dtype", TRAINING_DTYPES)
def test_sinks_in_the_dtype_of_q(ops, dtype):
    check(ops, qkv(2, (8, 2, 4), 9, 33, (16, 24), dtype), sinks=torch.randn(8).to(dtype), causal=True)


@pytest.mark.parametrize("options", ["plain", "causal", "everything"])
@pytest.mark.parametrize("dtype", TRAINING_DTYPES)
@pytest.mark.parametrize(
    "s_q, s_k", [(1, 1), (1, 300), (31, 33), (33, 31), (150, 700), (333, 333), (203, 113), (0, 5), (5, 0), (0, 0)]
)
def test_lengths(ops, s_q, s_k, dtype, options):
    """q longer than k leaves the first queries without a key."""
    check(ops, qkv(1, (4, 1, 2), s_q, s_k, (32, 40), dtype), sinks=torch.randn(4), **OPTIONS[options])
    check(ops, qkv(1, (4, 2, 1), s_q, s_k, (32, 16), dtype), **OPTIONS[options])


@pytest.mark.parametrize("options", ["plain", "causal", "window", "everything"])
@pytest.mark.parametrize("dtype", TRAINING_DTYPES)
@pytest.mark.parametrize("s_q", [1, 40])
def test_padding_is_never_read(ops, s_q, dtype, options):
    """What lies outside [kv_start, kv_end) is NaN, its gradients are 0; one entry has no keys at all."""
    q, k, v = qkv(4, (8, 2, 4), s_q, 300, (16, 24), dtype)
    start, end = int32(0, 17, 260, 50), int32(300, 290, 1000, 50)
    poison(k, v, start, end)
    for sinks in (None, torch.randn(8)):
        check(ops, (q, k, v), kv_start=start, kv_end=end, sinks=sinks, **OPTIONS[options])
    k, v = k.nan_to_num(0.5).requires_grad_(), v.nan_to_num(0.5).requires_grad_()
    out, _ = ops.flash_attention(q, k, v, kv_start=start, kv_end=end, **OPTIONS[options])
    assert (out[3] == 0).all()
    for gradient in torch.autograd.grad(out.sum(), (k, v)):
        assert (gradient[1, :, :17] == 0).all() and (gradient[1, :, 290:] == 0).all() and (gradient[3] == 0).all()


def poison(k, v, start, end):
    for b, (lo, hi) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        for x in (k, v):
            x[b, :, :lo] = NAN
            x[b, :, hi:] = NAN


@pytest.mark.parametrize("options", [{}, {"causal": True}, DROPOUT], ids=["plain", "causal", "dropout"])
def test_rows_that_see_nothing(ops, options):
    """A window beyond the keys; without sinks lse is -inf, with them it is the sink. Gradients are 0, never NaN."""
    tensors = qkv(1, (4, 2, 2), 6, 9, (8, 8))
    sinks = torch.randn(4)
    for given in (None, sinks):
        out, lse, gradients = differentiate(
            ops.flash_attention, *leaves_of(tensors, given), torch.ones(1, 4, 6, 8), torch.ones(1, 4, 6),
            kv_end=int32(0), **options,
        )  # fmt: skip
        assert (out == 0).all() and all((x == 0).all() for x in gradients[:3])
        if given is None:
            assert (lse == -torch.inf).all()
        else:
            torch.testing.assert_close(lse, sinks[:, None].expand(1, 4, 6))
            torch.testing.assert_close(gradients[3], torch.full((4,), 6.0))


def test_gradient_of_one_output_only(ops):
    tensors = qkv(2, (4, 2, 4), 7, 11, (8, 16))
    both, out_only, lse_only = (
        differentiate(ops.flash_attention, *leaves_of(tensors, None), torch.full((2, 4, 7, 16), a), dlse)[2]
        for a, dlse in ((1.0, torch.ones(2, 4, 7)), (1.0, None), (0.0, torch.ones(2, 4, 7)))
    )
    for total, a, b in zip(both, out_only, lse_only, strict=True):
        torch.testing.assert_close(total, a + b)
    leaves, _ = leaves_of(tensors, None)
    alone = torch.autograd.grad(ops.flash_attention(*leaves)[1].sum(), leaves[:2])
    for a, b in zip(alone, lse_only, strict=False):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", ["gaps", "tokens first", "offset"])
@pytest.mark.parametrize("dtype", TRAINING_DTYPES)
def test_strides(ops, dtype, how):
    """Of the inputs and of dout, expanded ones included."""
    tensors = qkv(2, (12, 6, 4), 19, 37, (40, 24), dtype)
    leaves = [strided(x, how).requires_grad_() for x in tensors]
    plain, _ = leaves_of(tensors, None)
    dout = torch.randn(2, 12, 19, 24).to(dtype)
    out, expected = ops.flash_attention(*leaves, causal=True)[0], ops.flash_attention(*plain, causal=True)[0]
    for gradient in (strided(dout, how), dout.mT.contiguous().mT, torch.ones((), dtype=dtype).expand(dout.shape)):
        actual = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
        wanted = torch.autograd.grad(expected, plain, gradient.contiguous(), retain_graph=True)
        for a, b in zip(actual, wanted, strict=True):
            if ops.name == "library":
                assert torch.equal(a, b)
            else:
                torch.testing.assert_close(a, b)
    out.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_large_scores(ops):
    """Scores to 1e4 that grow along the keys: the running maximum has to move. They are integers, and so exact."""
    q, k, v = qkv(1, (4, 2, 2), 17, 300, (16, 16))
    q, k, dout = q.abs().round(), k.abs().round() * torch.arange(300)[:, None], torch.randn(1, 4, 17, 16)

    def run(function, to=torch.float32):
        leaves = [x.to(to, copy=True).requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dout.to(to))

    def sdpa(q, k, v):  # whose float32 lse rounds as any does; the reference has none
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25)

    actual = run(lambda *x: ops.flash_attention(*x, softmax_scale=0.25)[0])
    for x, exact, low in zip(actual, run(sdpa, D), run(sdpa), strict=True):
        assert_accurate(x, exact, low, factor=3)


HUGE = [1e6, 1e8, 1e10, 1e30]


@pytest.mark.parametrize(
    "softmax_scale, size", [*itertools.product([None], [1e5, *HUGE]), *itertools.product([-0.3], HUGE)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("varlen", [False, True])
def test_huge_scores(ops, varlen, dtype, softmax_scale, size):
    """Where scores and their differences are beyond all exponents: finite, and errors at most twice those of SDPA.

    SDPA's own gradients are finite for scales that are powers of two.
    """
    if softmax_scale is not None and ops.name == "composed":
        pytest.skip("this is SDPA")
    b, n_q, s_q, s_k, d = 2, 4, 40, 300, 64
    q = (torch.rand(b, n_q, s_q, d) + 0.5).to(dtype)
    k = ((torch.rand(b, 2, s_k, d) + 0.5) * (size / 8)).to(dtype)
    v, dout = torch.randn(b, 4, s_k, d).to(dtype), torch.randn(b, n_q, s_q, d).to(dtype)

    def flash(q, k, v):
        if not varlen:
            return ops.flash_attention(q, k, v, softmax_scale=softmax_scale)
        cu = (torch.arange(b + 1, dtype=torch.int32) * n for n in (s_q, s_k))
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out, lse = ops.flash_attention_varlen(q, k, v, *cu, s_q, s_k, softmax_scale=softmax_scale)
        return out.unflatten(0, (b, s_q)).transpose(1, 2), lse.unflatten(1, (b, s_q)).transpose(0, 1)

    def sdpa(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k.repeat_interleave(2, dim=1), v)

    def run(function, to):
        leaves = [x.detach().to(to).requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        out, lse = out if isinstance(out, tuple) else (out, None)
        return lse, out.detach(), *torch.autograd.grad(out, leaves, dout.to(to))

    def mathematics(q, k, v):
        return reference.attention(q, k, v, softmax_scale=softmax_scale, return_lse=True)

    (lse, *actual), (exact_lse, *exact) = run(flash, dtype), run(mathematics, D)
    _, *low = run(sdpa if softmax_scale is None else mathematics, dtype)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=0)
    # Gradients of q and k are sums of what rounding leaves of 0, times K and q.
    sizes = (1.0, k.abs().max().double(), 1.0, 1.0)
    for x, lo, e, largest in zip(actual, low, exact, sizes, strict=True):
        x, lo, e = x.double(), lo.double(), e.double()
        assert x.isfinite().all()
        error, allowed = (x - e).abs().max(), 2 * (lo - e).abs().max() + 64 * torch.finfo(dtype).eps * largest
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


# ---- gradcheck -------------------------------------------------------------------------------------------------------

SMALL_HEADS = [(4, 2, 4), (6, 3, 2), (6, 2, 3), (4, 1, 4), (2, 2, 2), (3, 1, 1)]
SMALL_DIMS = [(8, 8), (8, 16), (16, 8)]
SMALL_LENGTHS = [(5, 7), (7, 5), (1, 6), (4, 0)]
SMALL_OPTIONS = [
    {},
    {"causal": True},
    {"window_left": 2, "window_right": 1},
    {"softcap": 0.7},
    DROPOUT,
    {"causal": True, "kv_start": (1, 0), "kv_end": (6, 3)},
    {"causal": True, "window_left": 3, "softcap": 2.0, "softmax_scale": -0.5, "kv_start": (0, 2), **DROPOUT},
]


def finite_lse(function, *args, **options):
    def run(q, k, v, sinks=None):
        out, lse = function(q, k, v, *args, sinks=sinks, **options)
        return out, torch.where(lse.isfinite(), lse, 0)

    return run


def small_cases():
    """Each option with each kind of heads and of sinks; dims and lengths take turns."""
    turns = itertools.count()
    for options, heads, with_sinks in itertools.product(SMALL_OPTIONS, SMALL_HEADS, (False, True)):
        turn = next(turns)
        yield heads, SMALL_DIMS[turn % 3], SMALL_LENGTHS[turn // 2 % 4], options, with_sinks


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
def test_gradcheck(ops, varlen):
    for heads, dims, (s_q, s_k), options, with_sinks in small_cases():
        options = {n: int32(*x) if isinstance(x, tuple) else x for n, x in options.items()}
        tensors, args, name = qkv(2, heads, s_q, s_k, dims, D), (), "flash_attention"
        if varlen:
            tensors, name = [packed(x) for x in tensors], "flash_attention_varlen"
            args = (int32(0, s_q - 1, 2 * s_q), int32(0, min(2, s_k), 2 * s_k), s_q + 1, 2 * s_k)
        leaves, sinks = leaves_of(tensors, torch.randn(heads[0], dtype=D) if with_sinks else None)
        inputs = (*leaves, sinks) if with_sinks else tuple(leaves)
        function = finite_lse(getattr(ops, name), *args, **options)
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True, nondet_tol=0), (heads, dims, options)


@pytest.mark.parametrize("options", [SMALL_OPTIONS[0], SMALL_OPTIONS[-1] | {"kv_start": None}], ids=["plain", "all"])
def test_gradcheck_of_every_element(ops, options):
    leaves, sinks = leaves_of(qkv(1, (4, 2, 4), 3, 5, (8, 8), D), torch.randn(4, dtype=D))
    assert torch.autograd.gradcheck(finite_lse(ops.flash_attention, **options), (*leaves, sinks), nondet_tol=0)


# ---- flash_attention_varlen ------------------------------------------------------------------------------------------

LENGTHS_Q, LENGTHS_K = (5, 0, 40, 1, 13, 3), (7, 4, 33, 300, 0, 3)


def varlen_case(heads, dims, dtype, lengths_q=LENGTHS_Q, lengths_k=LENGTHS_K):
    """Packed q, k, v; cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k."""
    (n_q, n_k, n_v), (d_k, d_v) = heads, dims
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    shapes = ((total_q, n_q, d_k), (total_k, n_k, d_k), (total_k, n_v, d_v))
    cu_seqlens = (int32(0, *itertools.accumulate(x)) for x in (lengths_q, lengths_k))
    return [torch.randn(s).to(dtype) for s in shapes], (
        *cu_seqlens,
        max(lengths_q, default=0),
        max(lengths_k, default=0),
    )


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", TRAINING_DTYPES)
def test_varlen(ops, dtype, options, with_sinks):
    """Entries without queries, without keys, and with fewer keys than queries."""
    tensors, args = varlen_case((12, 4, 6), (24, 40), dtype)
    check(ops, tensors, *args, sinks=torch.randn(12) if with_sinks else None, **options)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_varlen_heads(ops, dtype, heads):
    tensors, args = varlen_case(heads, (40, 56), dtype)
    check(ops, tensors, *args[:2], 64, 512, causal=True)


@pytest.mark.parametrize("dtype", TRAINING_DTYPES)
def test_varlen_padding_is_never_read(ops, dtype):
    """kv_start and kv_end count inside an entry."""
    (q, k, v), args = varlen_case((8, 2, 4), (16, 24), dtype)
    start, end = int32(2, 0, 30, 100, 0, 5), int32(6, 2, 40, 290, 7, 2)
    for entry, (lo, hi) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        first, last = args[1][entry : entry + 2].tolist()
        for x in (k, v):
            x[first:last][:lo], x[first:last][hi:] = NAN, NAN
    check(ops, (q, k, v), *args, kv_start=start, kv_end=end, causal=True)


def test_varlen_strides(ops):
    """q, k and v as slices of one projection."""
    projected = torch.randn(70, 16, 24)
    args = (int32(0, 30, 70), int32(0, 30, 70), 40, 40)
    leaves = [x.requires_grad_() for x in projected.split((8, 4, 4), dim=1)]
    out, lse = ops.flash_attention_varlen(*leaves, *args, causal=True)
    plain = [x.detach().contiguous().requires_grad_() for x in leaves]
    expected, expected_lse = ops.flash_attention_varlen(*plain, *args, causal=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    dout = torch.randn(8, 70, 24).transpose(0, 1)
    for a, b in zip(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, plain, dout), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("lengths", [((), ()), ((0, 0), (0, 0)), ((0,), (5,)), ((3,), (0,))], ids=str)
def test_varlen_without_work(ops, lengths):
    tensors, args = varlen_case((4, 2, 4), (8, 16), torch.float32, *lengths)
    check(ops, tensors, *args, sinks=torch.randn(4))


@pytest.mark.parametrize("options", ["causal", "window", "softcap", "causal window"])
@pytest.mark.parametrize("dtype", TRAINING_DTYPES)
def test_bits_of_an_entry_do_not_depend_on_the_others(library, dtype, options):
    """Those of the entry alone, and, unless it has few queries, of flash_attention; gradients included."""
    tensors, args = varlen_case((12, 4, 6), (24, 40), dtype)
    sinks, dout, dlse = torch.randn(12).requires_grad_(), torch.randn(62, 12, 40).to(dtype), torch.randn(12, 62)
    options = OPTIONS[options]

    def run(function, inputs, dout, dlse, *args):
        out, lse, gradients = differentiate(function, leaves_of(inputs, None)[0], sinks, dout, dlse, *args, **options)
        return out, lse, *gradients[:3]

    packed_results = run(library.flash_attention_varlen, tensors, dout, dlse, *args)
    for entry, (s_q, s_k) in enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True)):
        rows_q, rows_k = (slice(*cu[entry : entry + 2].tolist()) for cu in args[:2])
        mine = [x[rows] for x, rows in zip(tensors, (rows_q, rows_k, rows_k), strict=True)]
        expected = [packed_results[0][rows_q], packed_results[1][:, rows_q]]
        expected += [x[rows] for x, rows in zip(packed_results[2:], (rows_q, rows_k, rows_k), strict=True)]
        alone = run(
            library.flash_attention_varlen, mine, dout[rows_q], dlse[:, rows_q], int32(0, s_q), int32(0, s_k), *args[2:]
        )
        assert all(torch.equal(a, b) for a, b in zip(alone, expected, strict=True)), f"entry {entry}"
        if s_q <= 16:
            continue
        dense = [x.transpose(0, 1)[None] for x in (*mine, dout[rows_q])]
        out, lse, *gradients = run(library.flash_attention, dense[:3], dense[3], dlse[None, :, rows_q])
        alone = [lse[0], *(x[0].transpose(0, 1) for x in (out, *gradients))]
        expected = [expected[1], expected[0], *expected[2:]]
        assert all(torch.equal(a, b) for a, b in zip(alone, expected, strict=True)), f"entry {entry}"


# ---- decode_attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["window", "causal window", "softcap", "sinks", "everything"])
@pytest.mark.parametrize("block_size", [None, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("s_q", [1, 5, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_attention(ops, dtype, s_q, layout, block_size, options):
    """An empty cache, one that is shorter than the window, and several splits with left padding."""
    q, k, v = qkv(4, (8, 2, 4), s_q, 700, (32, 40), dtype)
    cache = cache_of(k, v, int32(0, 3, 700, 511), layout=layout, block_size=block_size, start=int32(0, 0, 130, 480))
    given = {"everything": {"window_left": 100, "softcap": 2.0}, "sinks": {}}.get(options) or OPTIONS.get(options, {})
    given = {name: x for name, x in given.items() if name != "causal"}  # decoding always is
    sinks = torch.randn(8) if options in ("sinks", "everything") else None
    args = (q, cache.k_cache, cache.v_cache, cache.seqlens)
    out, lse = ops.decode_attention(*args, sinks=sinks, **cache.options, **given)
    exact, exact_lse = reference.decode_attention(
        *args, sinks=sinks, return_lse=True, dtype=D, **cache.reference_options, **as_reference(given)
    )
    low = reference.decode_attention(*args, sinks=sinks, dtype=dtype, **cache.reference_options, **as_reference(given))
    assert_accurate(out, exact, low)
    assert_lse(lse, exact_lse)


def test_decode_attention_is_the_last_rows_of_flash_attention(ops):
    q, k, v = qkv(2, (8, 2, 4), 90, 90, (16, 24))
    sinks = torch.randn(8)
    options = {"window_left": 30, "softcap": 2.0, "sinks": sinks}
    whole, _ = ops.flash_attention(q, k, v, causal=True, **options)
    cache = cache_of(k, v, int32(90, 90))
    last, _ = ops.decode_attention(q[:, :, -3:], cache.k_cache, cache.v_cache, cache.seqlens, **options)
    torch.testing.assert_close(last, whole[:, :, -3:])


# ---- bits ------------------------------------------------------------------------------------------------------------


def results(library, part=slice(None)):
    """Results and gradients on the same data; part selects batch entries. Last in a case: dsinks."""
    torch.manual_seed(1)
    cases = []
    for dtype, s_q in itertools.product(TRAINING_DTYPES, (1, 5, 130)):
        tensors = qkv(3, (8, 2, 4), s_q, 700, (32, 40), dtype)
        dout, dlse, sinks = torch.randn(3, 8, s_q, 40).to(dtype), torch.randn(3, 8, s_q), torch.randn(8)
        leaves, sinks = leaves_of([x[part] for x in tensors], sinks)
        out, lse, gradients = differentiate(
            library.flash_attention, leaves, sinks, dout[part], dlse[part], causal=True, window_left=400,
            kv_start=int32(0, 3, 300)[part], kv_end=int32(700, 690, 700)[part],
        )  # fmt: skip
        cases.append((out, lse, *gradients))
    return cases


def test_bits_do_not_depend_on_threads_or_repeats(library, threads):
    threads(1)
    one = results(library)
    for n in (2, 3, 2):
        threads(n)
        for case, again in zip(one, results(library), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(case, again, strict=True))


def test_bits_do_not_depend_on_the_batch(library):
    whole = results(library)
    for b in range(3):
        for case, alone in zip(whole, results(library, slice(b, b + 1)), strict=True):
            assert all(torch.equal(x[b : b + 1], y) for x, y in zip(case[:-1], alone[:-1], strict=True))
