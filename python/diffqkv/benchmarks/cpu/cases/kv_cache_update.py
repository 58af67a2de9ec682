"""kv_cache_update: new K, rotated on the way, and V are written into a cache."""

from itertools import cycle

import torch
from torch import Tensor

import diffqkv
from diffqkv import reference

from ...common.accuracy import difference
from ...common.inputs import N_K, N_V, D
from ...common.line import Contenders
from .. import limits
from ..layer import Size, cache_layer, cache_layers, heads, on_each, rows

TITLE = (
    "`kv_cache_update` with RoPE, K in panels: one token into a cache of so many, or a whole prompt; torch: rotation "
    "and slice assignment to rows; limit: copying as many bytes"
)
SIZES = (Size(8192), Size(4096, prompt=True))


def _ours(layer, k: Tensor, v: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
    diffqkv.kv_cache_update(layer.k_cache, layer.v_cache, k, v, positions, cos=cos, sin=sin, k_layout=layer.k_layout)


def _torch(caches: tuple[Tensor, Tensor], k: Tensor, v: Tensor, slots: slice, cos: Tensor, sin: Tensor) -> None:
    first, second = k.chunk(2, dim=-1)
    k_cache, v_cache = caches
    k_cache[:, :, slots] = k * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    v_cache[:, :, slots] = v


def _error(old: tuple[Tensor, Tensor], k: Tensor, v: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> float:
    """The error of everything in the cache: what must not change counts too."""
    layer, slots = cache_layer(*old), positions[0]
    _ours(layer, k, v, positions, cos, sin)
    want_k, want_v = (x.double() for x in old)
    want_k[:, :, slots] = reference.rotate(k.double(), cos.double(), sin.double())
    want_v[:, :, slots] = v.double()
    return difference(layer.dense(), (want_k, want_v))


def contenders(size: Size, dtype: torch.dtype) -> Contenders:
    old = heads(N_K, size.tokens, dtype, size.batch), heads(N_V, size.tokens, dtype, size.batch)
    new = size.tokens if size.prompt else 1
    k, v = heads(N_K, new, dtype, size.batch), heads(N_V, new, dtype, size.batch)
    angles = torch.rand(1, new, D // 2).repeat(1, 1, 2) * torch.pi
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    # One token in each panel in turn: the same slot of a few caches would soon be in the L2.
    begins = range(0, size.tokens, size.tokens if size.prompt else reference.PANEL_TOKENS)
    positions = [torch.arange(begin, begin + new).expand(size.batch, new) for begin in begins]
    at, slots = cycle(positions), cycle([slice(begin, begin + new) for begin in begins])

    nbytes = k.nbytes + v.nbytes
    return Contenders(
        error=_error(old, k, v, positions[0], cos, sin),
        ours=on_each(cache_layers(*old), lambda layer: _ours(layer, k, v, next(at), cos, sin)),
        peers={"torch": on_each(rows(*old), lambda caches: _torch(caches, k, v, next(slots), cos, sin))},
        limit=limits.copy(nbytes),
        work=2 * nbytes,
    )
