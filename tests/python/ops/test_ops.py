"""Every op against the reference, through the compiled library and through plain torch."""

import pytest
import torch
from helpers import (
    DIMS,
    DTYPES,
    HEADS,
    LAYOUT_CODE,
    LAYOUTS,
    NAN,
    TAILS,
    WEIGHTS,
    assert_accurate,
    assert_lse,
    cache_of,
    int32,
    linear_weights,
    qkv,
    strided,
)

import diffqkv
from diffqkv import reference

D = torch.float64


def exact_and_low(function, dtype, *args, **kwargs):
    """(out, lse) in float64, and out of the same computation by torch in dtype."""
    exact = function(*args, return_lse=True, dtype=D, **kwargs)
    return exact, function(*args, dtype=dtype, **kwargs)


def check_flash(ops, q, k, v, **kwargs):
    out, lse = ops.flash_attention(q, k, v, **kwargs)
    assert out.dtype == q.dtype and out.is_contiguous() and lse.is_contiguous()
    (exact, exact_lse), low = exact_and_low(reference.attention, q.dtype, q, k, v, **kwargs)
    assert_accurate(out, exact, low)
    assert_lse(lse, exact_lse)


def check_decode(ops, q, cache, **kwargs):
    args = (q, cache.k_cache, cache.v_cache, cache.seqlens)
    out, lse = ops.decode_attention(*args, **cache.options, **kwargs)
    assert out.dtype == q.dtype and out.is_contiguous() and lse.is_contiguous()
    (exact, exact_lse), low = exact_and_low(
        reference.decode_attention, q.dtype, *args, **cache.reference_options, **kwargs
    )
    assert_accurate(out, exact, low)
    assert_lse(lse, exact_lse)


# ---- flash_attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_flash_heads(ops, heads, dtype, causal):
    check_flash(ops, *qkv(2, heads, 33, 47, (40, 56), dtype), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [*DIMS, (8, 8), (16, 248), (256, 256)])
def test_flash_dims(ops, dims, dtype):
    check_flash(ops, *qkv(1, (12, 4, 6), 31, 70, dims, dtype), causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "s_q, s_k", [(1, 1), (2, 1), (1, 2), (31, 33), (33, 31), (113, 203), (203, 113), (0, 5), (5, 0), (0, 0), (1, 20000)]
)
def test_flash_lengths(ops, s_q, s_k, dtype, causal):
    check_flash(ops, *qkv(1, (8, 2, 4), s_q, s_k, (32, 64), dtype), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_flash_long(ops, dtype):
    check_flash(ops, *qkv(1, (4, 1, 2), 1023, 1024, (64, 64), dtype), causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s_q", [1, 40])
def test_flash_padding(ops, s_q, dtype, causal):
    """What lies outside [kv_start, kv_end) is NaN; one entry has no keys at all; ends are clamped to the keys."""
    q, k, v = qkv(5, (8, 2, 4), s_q, 300, (64, 32), dtype)
    start, end = int32(0, 17, 260, 50, -3), int32(300, 290, 280, 50, 1000)
    for b, (lo, hi) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        for x in (k, v):
            x[b, :, : max(lo, 0)] = NAN
            x[b, :, hi:] = NAN
    check_flash(ops, q, k, v, causal=causal, kv_start=start, kv_end=end)
    # With equal keys in place of NaN all rounding errors would have one sign, and torch's order of sums would decide.
    k, v = (torch.where(x.isnan(), torch.randn(x.shape).to(dtype), x) for x in (k, v))
    check_flash(ops, q, k, v, causal=causal, kv_end=end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, D])
@pytest.mark.parametrize("s_q", [1, 40])
def test_flash_without_keys(ops, s_q, dtype):
    """Ranges that are empty wherever they lie, and windows that leave nothing of one: out 0, lse -inf, gradients 0."""
    starts, ends = (20, 400, 50, 2**31 - 1, 100), (20, 300, 40, 300, -5)
    q, k, v = (x.requires_grad_() for x in qkv(5, (8, 2, 4), s_q, 300, (64, 32), dtype))
    for options in ({}, {"causal": True}, {"window_left": 7, "window_right": 2}):
        out, lse = ops.flash_attention(q, k, v, kv_start=int32(*starts), kv_end=int32(*ends), **options)
        assert (out == 0).all() and (lse == -torch.inf).all()
        for gradient in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
            assert (gradient == 0).all()
    sinks = torch.randn(8)
    q, k, v = (x.detach()[:1] for x in (q, k, v))
    end = 280 - s_q  # all windows begin behind it
    k[:, :, end:], v[:, :, end:] = NAN, NAN
    out, lse = ops.flash_attention(q, k, v, kv_end=int32(end), window_left=9, window_right=3, sinks=sinks)
    assert (out == 0).all()
    torch.testing.assert_close(lse, sinks[:, None].expand(1, 8, s_q).to(lse.dtype))


WIDTHS = [2**31 - 1, 2**31, 2**62, 2**63 - 6, 2**63 - 1]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("s_q, s_k", [(5, 9), (40, 9), (1, 300)])
def test_windows_that_hold_everything(ops, s_q, s_k, width):
    """A window to the end of the integers is none, forward and backward."""

    def run(left, right):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, lse = ops.flash_attention(*leaves, window_left=left, window_right=right)
        return out, lse, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    tensors = qkv(1, (4, 2, 2), s_q, s_k, (8, 8))
    for left, right in ((width, -1), (-1, width), (width, width), (2, width), (width, 1)):
        expected = run(*(-1 if n == width else n for n in (left, right)))
        for a, b in zip(run(left, right), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    q, k, v = tensors
    cache = cache_of(k, v, int32(s_k))
    args = (q, cache.k_cache, cache.v_cache, cache.seqlens)
    for a, b in zip(ops.decode_attention(*args, window_left=width), ops.decode_attention(*args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    packed = (*(x[0].transpose(0, 1) for x in tensors), int32(0, s_q), int32(0, s_k), s_q, s_k)
    varlen = ops.flash_attention_varlen
    for a, b in zip(varlen(*packed, window_left=width, window_right=width), varlen(*packed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["gaps", "tokens first", "offset"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_flash_strides(ops, dtype, how):
    q, k, v = qkv(2, (12, 6, 4), 19, 37, (40, 24), dtype)
    out, lse = ops.flash_attention(*(strided(x, how) for x in (q, k, v)), causal=True)
    expected, expected_lse = ops.flash_attention(q, k, v, causal=True)
    if ops.name == "library":
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    else:
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("scale", [0.0, -0.25, 1.5])
def test_flash_scale(ops, scale):
    check_flash(ops, *qkv(1, (8, 2, 4), 20, 40, (16, 16)), softmax_scale=scale)


def test_flash_large_scores(ops):
    """The running maximum has to move: scores grow along the keys, up to 1e4."""
    q, k, v = qkv(1, (4, 2, 2), 17, 600, (16, 16))
    k = k.abs() * torch.arange(600)[:, None]
    check_flash(ops, q.abs(), k, v)


@pytest.mark.parametrize("size", [1e5, 1e8, 1e10, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("s_q", [1, 40])
def test_huge_scores(ops, s_q, dtype, size):
    """Each key is there twice, tiles and splits apart: the best two share the weight in every kernel and layout."""
    q, _, v = qkv(1, (8, 2, 4), s_q, 1200, (64, 32), dtype)
    k = (torch.rand(1, 2, 600, 64) * size).to(dtype).repeat(1, 1, 2, 1)
    sinks = torch.tensor([0.0, 1.0, -size, size, 100 * size, -100 * size, -torch.inf, 1e-3])
    for options in ({}, {"sinks": sinks}, {"softcap": size}, {"softmax_scale": -0.3, "sinks": sinks}):
        check_flash(ops, q, k, v, **options)
        for layout in LAYOUTS:
            check_decode(ops, q, cache_of(k, v, int32(1200), layout=layout), **options)
    for layout in LAYOUTS:
        check_selective(ops, q, cache_of(k, v, int32(1200), layout=layout), 8, "renorm")


def test_flash_nan_and_inf_propagate(library):
    """The compiled op only: torch SDPA returns 0 for a row of NaN scores."""
    q, k, v = qkv(1, (4, 2, 2), 5, 9, (8, 8))
    q[0, 1, 2, 3] = NAN
    out, _ = library.flash_attention(q, k, v)
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 1, 2]]
    v[0, 1, 4, 5] = torch.inf
    out, _ = library.flash_attention(*qkv(1, (4, 2, 2), 5, 9, (8, 8))[:2], v)
    assert torch.isinf(out[0, 2:, :, 5]).all() and torch.isfinite(out[0, :2]).all()


def test_empty_batch(ops):
    q, k, v = qkv(0, (8, 2, 4), 3, 5, (16, 24))
    out, lse = ops.flash_attention(q, k, v)
    assert out.shape == (0, 8, 3, 24) and lse.shape == (0, 8, 3)
    cache = cache_of(k, v, int32())
    out, lse = ops.decode_attention(q, cache.k_cache, cache.v_cache, cache.seqlens)
    assert out.shape == (0, 8, 3, 24) and lse.shape == (0, 8, 3)
    out, *_, indices, _, _ = ops.selective_v_attention(
        q, cache.k_cache, cache.v_cache, cache.seqlens, 2, return_indices=True
    )
    assert out.shape == (0, 8, 3, 24) and indices.shape == (0, 8, 3, 2)
    ops.kv_cache_update(cache.k_cache, cache.v_cache, k, v, torch.zeros(0, 5, dtype=torch.int64))
    assert ops.swiglu(torch.empty(0, 3), torch.empty(0, 3)).shape == (0, 3)


def test_strides_of_tensors_without_elements_mean_nothing(ops):
    """Those of numpy's empty arrays are 0."""
    q, k, v = torch.ones(1, 2, 3, 8), *torch.zeros(2, 1, 2, 0, 8).as_strided((2, 1, 2, 0, 8), (0, 0, 0, 0, 0))
    out, lse = ops.flash_attention(q, k, v)
    assert torch.equal(out, torch.zeros(1, 2, 3, 8)) and (lse == -torch.inf).all()
    out, lse = ops.flash_attention(k, q, q)
    assert out.shape == (1, 2, 0, 8) and lse.shape == (1, 2, 0)


# ---- decode_attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [None, 32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_decode_attention_heads(ops, heads, dtype, layout, block_size):
    q, k, v = qkv(3, heads, 1, 100, (64, 64), dtype)
    check_decode(ops, q, cache_of(k, v, int32(100, 1, 33), layout=layout, block_size=block_size))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [*DIMS, (8, 8), (16, 248), (256, 256)])
def test_decode_attention_dims(ops, dims, dtype, layout):
    q, k, v = qkv(2, (12, 4, 6), 2, 70, dims, dtype)
    check_decode(ops, q, cache_of(k, v, int32(70, 31), layout=layout))


@pytest.mark.parametrize("block_size", [None, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("s_q", [0, 1, 3, 16, 40])
def test_decode_attention_lengths(ops, s_q, dtype, layout, block_size):
    """Empty, one token, fewer tokens than queries, several splits; left padding that ends in the last block."""
    q, k, v = qkv(6, (8, 2, 4), s_q, 1100, (32, 40), dtype)
    seqlens, start = int32(0, 1, 2, 513, 1100, 1024), int32(0, 0, 1, 512, 77, 1024)
    check_decode(ops, q, cache_of(k, v, seqlens, layout=layout, block_size=block_size))
    check_decode(ops, q, cache_of(k, v, seqlens, layout=layout, block_size=block_size, start=start))


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("block_size", [None, 32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("s_q", [1, 17, 40])
def test_decode_attention_of_padding_alone(ops, s_q, dtype, layout, block_size, with_sinks):
    """Entries that begin at their end or behind it, some beyond the cache: none of their pages is looked up."""
    q, k, v = qkv(6, (8, 2, 4), s_q, 64, (32, 40), dtype)
    seqlens, start = int32(5, 64, 0, 40, 33, 50), int32(5, 64, 70, 41, 2**31 - 1, 49)
    cache = cache_of(k, v, seqlens, layout=layout, block_size=block_size, start=start)
    sinks = torch.randn(8) if with_sinks else None
    check_decode(ops, q, cache, sinks=sinks)
    out, lse = ops.decode_attention(q, cache.k_cache, cache.v_cache, cache.seqlens, sinks=sinks, **cache.options)
    nothing = torch.full((8, 1), -torch.inf) if sinks is None else sinks[:, None]
    assert (out[:5] == 0).all()
    torch.testing.assert_close(lse[:5], nothing.expand(5, 8, s_q))
    for tail in range(len(TAILS)):
        out, lse, kept_mass, indices, rows_used, _ = ops.selective_v_attention(
            q, cache.k_cache, cache.v_cache, cache.seqlens, 3, tail=tail, keep_first=2, keep_last=2, **cache.options
        )
        assert (out[:5] == 0).all() and (lse[:5] == -torch.inf).all()
        assert (kept_mass[:5] == 0).all() and (indices[:5] == -1).all() and (rows_used[:5] == 0).all()


@pytest.mark.parametrize("keep", [2**31, 2**63 - 1])
def test_selective_v_attention_keeps_more_than_there_is(ops, keep):
    q, k, v = qkv(2, (8, 2, 4), 3, 90, (16, 24))
    cache = cache_of(k, v, int32(90, 40), start=int32(7, 0))
    args = (q, cache.k_cache, cache.v_cache, cache.seqlens)
    expected = ops.decode_attention(*args, **cache.options)
    for options in ({"keep_first": keep}, {"keep_last": keep}, {"keep_first": keep, "keep_last": keep}):
        out, lse, kept_mass, _, rows_used, _ = ops.selective_v_attention(*args, 1, **options, **cache.options)
        torch.testing.assert_close((out, lse), expected)
        assert (kept_mass == 1).all() and (rows_used == torch.tensor([[81, 82, 83], [38, 39, 40]])[:, None]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_attention_long(ops, dtype, layout):
    q, k, v = qkv(1, (8, 1, 4), 1, 20000, (64, 32), dtype)
    check_decode(ops, q, cache_of(k, v, int32(19999), layout=layout), softmax_scale=0.2)


@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_decode_attention_small_pages(ops, block_size):
    q, k, v = qkv(2, (8, 4, 2), 2, 43, (16, 16))
    check_decode(ops, q, cache_of(k, v, int32(43, 20), block_size=block_size, start=int32(6, 0)))


def test_decode_attention_of_a_plain_cache(ops):
    """A `[b, n_k, s, d_k]` tensor is a cache by a free view, whatever its strides."""
    q, k, v = qkv(2, (12, 4, 6), 1, 50, (24, 16))
    k, v = strided(k, "tokens first"), strided(v, "gaps")
    k_cache, v_cache = reference.group(k, 2), reference.group(v, 2)
    assert k_cache.data_ptr() == k.data_ptr() and v_cache.data_ptr() == v.data_ptr()
    out, _ = ops.decode_attention(q, k_cache, v_cache, int32(50, 41))
    exact = reference.attention(q, k, v, kv_end=int32(50, 41), dtype=D)
    assert_accurate(out, exact, reference.attention(q, k, v, kv_end=int32(50, 41)))


# ---- selective_v_attention -------------------------------------------------------------------------------------------


def integers(b, heads, s_q, s_k, dims, dtype):
    """q and k of small integers: every dot product is exact in every precision, and ties abound."""
    q, k, v = qkv(b, heads, s_q, s_k, dims)
    return q.round().clamp(-2, 2).to(dtype), k.round().clamp(-2, 2).to(dtype), v.to(dtype)


def check_selective(ops, q, cache, top_k, tail="drop", v_stats=None, **kwargs):
    args = (q, cache.k_cache, cache.v_cache, cache.seqlens, top_k)
    out, *stats = ops.selective_v_attention(
        *args,
        tail=TAILS.index(tail),
        v_stats=v_stats,
        return_bound=True,
        return_indices=True,
        **cache.options,
        **kwargs,
    )
    stats = diffqkv.SelectiveVStats(*stats)
    options = {"tail": tail, "v_stats": v_stats, **cache.reference_options, **kwargs}
    exact, want = reference.selective_v_attention(*args, dtype=D, **options)
    low, _ = reference.selective_v_attention(*args, dtype=torch.float32, **options)
    assert torch.equal(stats.indices, want.indices)
    assert torch.equal(stats.rows_used, want.rows_used)
    assert_accurate(out, exact, low.to(q.dtype))
    assert_lse(stats.lse, want.lse)
    torch.testing.assert_close(stats.kept_mass.double(), want.kept_mass, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.error_bound.double(), want.error_bound, atol=1e-3, rtol=1e-3)
    return out, stats


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_selective_v_attention_heads(ops, heads, dtype, layout, tail):
    q, k, v = integers(3, heads, 1, 150, (16, 24), dtype)
    check_selective(ops, q, cache_of(k, v, int32(150, 7, 64), layout=layout), 20, tail)


@pytest.mark.parametrize("top_k", [1, 7, 100, 999, 1000, 3000])
@pytest.mark.parametrize("block_size", [None, 32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_selective_v_attention_sizes(ops, layout, block_size, top_k):
    q, k, v = integers(3, (8, 2, 4), 3, 1000, (32, 16), torch.float32)
    seqlens, start = int32(1000, 0, 600), int32(0, 0, 555)
    cache = cache_of(k, v, seqlens, layout=layout, block_size=block_size, start=start)
    check_selective(ops, q, cache, top_k, "mean")


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("keep", [(3, 0), (0, 3), (5, 40), (100, 100)])
def test_selective_v_attention_keeps_ends(ops, keep, tail):
    """Forced rows may overlap each other and the best ones, or reach beyond the sequence."""
    q, k, v = integers(2, (8, 2, 4), 2, 90, (16, 16), torch.float32)
    cache = cache_of(k, v, int32(90, 45), start=int32(10, 0))
    check_selective(ops, q, cache, 6, tail, keep_first=keep[0], keep_last=keep[1])


@pytest.mark.parametrize("order", ["constant", "ascending", "descending"])
def test_selective_v_attention_orders(ops, order):
    steps = {"constant": torch.ones(2000), "ascending": torch.arange(2000.0), "descending": -torch.arange(2000.0)}
    q, k, v = torch.zeros(1, 2, 1, 8), torch.zeros(1, 1, 2000, 8), torch.randn(1, 2, 2000, 8)
    q[..., 0], k[..., 0] = 1.0, steps[order]
    for scale in (1e-3, -1e-3):
        _, stats = check_selective(ops, q, cache_of(k, v, int32(2000)), 50, softmax_scale=scale)
        last = (order == "ascending") == (scale > 0) and order != "constant"
        assert stats.indices[0, 0, 0].tolist() == list(range(1950, 2000) if last else range(50))


@pytest.mark.parametrize("tail", ["mean", "renorm"])
def test_selective_v_attention_with_v_stats(ops, tail):
    q, k, v = integers(2, (8, 2, 4), 1, 80, (16, 16), torch.bfloat16)
    cache = cache_of(k, v, int32(80, 60))
    rows = cache.v.double().nan_to_num(0.0)
    v_stats = torch.cat([rows.sum(2), rows.norm(dim=-1).amax(2)[..., None]], -1).float()
    kept, _ = check_selective(ops, q, cache, 5, tail, v_stats=v_stats)
    computed, _ = check_selective(ops, q, cache, 5, tail)
    torch.testing.assert_close(kept, computed)


@pytest.mark.parametrize("stats", [False, True], ids=["", "v_stats"])
@pytest.mark.parametrize("block_size", [None, 32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tail", TAILS)
def test_selective_v_attention_of_several_queries_is_that_of_each(ops, tail, layout, block_size, stats):
    """Whatever lies behind a query, as the drafts of speculative decoding do, is nothing to it."""
    q, k, v = integers(3, (8, 2, 4), 4, 130, (16, 24), torch.float32)
    v = v + 10 * torch.arange(130)[:, None]  # the newest rows move any mean that takes them in
    seqlens, start = int32(130, 77, 3), int32(0, 60, 0)  # the last entry has fewer tokens than queries
    options = {"tail": TAILS.index(tail), "return_bound": True, "return_indices": True, "keep_last": 1}

    def call(q, seqlens):
        cache = cache_of(k, v, seqlens, layout=layout, block_size=block_size, start=start)
        rows = cache.v.nan_to_num(0.0)
        v_stats = torch.cat([rows.sum(2), rows.norm(dim=-1).amax(2)[..., None]], -1) if stats else None
        args = (q, cache.k_cache, cache.v_cache, seqlens)
        dense, _ = ops.decode_attention(*args, **cache.options)
        return dense, *ops.selective_v_attention(*args, 9, v_stats=v_stats, **options, **cache.options)

    together = call(q, seqlens)
    for i in range(4):
        alone = call(q[:, :, i : i + 1], (seqlens - 3 + i).clamp_min(0))
        for a, b in zip(together[:-1], alone[:-1], strict=True):
            torch.testing.assert_close(a[:, :, i : i + 1], b, atol=2e-3, rtol=1e-5)
        assert (together[-1][:, :, i] >= alone[-1][:, :, 0] * (1 - 1e-5) - 2e-3).all()
    dense, out, bound = together[0], together[1], together[-1]
    assert ((out - dense).norm(dim=-1) <= bound * (1 + 1e-4) + 2e-3).all()


def test_selective_v_attention_asks_for_no_more_than_the_cache_holds(ops):
    """top_k beyond the capacity costs nothing, but where the caller wants places for as many indices."""
    q, k, v = qkv(2, (8, 2, 4), 1, 100, (16, 24))
    cache = cache_of(k, v, int32(100, 61))
    args = (q, cache.k_cache, cache.v_cache, cache.seqlens)
    for top_k in (100, 10**9, 2**40, 2**63 - 1):
        for options in ({}, {"max_error": 0.1}, {"keep_first": 2**63 - 1, "keep_last": 2**62}):
            out, _, _, indices, used, _ = ops.selective_v_attention(*args, top_k, **options)
            assert torch.equal(out, ops.selective_v_attention(*args, 100, **options)[0])
            assert indices.shape == (2, 8, 1, 0)
            assert torch.equal(used, cache.seqlens[:, None, None].expand(2, 8, 1))
    indices = ops.selective_v_attention(*args, 5000, return_indices=True)[3]
    assert indices.shape == (2, 8, 1, 5000)
    assert torch.equal(indices[1, 0, 0, :61], torch.arange(61)) and (indices[1, :, :, 61:] == -1).all()
    with pytest.raises((ValueError, RuntimeError), match=r"top_k: got 1099511627776, want 1 to 8388608 where indices"):
        ops.selective_v_attention(*args, 2**40, return_indices=True)


def test_selective_v_attention_bound_holds(ops):
    q, k, v = qkv(2, (8, 2, 4), 1, 400, (32, 32))
    cache = cache_of(k, v, int32(400, 250))
    args = (q, cache.k_cache, cache.v_cache, cache.seqlens)
    dense = reference.decode_attention(*args, dtype=D)
    for tail in range(3):
        for top_k in (1, 10, 100, 399):
            out, *_, bound = ops.selective_v_attention(*args, top_k, tail=tail, return_bound=True)
            assert ((out.double() - dense).norm(dim=-1) <= bound + 1e-5).all()
            *_, unasked = ops.selective_v_attention(*args, top_k, tail=tail)
            assert (unasked == torch.inf).all()


def certified_inputs(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = qkv(2, (8, 2, 4), 2, 700, (32, 32))
    if kind == "sharp":
        q = q * 6
    elif kind == "flat":
        q = q * 1e-3
    elif kind == "adversarial":  # what is left out all points one way, and one unread row is very long
        q = q * 3
        v = v * 1e-3 + 1.0
        v[:, :, 650] *= 30.0
    return q, k, v


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", ["random", "sharp", "flat", "adversarial"])
@pytest.mark.parametrize("max_error", [1e-3, 0.05, 0.5, 3.0, 1e9])
def test_selective_v_attention_keeps_max_error(ops, max_error, kind, tail):
    """Against exact dense attention; and no row reads more than its guarantee needs."""
    q, k, v = certified_inputs(kind)
    cache = cache_of(k, v, int32(700, 350))
    args = (q, cache.k_cache, cache.v_cache, cache.seqlens)
    options = {"tail": TAILS.index(tail), "max_error": max_error, "return_indices": True}
    out, lse, kept, indices, rows, bound = ops.selective_v_attention(*args, 40, **options)
    error = (out.double() - reference.decode_attention(*args, dtype=D)).norm(dim=-1)
    rounding = 5e-5  # of fp32 scores near 100
    assert (error <= max_error + rounding).all() and (error <= bound + rounding).all() and (bound <= max_error).all()

    _, want = reference.selective_v_attention(*args, 40, tail=tail, max_error=max_error, dtype=D)
    assert torch.equal(indices, want.indices)
    assert_lse(lse, want.lse)
    # Rounding of the mass may make a difference of some rows, or tip a row over to dense attention.
    dense = rows > 4 * 40
    assert (((rows - want.rows_used).abs() <= 10) | ((rows > 150) & (want.rows_used > 150))).all()
    assert (kept[dense] == 1).all() and (bound[dense] == 0).all()
    if kind == "flat" and max_error < 0.1:
        assert dense.all()


def test_selective_v_attention_max_error_zero_is_dense_attention(library):
    q, k, v = certified_inputs("random")
    cache = cache_of(k, v, int32(700, 350))
    args = (q, cache.k_cache, cache.v_cache, cache.seqlens)
    out, lse, *_ = library.selective_v_attention(*args, 40, max_error=0.0)
    dense_out, dense_lse = library.decode_attention(*args)
    assert torch.equal(out, dense_out) and torch.equal(lse, dense_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_selective_v_attention_max_error_with_pages_and_forced_rows(ops, layout, dtype):
    q, k, v = qkv(2, (12, 4, 6), 3, 300, (40, 56), dtype)
    cache = cache_of(k, v, int32(300, 170), layout=layout, block_size=32, start=int32(0, 11))
    args = (q, cache.k_cache, cache.v_cache, cache.seqlens)
    exact = reference.decode_attention(*args, dtype=D, **cache.reference_options)
    rounding = 1e-5 if dtype == torch.float32 else 2**-7 * exact.norm(dim=-1)
    for max_error in (1e-4, 0.3, 2.0):
        out, *_, rows, bound = ops.selective_v_attention(
            *args, 30, keep_first=2, keep_last=5, max_error=max_error, **cache.options
        )
        assert ((out.double() - exact).norm(dim=-1) <= max_error + rounding).all()
        assert (bound <= max_error).all() and (rows >= 30).all()


def test_selective_v_attention_nan_score_makes_its_rows_nan(ops):
    """K head 1 has a NaN among the keys that count: the q heads that read it are NaN, the others are not."""
    q, k, v = qkv(1, (8, 2, 4), 1, 600, (16, 16))
    k[0, 1, 123, 4] = NAN
    cache = cache_of(k, v, int32(600))
    for tail in range(3):
        out, lse, *_ = ops.selective_v_attention(q, cache.k_cache, cache.v_cache, cache.seqlens, 10, tail=tail)
        assert out[0, 4:].isnan().all() and lse[0, 4:].isnan().all()
        assert out[0, :4].isfinite().all() and lse[0, :4].isfinite().all()


# ---- kv_cache_update -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [None, 32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(32, 4, 16), (12, 6, 4), (5, 1, 5)])
def test_kv_cache_update_writes_these_slots_only(ops, heads, dtype, layout, block_size):
    n_q, n_k, n_v = heads
    _, k, v = qkv(2, heads, 1, 6, (24, 16), dtype)
    positions = torch.tensor([[3, -1, 95, 40, 41, 0], [-1, -1, -1, -1, 7, 64]])
    empty_k, empty_v = k.new_full((2, n_k, 96, 24), NAN), v.new_full((2, n_v, 96, 16), NAN)
    cache = cache_of(empty_k, empty_v, int32(96, 96), layout=layout, block_size=block_size)
    want_k, want_v = cache.k_cache.clone(), cache.v_cache.clone()
    stats = torch.zeros(2, n_v, 17)
    want_stats = stats.double()
    table = {"block_table": cache.block_table}
    for index in (positions, positions.int()):
        ops.kv_cache_update(
            cache.k_cache, cache.v_cache, k, v, index, v_stats=stats, k_layout=LAYOUT_CODE[layout], **table
        )
        reference.cache_update(want_k, want_v, k, v, index, v_stats=want_stats, k_layout=layout, **table)
        torch.testing.assert_close(cache.k_cache, want_k, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(cache.v_cache, want_v, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(stats.double(), want_stats, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rope_dtype", ["float32", "as k"])
@pytest.mark.parametrize("d_rot", [0, 8, 24])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_cache_update_rotates(ops, dtype, layout, shared, d_rot, rope_dtype):
    _, k, v = qkv(2, (8, 2, 4), 1, 5, (24, 16), dtype)
    angle = torch.rand(1 if shared else 2, 5, d_rot) * 6.3
    rope = torch.float32 if rope_dtype == "float32" else dtype
    cos, sin = angle.cos().to(rope), angle.sin().to(rope)
    cache = cache_of(k.new_zeros(2, 2, 64, 24), v.new_zeros(2, 4, 64, 16), int32(64, 64), layout=layout)
    positions = torch.tensor([[0, 1, 2, 3, 4], [59, 60, 61, 62, 63]])
    ops.kv_cache_update(cache.k_cache, cache.v_cache, k, v, positions, cos=cos, sin=sin, k_layout=LAYOUT_CODE[layout])
    dense = reference.ungroup(cache.k_cache) if layout == "rows" else reference.panels_to_rows(cache.k_cache)
    written = dense.gather(2, positions[:, None, :, None].expand(2, 2, 5, 24))
    exact = reference.rotate(k, cos, sin, D)
    assert_accurate(written, exact, reference.rotate(k, cos, sin).to(dtype))
    assert dense.count_nonzero() <= written.numel()


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("block_size", [None, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_cache_update_of_a_prompt_is_that_of_its_tokens(library, dtype, layout, block_size, rope):
    """Bit by bit, however the tokens lie to panels, pages and threads; of two in one slot the last one counts."""
    _, k, v = qkv(2, (12, 6, 4), 1, 400, (24, 16), dtype)
    angles = torch.randn(2, 1, 400, 20).unbind() if rope else ()
    empty = k.new_zeros(2, 6, 448, 24), v.new_zeros(2, 4, 448, 16)
    cache = cache_of(*empty, int32(448, 448), layout=layout, block_size=block_size)
    in_order = torch.stack([torch.arange(9, 409), torch.arange(48, 448)])
    gaps = torch.where(torch.arange(400) % 37 == 3, -1, in_order)
    shuffled = torch.randperm(448)[:400].repeat(2, 1)
    shuffled[1, 50:90] = torch.arange(300, 340)

    def write(positions, step, with_stats):
        k_cache, v_cache = cache.k_cache.clone(), cache.v_cache.clone()
        stats = torch.zeros(2, 4, 17) if with_stats else None
        pieces = [k.split(step, 2), v.split(step, 2), positions.split(step, 1), *(x.split(step, 1) for x in angles)]
        for new_k, new_v, index, *cos_sin in zip(*pieces, strict=True):
            options = dict(zip(("cos", "sin"), cos_sin, strict=False)) | {"block_table": cache.block_table}
            library.kv_cache_update(
                k_cache, v_cache, new_k, new_v, index, v_stats=stats, k_layout=LAYOUT_CODE[layout], **options
            )
        return [k_cache, v_cache, *([stats] if with_stats else [])]

    for positions in (in_order, gaps, shuffled):
        for with_stats in (False, True):
            prompt, single = (write(positions, step, with_stats) for step in (400, 1))
            for a, b in zip(prompt, single, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_kv_cache_update_of_strided_inputs(ops):
    _, k, v = qkv(2, (8, 2, 4), 1, 7, (16, 16))
    k, v = strided(k, "tokens first"), strided(v, "gaps")
    positions = torch.arange(14).view(7, 2).T
    k_cache, v_cache = torch.zeros(2, 20, 2, 1, 16).transpose(1, 2), torch.zeros(2, 2, 20, 2, 16)
    ops.kv_cache_update(k_cache, v_cache, k, v, positions)
    for b in range(2):
        assert torch.equal(reference.ungroup(k_cache)[b][:, positions[b]], k[b])
        assert torch.equal(reference.ungroup(v_cache)[b][:, positions[b]], v[b])


# ---- bits ------------------------------------------------------------------------------------------------------------


def results(ops, part=slice(None)):
    """Every op on the same data; part selects batch entries."""
    torch.manual_seed(1)
    out = []
    for dtype in (torch.float32, torch.bfloat16):
        for s_q in (1, 5, 130):
            q, k, v = (x[part] for x in qkv(3, (8, 2, 4), s_q, 1300, (32, 64), dtype))
            seqlens, start = int32(1300, 700, 900)[part], int32(0, 3, 600)[part]
            out += ops.flash_attention(q, k, v, causal=True, kv_start=start, kv_end=seqlens)
            for layout in LAYOUTS:
                cache = cache_of(k, v, seqlens, layout=layout, start=start)
                args = (q, cache.k_cache, cache.v_cache, seqlens)
                out += ops.decode_attention(*args, **cache.options)
                if s_q < 100:
                    asked = {"return_bound": True, "return_indices": True}
                    out += ops.selective_v_attention(*args, 30, tail=2, **asked, **cache.options)
        gate, up = torch.randn(2, 3, 7, 1001).to(dtype)
        out.append(ops.swiglu(gate[part], up[part]))
        x = torch.randn(3, 23, 1024).to(dtype)
        for form, zeros in WEIGHTS:
            w = linear_weights(form, 500, 1024, dtype, zeros)
            out += [ops.packed_linear(x[part, :rows], *w, None, 500) for rows in (1, 3, 23)]
        wide = torch.randn(3, 40, 8, 96).to(dtype)
        out.append(ops.rms_norm(wide.flatten(2)[part], torch.ones(768, dtype=dtype), 1e-6))
        out.append(ops.rotary_embedding(wide[part], *torch.randn(2, 1, 40, 64)))
    return out


def test_bits_do_not_depend_on_threads_or_repeats(library, threads):
    threads(1)
    one = results(library)
    for n in (2, 3, 2):
        threads(n)
        for a, b in zip(one, results(library), strict=True):
            assert torch.equal(a, b)


def test_bits_do_not_depend_on_the_batch(library):
    whole = results(library)
    for b in range(3):
        for i, (a, alone) in enumerate(zip(whole, results(library, slice(b, b + 1)), strict=True)):
            assert torch.equal(a[b : b + 1], alone), f"result {i} of entry {b}"


# ---- wrappers --------------------------------------------------------------------------------------------------------


def test_wrappers_return_what_the_ops_return(library):
    q, k, v = qkv(2, (8, 2, 4), 2, 70, (16, 24))
    assert torch.equal(diffqkv.flash_attention(q, k, v), library.flash_attention(q, k, v)[0])
    for a, b in zip(
        diffqkv.flash_attention(q, k, v, causal=True, softmax_scale=0.1, kv_start=int32(1, 2), return_lse=True),
        library.flash_attention(q, k, v, causal=True, softmax_scale=0.1, kv_start=int32(1, 2)),
        strict=True,
    ):
        assert torch.equal(a, b)
    cache = cache_of(k, v, int32(70, 40), layout="panels", start=int32(0, 4), block_size=32)
    args = (q, cache.k_cache, cache.v_cache, cache.seqlens)
    out, lse = diffqkv.decode_attention(*args, return_lse=True, **cache.reference_options)
    want, want_lse = library.decode_attention(*args, **cache.options)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert torch.equal(diffqkv.decode_attention(*args, **cache.reference_options), want)
    for code, tail in enumerate(TAILS):
        out, stats = diffqkv.selective_v_attention(*args, 5, tail=tail, return_stats=True, **cache.reference_options)
        asked = {"return_bound": True, "return_indices": True}
        want = library.selective_v_attention(*args, 5, tail=code, **asked, **cache.options)
        for a, b in zip((out, *stats), want, strict=True):
            assert torch.equal(a, b)
    k_cache, v_cache = cache.k_cache.clone(), cache.v_cache.clone()
    positions = torch.tensor([[0, 69], [4, -1]])
    options = {"block_table": cache.block_table}
    diffqkv.kv_cache_update(k_cache, v_cache, k[:, :, :2], v[:, :, :2], positions, k_layout="panels", **options)
    library.kv_cache_update(cache.k_cache, cache.v_cache, k[:, :, :2], v[:, :, :2], positions, k_layout=1, **options)
    torch.testing.assert_close(k_cache, cache.k_cache, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(v_cache, cache.v_cache, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(diffqkv.swiglu(q, q), library.swiglu(q, q))
    x, bias, w = torch.randn(2, 3, 64), torch.randn(40), linear_weights("int4", 40, 64, zeros=True)
    out = diffqkv.packed_linear(x, w.weight, 40, scales=w.scales, zeros=w.zeros, bias=bias)
    assert torch.equal(out, library.packed_linear(x, *w, bias, 40))

    weight, angles = torch.randn(16), torch.randn(1, 8, 16)
    assert torch.equal(diffqkv.rms_norm(q, weight, 1e-5), library.rms_norm(q, weight, 1e-5))
    assert torch.equal(diffqkv.rotary_embedding(q, angles, angles), library.rotary_embedding(q, angles, angles))


def test_probe_counts_its_work(library):
    probe, data = torch.ops.diffqkv.probe, torch.zeros(1 << 16)
    threads = torch.get_num_threads()
    per_round = probe(data, 0, 1)
    assert per_round > 0 and per_round % threads == 0
    assert probe(data, 0, 5) == 5 * per_round
    assert probe(data, 1, 3) in (0, 6 * per_round)  # none without a bf16 dot product, else twice the FLOPs
    assert probe(data, 2, 3) == 3 * data.nbytes // (4096 * threads) * (4096 * threads)
    for arguments, text in (((data, 3, 1), "what: got 3"), ((data, 0, -1), "rounds: got -1")):
        with pytest.raises(RuntimeError, match=text):
            probe(*arguments)
