"""Cache update: new K, rotated on the way, and V are written into a cache."""

from itertools import cycle

import torch

import diffqkv
from diffqkv import reference

from . import limits
from .layer import N_K, N_V, D, Size, cache_layer, heads, rotating_layers, rotating_rows
from .line import Line, difference, measure

TITLE = (
    "`kv_cache_update` with RoPE, K in panels: one token into a cache of so many, or a whole prompt; torch: rotation "
    "and slice assignment to rows; limit: copying as many bytes"
)
SIZES = (Size(8192), Size(4096, prompt=True))


def _update(layer, k, v, positions, cos, sin):
    diffqkv.kv_cache_update(layer.k_cache, layer.v_cache, k, v, positions, cos=cos, sin=sin, k_layout=layer.k_layout)


def _torch_update(rows, k, v, slots, cos, sin):
    first, second = k.chunk(2, dim=-1)
    k_cache, v_cache = rows
    k_cache[:, :, slots] = k * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    v_cache[:, :, slots] = v


def _error(old, k, v, positions, cos, sin) -> float:
    """Of everything in the cache: what must not change counts too."""
    layer, slots = cache_layer(*old), positions[0]
    _update(layer, k, v, positions, cos, sin)
    want_k, want_v = (x.double() for x in old)
    want_k[:, :, slots] = reference.rotate(k.double(), cos.double(), sin.double())
    want_v[:, :, slots] = v.double()
    errors = [difference(got, want) for got, want in zip(layer.dense(), (want_k, want_v), strict=True)]
    return torch.tensor(errors).max().item()  # unlike max(), it keeps a NaN


def run(size: Size, dtype: torch.dtype, seconds: float) -> Line:
    old = heads(N_K, size.tokens, dtype, size.batch), heads(N_V, size.tokens, dtype, size.batch)
    new = size.tokens if size.prompt else 1
    k, v = heads(N_K, new, dtype, size.batch), heads(N_V, new, dtype, size.batch)
    angles = torch.rand(1, new, D // 2).repeat(1, 1, 2) * torch.pi
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    # One token in each panel in turn: the same slot of a few caches would soon be in the L2.
    begins = range(0, size.tokens, size.tokens if size.prompt else reference.PANEL_TOKENS)
    positions = cycle([torch.arange(begin, begin + new).expand(size.batch, new) for begin in begins])
    slots = cycle([slice(begin, begin + new) for begin in begins])
    layers, rows = rotating_layers(*old), rotating_rows(*old)

    nbytes = k.nbytes + v.nbytes
    return measure(
        "cache_update",
        size,
        dtype,
        seconds,
        error=_error(old, k, v, next(positions), cos, sin),
        ours=lambda: _update(next(layers), k, v, next(positions), cos, sin),
        peers={"torch": lambda: _torch_update(next(rows), k, v, next(slots), cos, sin)},
        limit=limits.copy(nbytes),
        work=2 * nbytes,
    )
