"""The specification itself, against torch and against its own definition."""

import pytest
import torch
import torch.nn.functional as F
from helpers import HEADS, LAYOUTS, NAN, TAILS, cache_of, int32, qkv
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffqkv import reference

D = torch.float64


@pytest.mark.parametrize("causal", [False, True])
def test_equal_heads_equal_sdpa(causal):
    q, k, v = qkv(2, (4, 4, 4), 9, 9, (16, 24), D)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(reference.attention(q, k, v, causal=causal), expected)


def test_unequal_heads_equal_math_sdpa():
    """torch's math path repeats K and V independently."""
    q, k, v = qkv(2, (32, 4, 16), 5, 7, (16, 16), D)
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(reference.attention(q, k, v), expected)


@pytest.mark.parametrize("heads", HEADS)
def test_head_map(heads):
    """Each q head by itself, with the K and V head of eq. 16 and 17."""
    n_q, n_k, n_v = heads
    q, k, v = qkv(1, heads, 3, 6, (8, 16), D)
    out = reference.attention(q, k, v, softmax_scale=0.3)
    for i in range(n_q):
        weights = (q[0, i] @ k[0, i * n_k // n_q].T * 0.3).softmax(-1)
        torch.testing.assert_close(out[0, i], weights @ v[0, i * n_v // n_q])


@pytest.mark.parametrize("s_q, s_k", [(4, 9), (9, 4), (5, 5), (1, 7)])
@pytest.mark.parametrize("window", [(-1, -1), (2, -1), (-1, 1), (1, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_masks(s_q, s_k, window, causal):
    start, end = int32(0, 2), int32(s_k, s_k - 1)
    visible = reference.visible_keys(s_q, s_k, s_k, causal=causal, window=window, start=start, end=end)
    for b in range(2):
        for i in range(s_q):
            p = i + s_k - s_q
            for j in range(s_k):
                want = start[b] <= j < end[b]
                want &= not causal or j <= p
                want &= window[0] < 0 or j >= p - window[0]
                want &= window[1] < 0 or j <= p + window[1]
                assert bool(visible[b, 0, i, j]) == bool(want)


def test_windows_end_where_integers_do():
    """Against Python's integers, which have no end; s_q > s_k puts queries at negative positions."""
    for s_q, s_k in ((3, 5), (6, 2)):
        for window in ((2**63 - 1, -1), (-1, 2**63 - 1), (1, 2**63 - 2), (2**62, 0)):
            left, right = (2**70 if n < 0 else n for n in window)
            visible = reference.visible_keys(s_q, s_k, s_k, window=window)[0, 0].tolist()
            assert visible == [
                [i + s_k - s_q - left <= j <= i + s_k - s_q + right for j in range(s_k)] for i in range(s_q)
            ]


def test_lse_and_rows_that_see_nothing():
    q, k, v = qkv(1, (4, 2, 1), 5, 3, (8, 8), D)
    out, lse = reference.attention(q, k, v, causal=True, return_lse=True)
    assert (lse[:, :, :2] == -torch.inf).all() and (out[:, :, :2] == 0).all()
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    torch.testing.assert_close(lse[:, :, 4], scores[:, :, 4].logsumexp(-1))


def test_no_keys():
    q, k, v = qkv(2, (4, 2, 4), 3, 0, (8, 16), D)
    out, lse = reference.attention(q, k, v, return_lse=True)
    assert out.shape == (2, 4, 3, 16) and (out == 0).all() and (lse == -torch.inf).all()


def test_halves_merge_by_lse():
    q, k, v = qkv(1, (6, 2, 3), 4, 10, (8, 8), D)
    whole, lse = reference.attention(q, k, v, return_lse=True)
    parts = [
        reference.attention(q, k, v, kv_start=int32(lo), kv_end=int32(hi), return_lse=True)
        for lo, hi in ((0, 4), (4, 10))
    ]
    merged = torch.logaddexp(parts[0][1], parts[1][1])
    torch.testing.assert_close(merged, lse)
    torch.testing.assert_close(sum(o * (part - merged).exp()[..., None] for o, part in parts), whole)


def test_sinks_and_softcap():
    """A sink is a key with the given logit and a zero value; a wide softcap changes nothing."""
    q, k, v = qkv(1, (4, 2, 2), 3, 5, (8, 8), D)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=D)
    out, lse = reference.attention(q, k, v, sinks=sinks, return_lse=True)
    plain, plain_lse = reference.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(lse, torch.logaddexp(plain_lse, sinks[:, None]))
    torch.testing.assert_close(out, plain * (plain_lse - lse).exp()[..., None])
    torch.testing.assert_close(reference.attention(q, k, v, softcap=1e6), plain)
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    capped = (2 * torch.tanh(scores / 2)).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(reference.attention(q, k, v, softcap=2.0), capped)


def test_dropout_acts_on_the_weights():
    """lse, and so the denominator, are those without dropout."""
    q, k, v = qkv(2, (4, 2, 1), 3, 9, (8, 8), D)
    out, lse = reference.attention(q, k, v, dropout_p=0.25, seed=1, offset=2, return_lse=True)
    weights = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5).softmax(-1)
    kept = reference.dropout_mask(2, 4, 3, 9, 0.25, 1, 2)
    torch.testing.assert_close(out, (weights * kept / 0.75) @ v.repeat_interleave(4, 1))
    torch.testing.assert_close(lse, reference.attention(q, k, v, return_lse=True)[1])


def test_varlen_is_attention_of_each_entry():
    lengths_q, lengths_k = (3, 0, 5, 2), (4, 6, 0, 2)
    q, k, v = (torch.randn(n, h, 8, dtype=D) for n, h in ((10, 4), (12, 2), (12, 4)))
    start, end = int32(1, 0, 0, 0), int32(4, 6, 1, 1)
    out, lse = reference.attention_varlen(
        q, k, v, int32(0, 3, 3, 8, 10), int32(0, 4, 10, 10, 12), causal=True, kv_start=start, kv_end=end,
        return_lse=True,
    )  # fmt: skip
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    for i, (entry, a, b) in enumerate(zip(parts, out.split(lengths_q), lse.split(lengths_q, dim=1), strict=True)):
        expected, expected_lse = reference.attention(
            *(x.transpose(0, 1)[None] for x in entry), causal=True, kv_start=start[i : i + 1], kv_end=end[i : i + 1],
            return_lse=True,
        )  # fmt: skip
        torch.testing.assert_close(a, expected[0].transpose(0, 1))
        torch.testing.assert_close(b, expected_lse[0])


def test_gradients_are_those_of_the_specification():
    """Also where rows see nothing, and where K and V that do not exist are NaN."""
    q, k, v = qkv(2, (4, 2, 4), 5, 4, (8, 8), D)
    k[1, :, 2:], v[1, :, 2:] = NAN, NAN
    sinks = torch.randn(4, dtype=D)

    def function(q, k, v, sinks=None):
        out, lse = reference.attention(
            q, k, v, causal=True, window=(2, -1), softcap=2.0, kv_end=int32(4, 2), dropout_p=0.3, sinks=sinks,
            return_lse=True,
        )  # fmt: skip
        return out, lse.where(lse.isfinite(), 0)

    for extra in ((), (sinks,)):
        leaves = [x.requires_grad_() for x in (q, *(x.nan_to_num(7.0) for x in (k, v)), *extra)]
        assert torch.autograd.gradcheck(function, leaves)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = reference.attention(*leaves, kv_end=int32(4, 2), return_lse=True)
    dq, dk, dv = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    assert dq.isfinite().all() and (dk[1, :, 2:] == 0).all() and (dv[1, :, 2:] == 0).all()


@pytest.mark.parametrize("dtype", [D, torch.bfloat16])
def test_panels_round_trip(dtype):
    k = torch.randn(2, 3, 37, 8).to(dtype)
    panels = reference.rows_to_panels(k)
    assert panels.shape == ((2, 3, 2, 4, 32, 2) if dtype == torch.bfloat16 else (2, 3, 2, 8, 32))
    assert torch.equal(reference.panels_to_rows(panels)[:, :, :37], k)
    # The definition, element by element: token 33, dimension 5.
    element = panels[1, 2, 1, 2, 1, 1] if dtype == torch.bfloat16 else panels[1, 2, 1, 5, 1]
    assert element == k[1, 2, 33, 5]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [None, 32])
@pytest.mark.parametrize("left", [False, True])
def test_decode_attention_equals_dense(layout, block_size, left):
    q, k, v = qkv(3, (12, 4, 6), 2, 100, (16, 8), D)
    seqlens, start = int32(100, 37, 64), int32(3, 36, 40) if left else None
    cache = cache_of(k, v, seqlens, layout=layout, start=start, block_size=block_size)
    out, lse = reference.decode_attention(
        q, cache.k_cache, cache.v_cache, seqlens, return_lse=True, **cache.reference_options
    )
    for b, length in enumerate(seqlens.tolist()):
        first = 0 if start is None else int(start[b])
        expected, expected_lse = reference.attention(
            q[b : b + 1], k[b : b + 1, :, first:length], v[b : b + 1, :, first:length], causal=True, return_lse=True
        )
        torch.testing.assert_close(out[b : b + 1], expected)
        torch.testing.assert_close(lse[b : b + 1], expected_lse)


@pytest.mark.parametrize("tail", TAILS)
def test_top_k_of_everything_is_dense(tail):
    q, k, v = qkv(2, (8, 2, 4), 3, 20, (8, 16), D)
    seqlens = int32(20, 11)
    cache = cache_of(k, v, seqlens)
    dense, lse = reference.decode_attention(q, cache.k_cache, cache.v_cache, seqlens, return_lse=True)
    for top_k in (20, 33):
        out, stats = reference.selective_v_attention(q, cache.k_cache, cache.v_cache, seqlens, top_k, tail=tail)
        torch.testing.assert_close(out, dense)
        torch.testing.assert_close(stats.lse, lse)
        assert (stats.kept_mass == 1).all() and (stats.error_bound == 0).all()
        assert stats.rows_used[1, 0].tolist() == [9, 10, 11]
        assert stats.indices[1, 0, 0].tolist() == [*range(9), *[-1] * (top_k - 9)]


@pytest.mark.parametrize("sign", [1, -1])
def test_ties_go_to_the_smaller_index(sign):
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 0.0, -0.0, 2.0, 2.0], dtype=D)
    k = scores[None, None, :, None] * torch.eye(8, dtype=D)[0]
    q = sign * torch.eye(8, dtype=D)[0].view(1, 1, 1, 8)
    v = torch.randn(1, 1, 8, 8, dtype=D)
    cache = cache_of(k, v, int32(8))
    for top_k, want in ((1, [1]), (3, [1, 2, 3]), (4, [1, 2, 3, 6]), (7, [0, 1, 2, 3, 4, 6, 7])):
        _, stats = reference.selective_v_attention(
            q, cache.k_cache, cache.v_cache, int32(8), top_k, softmax_scale=0.25 * sign
        )
        assert stats.indices.flatten().tolist() == want


def test_tails_stats_and_bound_by_hand():
    q, k, v = qkv(1, (2, 1, 2), 1, 12, (8, 8), D)
    cache = cache_of(k, v, int32(12), start=int32(2))
    weights = (q[0, :, 0] @ k[0, 0, 2:].T * 8**-0.5).softmax(-1)
    dense = reference.decode_attention(q, cache.k_cache, cache.v_cache, int32(12), cache_start=int32(2))
    for tail in TAILS:
        out, stats = reference.selective_v_attention(
            q, cache.k_cache, cache.v_cache, int32(12), 3, tail=tail, keep_first=1, keep_last=2, cache_start=int32(2)
        )
        for h in range(2):
            best = weights[h].topk(3).indices
            assert stats.indices[0, h, 0].tolist() == sorted((best + 2).tolist())
            used = sorted({*best.tolist(), 0, 8, 9})
            assert stats.rows_used[0, h, 0] == len(used)
            kept = weights[h, used].sum()
            rows = v[0, h, 2:]
            expected = weights[h, used] @ rows[used]
            norm, mean = rows.norm(dim=1).max(), rows.mean(0)
            if tail == "renorm":
                expected = expected / kept
                bound = (1 - kept) * (norm + expected.norm())
            elif tail == "mean":
                expected = expected + (1 - kept) * mean
                bound = (1 - kept) * (norm + mean.norm())
            else:
                bound = (1 - kept) * norm
            torch.testing.assert_close(out[0, h, 0], expected)
            torch.testing.assert_close(stats.kept_mass[0, h, 0], kept)
            torch.testing.assert_close(stats.error_bound[0, h, 0], bound)
            assert (out - dense)[0, h, 0].norm() <= bound


def test_empty_sequence_selects_nothing():
    q, k, v = qkv(1, (4, 2, 2), 1, 5, (8, 8), D)
    cache = cache_of(k, v, int32(0))
    for tail in TAILS:
        out, stats = reference.selective_v_attention(q, cache.k_cache, cache.v_cache, int32(0), 2, tail=tail)
        assert (out == 0).all() and (stats.lse == -torch.inf).all() and (stats.indices == -1).all()
        assert (stats.kept_mass == 0).all() and (stats.rows_used == 0).all() and (stats.error_bound == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cache_update_then_decode(layout):
    """Tokens written one by one, RoPE included, read like the dense ones."""
    q, k, v = qkv(2, (8, 2, 4), 1, 40, (16, 8), D)
    cos, sin = torch.randn(1, 40, 8, dtype=D), torch.randn(1, 40, 8, dtype=D)
    cache = cache_of(torch.full_like(k, NAN), torch.full_like(v, NAN), int32(0, 0), layout=layout)
    v_stats = torch.zeros(2, 4, 9, dtype=D)
    for t in range(40):
        at = slice(t, t + 1)
        reference.cache_update(
            cache.k_cache, cache.v_cache, k[:, :, at], v[:, :, at], torch.tensor([[t], [t if t < 30 else -1]]),
            cos=cos[:, at], sin=sin[:, at], v_stats=v_stats, k_layout=layout,
        )  # fmt: skip
    first, second, rest = k.split([4, 4, 8], dim=-1)
    c1, c2, s1, s2 = cos[:, None, :, :4], cos[:, None, :, 4:], sin[:, None, :, :4], sin[:, None, :, 4:]
    rotated = torch.cat([first * c1 - second * s1, second * c2 + first * s2, rest], dim=-1)
    out = reference.decode_attention(q, cache.k_cache, cache.v_cache, int32(40, 30), k_layout=layout)
    torch.testing.assert_close(out, reference.attention(q, rotated, v, kv_end=int32(40, 30)))
    torch.testing.assert_close(v_stats[1, :, :-1], v[1, :, :30].sum(1))
    torch.testing.assert_close(v_stats[1, :, -1], v[1, :, :30].norm(dim=-1).amax(1))


def test_swiglu():
    gate, up = torch.randn(2, 3, 5, 7, dtype=D)[0], torch.randn(3, 5, 7, dtype=D)
    torch.testing.assert_close(reference.swiglu(gate, up), F.silu(gate) * up)


def test_packed_linear():
    """Panels written out place by place."""
    n, k, x, bias = 40, 64, torch.randn(3, 64, dtype=D), torch.randn(40, dtype=D)
    panels, lanes = torch.arange(n) // 32, torch.arange(n) % 32
    w = torch.randn(n, k, dtype=D)
    packed = torch.full((2, k, 32), NAN, dtype=D)
    packed[panels, :, lanes] = w
    torch.testing.assert_close(reference.packed_linear(x, packed, n), x @ w.T)
    torch.testing.assert_close(reference.packed_linear(x[0], packed, n, bias=bias), x[0] @ w.T + bias)
    pairs = torch.full((2, k // 2, 32, 2), NAN, dtype=torch.bfloat16)
    pairs[panels, :, lanes] = w.bfloat16().view(n, k // 2, 2)
    torch.testing.assert_close(reference.packed_linear(x, pairs, n, dtype=D), x @ w.bfloat16().double().T)

    scales, zeros = torch.randn(2, n, 2, dtype=D)
    in_panels = []
    for numbers in (scales, zeros):
        in_panels.append(torch.full((2, 2, 32), NAN, dtype=D))
        in_panels[-1][panels, :, lanes] = numbers
    integers = torch.randint(-8, 8, (n, k))
    dense = integers.view(n, 2, 32) * scales[..., None]
    eights = torch.zeros(2, k // 2, 32, 2, dtype=torch.int8)
    eights[panels, :, lanes] = integers.view(n, k // 2, 2).to(torch.int8)
    fours = torch.zeros(2, k // 8, 32, 4, dtype=torch.uint8)
    for i in range(8):  # input feature 2 j + h of eight: bits 4 j of half h
        byte, shift = 2 * (i % 2) + i // 4, 4 * (i // 2 % 2)
        fours[panels, :, lanes, byte] += ((integers[:, i::8] + 8) << shift).to(torch.uint8)
    for weight in (eights, fours):
        out = reference.packed_linear(x, weight, n, scales=in_panels[0])
        torch.testing.assert_close(out, x @ dense.flatten(1).T)
        out = reference.packed_linear(x, weight, n, scales=in_panels[0], zeros=in_panels[1], bias=bias)
        torch.testing.assert_close(out, x @ (dense + zeros[..., None]).flatten(1).T + bias)


def test_dtype_of_the_computation():
    q, k, v = qkv(1, (2, 1, 1), 2, 3, (8, 8), torch.bfloat16)
    assert reference.attention(q, k, v).dtype == torch.float32
    assert reference.attention(q, k, v, dtype=D).dtype == D
