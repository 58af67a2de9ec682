"""flash_attn_with_kvcache: its results, and what it writes, against the reference on dense K and V."""

import numpy as np
import pytest
import torch
from helpers import DTYPES, NAN, POISON_BLOCK, assert_accurate, assert_lse, int32
from test_flash_attn_interface import D, expected

from diffqkv import flash_attn_interface as fa

HEADS, DIMS, CAPACITY = (12, 4, 6), (32, 48), 64


class Cache:
    """A FlashAttention cache with NaN in every slot that holds no token, and its tokens as dense K and V.

    Entries of the batch lie in the entries batch_idx of a larger cache, or in shuffled blocks of a larger pool.
    """

    def __init__(self, lengths, s_new=0, dtype=torch.float32, leftpad=None, batch_idx=None, block_size=None, dims=DIMS):
        (_, n_k, n_v), (d_k, d_v), b = HEADS, dims, len(lengths)
        slot = torch.arange(CAPACITY)
        first = torch.zeros(b, dtype=torch.int32) if leftpad is None else leftpad
        self.lengths, self.s_new, self.leftpad, self.batch_idx = lengths, s_new, leftpad, batch_idx
        empty = ((slot < first[:, None]) | (slot >= lengths[:, None]))[..., None, None]
        self.dense = [
            torch.randn(b, CAPACITY, n, d).to(dtype).masked_fill(empty, NAN) for n, d in ((n_k, d_k), (n_v, d_v))
        ]
        self.block_table = None
        if block_size is not None:
            blocks = CAPACITY // block_size
            table = torch.randperm(2 * b * blocks)[: b * blocks].view(b, blocks)
            self.where = (table.repeat_interleave(block_size, 1), slot % block_size)
            unused = torch.arange(blocks) * block_size >= (lengths + s_new)[:, None]
            self.block_table = torch.where(unused, POISON_BLOCK, table).int()
            shape = (2 * b * blocks, block_size)
        else:
            entry = torch.arange(b) if batch_idx is None else batch_idx.long()
            self.where = (entry[:, None], slot)
            shape = (int(entry.max()) + 3, CAPACITY)
        self.stored = [x.new_full((*shape, *x.shape[2:]), NAN) for x in self.dense]
        for pages, x in zip(self.stored, self.dense, strict=True):
            pages[self.where] = x

    def options(self):
        return {
            "cache_seqlens": self.lengths,
            "cache_leftpad": self.leftpad,
            "cache_batch_idx": self.batch_idx,
            "block_table": self.block_table,
        }

    def append(self, k, v):
        """Writes new tokens into the dense K and V."""
        for entry, length in enumerate(self.lengths.tolist()):
            for x, new in zip(self.dense, (k, v), strict=True):
                x[entry, length : length + self.s_new] = new[entry]

    def assert_stored(self):
        """The cache holds the dense K and V, and NaN everywhere else."""
        for pages, x in zip(self.stored, self.dense, strict=True):
            want = torch.full_like(pages, NAN)
            want[self.where] = x
            torch.testing.assert_close(pages, want, equal_nan=True)


def expected_with_cache(q, cache, dtype, causal=False, window_size=(-1, -1), **options):
    """out `[b, s_q, n_q, d_v]` and lse: each entry by itself, on the keys that it has."""
    results = []
    for entry, (q_entry, k, v) in enumerate(zip(q, *cache.dense, strict=True)):
        end = int(cache.lengths[entry]) + cache.s_new
        first = 0 if cache.leftpad is None else int(cache.leftpad[entry])
        keys = slice(first, max(first, end))
        options_of_entry = {"causal": causal, "window_size": window_size, **options}
        results.append(expected(q_entry[None], k[None, keys], v[None, keys], dtype, **options_of_entry))
    return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])


def check_with_cache(q, cache, k=None, v=None, rotated=None, **options):
    """rotated: what q and k are after the rotation, which is then among the options."""
    q_rotated, k_rotated = (q, k) if rotated is None else rotated
    if k is not None:
        cache.append(k_rotated, v)
    arguments = {"k": k, "v": v, **cache.options(), **options}
    out, lse = fa.flash_attn_with_kvcache(q, *cache.stored, return_softmax_lse=True, **arguments)
    for name in ("rotary_cos", "rotary_sin", "rotary_interleaved", "num_splits"):
        options.pop(name, None)
    exact, exact_lse = expected_with_cache(q_rotated, cache, D, **options)
    assert out.dtype == q.dtype and out.is_contiguous() and lse.is_contiguous()
    assert_accurate(out, exact, expected_with_cache(q_rotated, cache, q.dtype, **options)[0])
    assert_lse(lse, exact_lse)
    cache.assert_stored()
    assert torch.equal(fa.flash_attn_with_kvcache(q, *cache.stored, **arguments), out)


def new_tokens(b, s_q, s_new, dtype=torch.float32, dims=DIMS):
    (n_q, n_k, n_v), (d_k, d_v) = HEADS, dims
    return [torch.randn(b, s, n, d).to(dtype) for s, n, d in ((s_q, n_q, d_k), (s_new, n_k, d_k), (s_new, n_v, d_v))]


KINDS = {
    "plain": {},
    "leftpad": {"leftpad": int32(7, 0, 1)},
    "batch_idx": {"batch_idx": int32(4, 0, 3)},
    "leftpad, batch_idx": {"leftpad": int32(7, 0, 1), "batch_idx": int32(4, 0, 3)},
    "paged": {"block_size": 16},
}
MASKS = [
    {"causal": False},
    {"causal": True},
    {"causal": True, "window_size": (6, -1)},
    {"causal": True, "window_size": (6, 3)},
    {"window_size": (6, 0)},
    {"window_size": (6, 2)},
    {"window_size": (-1, 1)},
    {"window_size": (3, -1)},
]


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("s_q", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_with_kvcache(kind, s_q, options):
    """Full, nearly empty and partly filled entries; with s_q = 5 some queries see nothing."""
    q, _, _ = new_tokens(3, s_q, 0)
    check_with_cache(q, Cache(int32(CAPACITY, 2, 41), **KINDS[kind]), **options)


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("kind", [{}, {"leftpad": int32(7)}, {"block_size": 16}], ids=["plain", "leftpad", "paged"])
def test_with_kvcache_of_one_entry(kind, options):
    check_with_cache(new_tokens(1, 5, 0)[0], Cache(int32(41), **kind), **options)


@pytest.mark.parametrize("wide", [2**31 - 42, 2**31 - 1, 2**31, 2**63 - 1])
def test_with_kvcache_windows_that_hold_everything(wide):
    q, cache = new_tokens(2, 5, 0)[0], Cache(int32(41, 3))
    for window in ((wide, wide), (-1, wide), (wide, -1), (2, wide), (wide, 1)):
        limits = tuple(-1 if n == wide else n for n in window)
        results = (
            fa.flash_attn_with_kvcache(q, *cache.stored, **cache.options(), window_size=w, return_softmax_lse=True)
            for w in (window, limits)
        )
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("s_q, s_new", [(1, 1), (5, 5), (5, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_with_kvcache_append(kind, s_q, s_new, options):
    q, k, v = new_tokens(3, s_q, s_new)
    check_with_cache(q, Cache(int32(20, 2, CAPACITY - s_new), s_new, **KINDS[kind]), k, v, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_with_kvcache_dtypes(dtype, causal):
    q, k, v = new_tokens(3, 4, 4, dtype)
    cache = Cache(int32(20, 0, 60), 4, dtype, block_size=8)
    check_with_cache(q, cache, k, v, causal=causal, softmax_scale=0.3, softcap=2.0, num_splits=5)


def rotate(x, cos, sin, positions, interleaved):
    """x `[b, s, heads, d]` with each pair of dimensions turned, as complex numbers; positions `[b, s]`."""
    pairs = cos.shape[1]
    turned, rest = x[..., : 2 * pairs].float(), x[..., 2 * pairs :]
    order = (pairs, 2) if interleaved else (2, pairs)
    halves = turned.unflatten(-1, order)
    real, imaginary = halves.unbind(-1 if interleaved else -2)
    angle = torch.complex(cos.float(), sin.float())[positions][:, :, None]
    result = torch.view_as_real(torch.complex(real, imaginary) * angle)
    result = result if interleaved else result.transpose(-1, -2)
    return torch.cat([result.flatten(-2).to(x.dtype), rest], -1)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (9, 4)}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_with_kvcache_rotary(kind, options, interleaved):
    """Without causality and window all queries stand at cache_seqlens, otherwise one after the other."""
    q, k, v = new_tokens(3, 5, 3)
    cache = Cache(int32(20, 2, 55), 3, **KINDS[kind])
    angle = torch.rand(CAPACITY, 8) * 6
    cos, sin = angle.cos(), angle.sin()
    first = cache.lengths[:, None].long()
    q_positions = first + torch.arange(5) if options else first.expand(3, 5)
    rotated = rotate(q, cos, sin, q_positions, interleaved), rotate(k, cos, sin, first + torch.arange(3), interleaved)
    rotary = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
    check_with_cache(q, cache, k, v, rotated, **rotary, **options)


@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float32])
def test_with_kvcache_rotary_in_low_precision(table_dtype):
    """The rotation is computed in float32 and rounded once; it is interleaved by default; d_rot may be all of d_k."""
    q, k, v = new_tokens(2, 1, 1, torch.bfloat16)
    cache = Cache(int32(20, 0), 1, torch.bfloat16)
    angle = torch.rand(CAPACITY, DIMS[0] // 2) * 6
    cos, sin = angle.cos().to(table_dtype), angle.sin().to(table_dtype)
    positions = cache.lengths[:, None].long()
    rotated = rotate(q, cos, sin, positions, True), rotate(k, cos, sin, positions, True)
    check_with_cache(q, cache, k, v, rotated, rotary_cos=cos, rotary_sin=sin)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (6, 2)}], ids=str)
@pytest.mark.parametrize("dims", [(59, 64), (16, 33), (1, 111)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_with_kvcache_of_any_head_dimension(kind, dims, options):
    """The cache is padded on the way; nothing but the new rows is written."""
    q, k, v = new_tokens(3, 5, 2, dims=dims)
    check_with_cache(q, Cache(int32(20, 2, CAPACITY - 2), 2, dims=dims, **KINDS[kind]), k, v, **options)
    check_with_cache(q, Cache(int32(20, 2, CAPACITY), dims=dims, **KINDS[kind]), **options)


def test_with_kvcache_of_any_head_dimension_rotary():
    """The rotated dimensions are some of those that are there."""
    q, k, v = new_tokens(3, 1, 1, dims=(12, 20))
    cache = Cache(int32(20, 2, 55), 1, dims=(12, 20))
    angle = torch.rand(CAPACITY, 6) * 6
    positions = cache.lengths[:, None].long()
    rotated = [rotate(x, angle.cos(), angle.sin(), positions, True) for x in (q, k)]
    check_with_cache(q, cache, k, v, rotated, rotary_cos=angle.cos(), rotary_sin=angle.sin())


def test_an_append_beyond_the_pages_is_an_error_of_both_kinds():
    """FlashAttention's RuntimeError names the block table."""
    q, k, v = new_tokens(2, 1, 1)
    cache = Cache(int32(CAPACITY, 2), block_size=16)
    before = [x.clone() for x in cache.stored]
    for kind in (RuntimeError, ValueError):
        with pytest.raises(kind, match=f"^cache_seqlens: got {CAPACITY}, want 0 to {CAPACITY - 1}, .* block_table"):
            fa.flash_attn_with_kvcache(q, *cache.stored, k, v, **cache.options())
    torch.testing.assert_close(cache.stored, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("length", [30, np.int32(30), torch.tensor(30), int32(30)[0]], ids=repr)
def test_with_kvcache_lengths(length):
    """One length for all entries may be an integer; without one the whole cache counts."""
    q, k, v = new_tokens(2, 2, 2)
    cache = Cache(int32(30, 30), 2)
    cache.append(k, v)
    out = fa.flash_attn_with_kvcache(q, *cache.stored, k, v, cache_seqlens=length, causal=True)
    exact, low = (expected_with_cache(q, cache, dtype, causal=True)[0] for dtype in (D, torch.float32))
    assert_accurate(out, exact, low)
    cache.assert_stored()
    for block_size in (None, 32):
        full = Cache(int32(CAPACITY, CAPACITY), block_size=block_size)
        out = fa.flash_attn_with_kvcache(q, *full.stored, block_table=full.block_table)
        assert torch.equal(out, fa.flash_attn_with_kvcache(q, *full.stored, **full.options()))


def test_with_kvcache_leaves_its_arguments():
    """Nothing but the cache is written."""
    q, k, v = new_tokens(2, 2, 2)
    cache = Cache(int32(30, 3), 2)
    arguments = [q, k, v, cache.lengths]
    before = [x.clone() for x in arguments]
    cos = torch.ones(CAPACITY, 8)
    fa.flash_attn_with_kvcache(q, *cache.stored, k, v, cos, cos, cache.lengths)
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))


def test_with_kvcache_long_queries():
    """A prompt whose queries become heads of one: more rows than any kernel block."""
    q, k, v = new_tokens(1, 50, 50)
    check_with_cache(q, Cache(int32(3), 50), k, v)


@pytest.mark.parametrize("causal", [False, True])
def test_with_kvcache_compiles(causal):
    q, k, v = new_tokens(2, 3, 3)
    cache, cos = Cache(int32(30, 3), 3), torch.ones(CAPACITY, 8)
    arguments = (k, v, cos, cos, cache.lengths)
    compiled = torch.compile(fa.flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    out = compiled(q, *(x.clone() for x in cache.stored), *arguments, causal=causal)
    torch.testing.assert_close(out, fa.flash_attn_with_kvcache(q, *cache.stored, *arguments, causal=causal))


def test_with_kvcache_no_queries():
    q, _, _ = new_tokens(2, 0, 0)
    for options in MASKS:
        out, lse = fa.flash_attn_with_kvcache(
            q, *Cache(int32(30, 3)).stored, cache_seqlens=int32(30, 3), return_softmax_lse=True, **options
        )
        assert out.shape == (2, 0, 12, 48) and lse.shape == (2, 12, 0)
