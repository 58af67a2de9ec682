"""Offsets beyond 2**31 elements. The memory is reserved and, but for the rows in use, never touched."""

import pytest
import torch

import diffqkv
from diffqkv import reference

FAR = 2**31 + 4096  # elements
N_Q, N_K, N_V, D, S = 8, 2, 4, 64, 50


@pytest.fixture(scope="module")
def reserve():
    """A float16 tensor of more than 2**31 elements."""
    return torch.empty(FAR + 2**22, dtype=torch.float16)


def far_batch(reserve, shape, begin):
    """A view `[2, *shape]` whose second entry lies FAR elements behind the first."""
    strides = [FAR, *torch.empty(shape).stride()]
    view = reserve.as_strided((2, *shape), strides, begin)
    return view.copy_(torch.randn(2, *shape))


def test_flash_attention_with_a_far_batch_entry(reserve):
    q = far_batch(reserve, (N_Q, S, D), 0)
    k = far_batch(reserve, (N_K, S, D), 2**18)
    v = far_batch(reserve, (N_V, S, D), 2**19)
    out = diffqkv.flash_attention(q, k, v, causal=True)
    torch.testing.assert_close(out.float(), reference.attention(q, k, v, causal=True), atol=2e-3, rtol=0)


@pytest.mark.parametrize("k_layout", ["rows", "panels"])
def test_cache_of_more_elements_than_an_int(reserve, k_layout):
    groups, d_v = 2, 256
    tokens = FAR // (N_V * d_v) // 32 * 32 + 32  # V: more than 2**31 elements in one batch entry
    v_cache = reserve[: tokens * N_V * d_v].view(1, groups, N_V // groups, tokens, d_v).transpose(2, 3)
    size = (1, N_K, tokens // 32, D, 32) if k_layout == "panels" else (1, groups, tokens, N_K // groups, D)
    k_cache = torch.empty(size, dtype=torch.float16)
    k, v = torch.randn(1, N_K, S, D).half(), torch.randn(1, N_V, S, d_v).half()
    q = torch.randn(1, N_Q, 2, D).half()
    first = tokens - S
    diffqkv.kv_cache_update(k_cache, v_cache, k, v, torch.arange(first, tokens)[None], k_layout=k_layout)

    length, start = (torch.tensor([x], dtype=torch.int32) for x in (tokens, first))
    out = diffqkv.decode_attention(q, k_cache, v_cache, length, cache_start=start, k_layout=k_layout)
    want = reference.attention(q, k, v, causal=True)
    torch.testing.assert_close(out.float(), want, atol=2e-3, rtol=0)
