"""What others make of the same attention: torch, and packages that some have. Tensors are `[b, heads, s, d]`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
_PAGE = 16


def repeated(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, backend: SDPBackend | None = None) -> Tensor:
    """torch's attention; K with fewer heads than V is repeated first, as a user of this shape has to do."""
    if k.shape[1] < v.shape[1]:
        k = repeated(k, v.shape[1])
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1])


def _grouped_weights(q: Tensor, k: Tensor, n_v: int) -> Tensor:
    """Softmax weights `[b, n_v, n_q / n_v, s]` of q `[b, n_q, 1, d]`; the q heads of a K head are rows of a matrix."""
    scores = q.unflatten(1, (k.shape[1], -1)).squeeze(3) @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    return scores.softmax(-1).flatten(1, 2).unflatten(1, (n_v, -1))


def matmul_decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Decode attention by matrix products that read each K and V head once: the fastest that plain torch does."""
    return (_grouped_weights(q, k, v.shape[1]) @ v).flatten(1, 2).unsqueeze(2)


def matmul_top_k(q: Tensor, k: Tensor, v: Tensor, top_k: int) -> Tensor:
    """`matmul_decode` with the V rows of the top_k best scores alone."""
    weights, rows = _grouped_weights(q, k, v.shape[1]).topk(top_k)
    chosen = v.gather(2, rows.flatten(2)[..., None].expand(-1, -1, -1, v.shape[-1])).unflatten(2, rows.shape[2:])
    return (weights[..., None, :] @ chosen).flatten(1, 2)


def installed(package: str) -> bool:
    return find_spec(package) is not None


def flash_attn_decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Callable[[], Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with_kvcache = import_module("flash_attn").flash_attn_with_kvcache
    return lambda: with_kvcache(q, k, v, cache_seqlens=lengths).transpose(1, 2)


def flash_attn_prompt(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return import_module("flash_attn").flash_attn_func(q, k, v, causal=True).transpose(1, 2)


def flashinfer_decode(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """FlashInfer's call, on pages of a cache of its own."""
    b, heads, s, d = k.shape
    pages = tuple(x.transpose(1, 2).reshape(-1, _PAGE, heads, d) for x in (k, v))
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    each = s // _PAGE
    first = torch.arange(b + 1, dtype=torch.int32, device=q.device) * each
    index = torch.arange(b * each, dtype=torch.int32, device=q.device)
    last = torch.full((b,), _PAGE, dtype=torch.int32, device=q.device)
    wrapper.plan(first, index, last, q.shape[1], heads, d, _PAGE, q_data_type=q.dtype, kv_data_type=k.dtype)
    query = q[:, :, 0].contiguous()
    return lambda: wrapper.run(query, pages)[:, :, None]
