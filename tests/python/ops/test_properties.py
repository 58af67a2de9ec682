"""Properties that hold for every shape, drawn by hypothesis; a failure prints the line that reproduces it."""

from functools import partial
from math import gcd

import torch
from helpers import DTYPES, LAYOUTS, NAN, assert_accurate, cache_of, int32, qkv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffqkv import reference

D = torch.float64

settings.register_profile(
    "diffqkv",
    max_examples=40,
    derandomize=True,
    print_blob=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("diffqkv")


@st.composite
def head_counts(draw):
    """Any n_q, n_k, n_v with n_k | n_q and n_v | n_q, up to 24 q heads."""
    n_q = draw(st.integers(1, 24))
    divisors = [n for n in range(1, n_q + 1) if n_q % n == 0]
    return n_q, draw(st.sampled_from(divisors)), draw(st.sampled_from(divisors))


head_dims = st.integers(1, 32).map(lambda n: 8 * n)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)


def draw_qkv(seed, b, heads, s_q, s_k, dims, dtype=torch.float32):
    torch.manual_seed(seed)
    return qkv(b, heads, s_q, s_k, dims, dtype)


@given(seeds, dtypes, head_counts(), st.integers(0, 3), st.integers(0, 40), st.integers(0, 300), head_dims, head_dims,
       st.booleans())  # fmt: skip
def test_flash_equals_reference(library, seed, dtype, heads, b, s_q, s_k, d_k, d_v, causal):
    q, k, v = draw_qkv(seed, b, heads, s_q, s_k, (d_k, d_v), dtype)
    out, _ = library.flash_attention(q, k, v, causal=causal)
    exact = reference.attention(q, k, v, causal=causal, dtype=D)
    assert_accurate(out, exact, reference.attention(q, k, v, causal=causal, dtype=dtype))


tokens_beside = st.just(-1) | st.integers(3, 60)


@given(seeds, dtypes, head_counts(), st.integers(1, 40), st.integers(40, 300), head_dims, head_dims, st.booleans(),
       tokens_beside, tokens_beside, st.sampled_from([0.0, 2.0]), st.sampled_from([0.0, 0.3]),
       st.booleans())  # fmt: skip
def test_gradients_equal_reference(
    library, seed, dtype, heads, s_q, s_k, d_k, d_v, causal, left, right, softcap, dropout_p, with_sinks
):
    """With a few keys to each query: the gradient of a softmax of one weight is 0, which no rounding error is near."""
    tensors = draw_qkv(seed, 1, heads, s_q, s_k, (d_k, d_v), dtype)
    sinks, dout = torch.randn(heads[0]) if with_sinks else None, torch.randn(1, heads[0], s_q, d_v).to(dtype)
    options = {"causal": causal, "softcap": softcap, "dropout_p": dropout_p, "seed": seed}

    def gradients(function, to=None, **window):
        leaves = [x.to(to or x.dtype).detach().requires_grad_() for x in (*tensors, sinks) if x is not None]
        out = function(*leaves[:3], sinks=leaves[3] if with_sinks else None, **options, **window)
        out = out[0] if isinstance(out, tuple) else out
        return torch.autograd.grad(out, leaves, dout.to(out.dtype))

    actual = gradients(library.flash_attention, window_left=left, window_right=right)
    exact, low = (gradients(partial(reference.attention, dtype=to), to, window=(left, right)) for to in (D, dtype))
    for a, e, lo in zip(actual, exact, low, strict=True):
        assert_accurate(a.to(dtype), e, lo, factor=3)


@given(seeds, dtypes, layouts, head_counts(), head_dims, head_dims, st.integers(1, 5), st.sampled_from([None, 32, 96]),
       st.lists(st.integers(0, 700), min_size=1, max_size=3), st.floats(0, 1))  # fmt: skip
def test_decode_attention_equals_reference(
    library, seed, dtype, layout, heads, d_k, d_v, s_q, block_size, lengths, skip
):
    capacity = max(lengths)
    q, k, v = draw_qkv(seed, len(lengths), heads, s_q, capacity, (d_k, d_v), dtype)
    seqlens, start = int32(*lengths), int32(*(int(skip * n) for n in lengths))
    cache = cache_of(k, v, seqlens, layout=layout, start=start, block_size=block_size)
    args = (q, cache.k_cache, cache.v_cache, seqlens)
    out, _ = library.decode_attention(*args, **cache.options)
    exact = reference.decode_attention(*args, dtype=D, **cache.reference_options)
    assert_accurate(out, exact, reference.decode_attention(*args, dtype=dtype, **cache.reference_options))


@given(seeds, layouts, head_counts(), st.integers(1, 3), st.integers(1, 700), st.integers(1, 800), st.integers(0, 20),
       st.integers(0, 20), st.sampled_from([None, 32]))  # fmt: skip
def test_selection_is_exact(library, seed, layout, heads, s_q, length, top_k, keep_first, keep_last, block_size):
    """Scores of small integers: exact in every precision, full of ties."""
    q, k, v = draw_qkv(seed, 1, heads, s_q, length, (8, 8))
    q, k = q.round(), k.round()
    cache = cache_of(k, v, int32(length), layout=layout, block_size=block_size)
    args = (q, cache.k_cache, cache.v_cache, cache.seqlens, top_k)
    keep = {"keep_first": keep_first, "keep_last": keep_last}
    options = keep | cache.options | {"return_indices": True}
    out, _, kept_mass, indices, rows_used, _ = library.selective_v_attention(*args, **options)
    exact, want = reference.selective_v_attention(*args, dtype=D, **keep, **cache.reference_options)
    low, _ = reference.selective_v_attention(*args, dtype=torch.float32, **keep, **cache.reference_options)
    assert torch.equal(indices, want.indices) and torch.equal(rows_used, want.rows_used)
    torch.testing.assert_close(kept_mass.double(), want.kept_mass, atol=1e-5, rtol=1e-5)
    assert_accurate(out, exact, low)


@given(seeds, head_counts(), st.integers(1, 30), st.integers(1, 600), st.floats(0, 1))
def test_two_halves_merge_by_lse(library, seed, heads, s_q, s_k, where):
    q, k, v = draw_qkv(seed, 1, heads, s_q, s_k, (16, 24))
    cut = int32(int(where * s_k))
    whole, lse = library.flash_attention(q, k, v)
    (o1, l1), (o2, l2) = (library.flash_attention(q, k, v, **{name: cut}) for name in ("kv_end", "kv_start"))
    merged = torch.logaddexp(l1, l2)
    torch.testing.assert_close(merged, lse, atol=1e-5, rtol=1e-5)
    parts = o1 * (l1 - merged).exp()[..., None] + o2 * (l2 - merged).exp()[..., None]
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


@given(seeds, head_counts(), st.integers(1, 30), st.integers(1, 300))
def test_order_of_keys_does_not_matter(library, seed, heads, s_q, s_k):
    q, k, v = draw_qkv(seed, 1, heads, s_q, s_k, (16, 24))
    order = torch.randperm(s_k)
    out, lse = library.flash_attention(q, k, v)
    shuffled, shuffled_lse = library.flash_attention(q, k[:, :, order], v[:, :, order])
    torch.testing.assert_close(shuffled, out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(shuffled_lse, lse, atol=1e-5, rtol=1e-5)


@given(seeds, dtypes, layouts, head_counts(), st.integers(1, 4), st.integers(1, 600), st.integers(0, 100))
def test_capacity_does_not_matter(library, seed, dtype, layout, heads, s_q, length, room):
    """The same bits whether the cache is full or has room, and whatever lies there."""
    q, k, v = draw_qkv(seed, 1, heads, s_q, length + room, (16, 24), dtype)
    roomy = cache_of(k, v, int32(length), layout=layout)
    tight = cache_of(k[:, :, :length], v[:, :, :length], int32(length), layout=layout)
    for a, b in zip(
        *(library.decode_attention(q, c.k_cache, c.v_cache, c.seqlens, **c.options) for c in (roomy, tight)),
        strict=True,
    ):
        assert torch.equal(a, b)


@given(seeds, dtypes, layouts, head_counts(), st.integers(1, 3), st.integers(1, 600))
def test_pages_do_not_matter(library, seed, dtype, layout, heads, s_q, length):
    """The same bits from pages in any order and from one piece."""
    q, k, v = draw_qkv(seed, 1, heads, s_q, length, (16, 24), dtype)
    paged = cache_of(k, v, int32(length), layout=layout, block_size=64)
    whole = cache_of(k, v, int32(length), layout=layout)
    for a, b in zip(
        *(library.decode_attention(q, c.k_cache, c.v_cache, c.seqlens, **c.options) for c in (paged, whole)),
        strict=True,
    ):
        assert torch.equal(a, b)


@given(seeds, dtypes, head_counts(), st.integers(1, 500))
def test_layouts_agree(library, seed, dtype, heads, length):
    q, k, v = draw_qkv(seed, 1, heads, 1, length, (32, 24), dtype)
    caches = [cache_of(k, v, int32(length), layout=layout) for layout in LAYOUTS]
    (rows, _), (panels, _) = (library.decode_attention(q, c.k_cache, c.v_cache, c.seqlens, **c.options) for c in caches)
    exact = reference.attention(q, k, v, dtype=D)
    low = reference.attention(q, k, v, dtype=dtype)
    assert_accurate(rows, exact, low)
    assert_accurate(panels, exact, low)


@given(seeds, head_counts(), st.integers(1, 40), st.integers(0, 90), st.integers(0, 90))
def test_padding_does_not_matter(library, seed, heads, s_k, left, right):
    """Left and right padding, full of NaN, leaves the bits of a short sequence alone up to tiling."""
    q, k, v = draw_qkv(seed, 1, heads, s_k, s_k, (16, 24))
    out, lse = library.flash_attention(q, k, v)
    k, v = (torch.nn.functional.pad(x, (0, 0, left, right), value=NAN) for x in (k, v))
    padded, padded_lse = library.flash_attention(q, k, v, kv_start=int32(left), kv_end=int32(left + s_k))
    torch.testing.assert_close(padded, out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded_lse, lse, atol=1e-5, rtol=1e-5)


@given(seeds, dtypes, layouts, head_counts(), head_dims, head_dims, st.integers(1, 2), st.data())
def test_kv_cache_update_writes_what_it_should(library, seed, dtype, layout, heads, d_k, d_v, b, data):
    n_q, n_k, n_v = heads
    slots = data.draw(
        st.lists(st.lists(st.integers(0, 63), unique=True, min_size=4, max_size=4), min_size=b, max_size=b)
    )
    skipped = data.draw(st.lists(st.booleans(), min_size=4 * b, max_size=4 * b))
    _, k, v = draw_qkv(seed, b, heads, 1, 4, (d_k, d_v), dtype)
    positions = torch.tensor(slots).masked_fill(torch.tensor(skipped).view(b, 4), -1)
    cache = cache_of(k.new_zeros(b, n_k, 64, d_k), v.new_zeros(b, n_v, 64, d_v), int32(*[64] * b), layout=layout)
    want_k, want_v = cache.k_cache.clone(), cache.v_cache.clone()
    library.kv_cache_update(cache.k_cache, cache.v_cache, k, v, positions, k_layout=cache.options["k_layout"])
    reference.cache_update(want_k, want_v, k, v, positions, k_layout=layout)
    assert torch.equal(cache.k_cache, want_k) and torch.equal(cache.v_cache, want_v)


@given(head_counts())
def test_groups_are_closed(heads):
    """The q heads of a group read the K and V heads of the same group, and no others."""
    n_q, n_k, n_v = heads
    groups = gcd(n_k, n_v)
    for i in range(n_q):
        assert i * n_k // n_q // (n_k // groups) == i * n_v // n_q // (n_v // groups) == i // (n_q // groups)
