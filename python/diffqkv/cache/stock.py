"""The caches of transformers: what they hold, and whether a model can write into them."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache, StaticLayer

from .shapes import CacheShape, ConfigOrShapes, cache_shapes


def tokens_of(source: CacheLayerMixin | tuple, name: str) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """The grouped K and V that a layer of another cache holds, and how many tokens it has seen; None without tokens."""
    if not isinstance(source, CacheLayerMixin):
        keys, values, *window = source
        if keys is None:
            return None
        if window and window[0] is not None and keys.shape[2] >= int(window[0]) - 1:
            raise ValueError(f"{name}: got K and V of a sliding window, want the cache: it knows their positions")
        return keys, values, keys.shape[2]
    if not source.is_initialized:
        return None
    if hasattr(source, "_quantized_keys"):
        raise ValueError(f"{name}: got quantised K and V, want them as they were")
    seen = int(source.get_seq_length())
    kept = min(seen, source.keys.shape[2])  # a static layer has slots without tokens
    keys, values = (x[:, :, :kept].to(source.device) for x in (source.keys, source.values))  # it may be offloaded
    return keys, values, seen


def check_stock_cache(cache: Cache, config_or_shapes: ConfigOrShapes, batch_size: int, new_tokens: int) -> None:
    """Raises unless a model of these shapes can add `new_tokens` for `batch_size` rows, so that no cache is left half
    written. What a cache learns from its first write is not known before."""
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or layers is None:
        raise TypeError(
            f"cache: got {type(cache).__name__}, want a cache with one layer for each of the model's; "
            f"diffqkv.Cache.from_stock makes one of (keys, values) per layer"
        )
    if cache.offloading and not torch.accelerator.is_available():
        raise ValueError("cache: got a cache with offloading and no accelerator, want offloading=False")
    shapes = cache_shapes(config_or_shapes)
    if layers and len(layers) != len(shapes):
        raise ValueError(f"cache: got a cache of {len(layers)} layers, want {len(shapes)}")
    for i, (layer, shape) in enumerate(zip(layers, shapes, strict=False)):
        if layer.is_initialized:
            _check_shapes(layer, shape, batch_size, i)
    if layers and isinstance(layers[0], StaticLayer) and not layers[0].is_sliding:
        _check_room(layers[0], new_tokens)


def _check_shapes(layer: CacheLayerMixin, shape: CacheShape, batch_size: int, index: int) -> None:
    for name, width in (("keys", shape.k_per_group * shape.d_k), ("values", shape.v_per_group * shape.d_v)):
        batch, groups, _, got_width = _shape_held(layer, name)
        got, want = (batch, groups, got_width), (batch_size, shape.groups, width)
        if got != want:
            raise ValueError(
                f"cache: got {name} of batch, groups and width {got} in layer {index} of the cache, want {want}"
            )


def _shape_held(layer: CacheLayerMixin, name: str) -> torch.Size:
    quantised = getattr(layer, f"_quantized_{name}", None)
    if quantised is None:
        return getattr(layer, name).shape
    if not isinstance(quantised, tuple):  # quanto
        return quantised.shape
    codes, how = quantised
    return how["shape"] if isinstance(how, dict) else codes.shape  # hqq, fp8


def _check_room(layer: StaticLayer, new_tokens: int) -> None:
    # Reading the counter of a prompt costs one synchronisation; of every token, one too many.
    if not layer.is_initialized or new_tokens == 1 and not layer.keys.is_cpu:
        return
    past = int(layer.get_seq_length())
    if past + new_tokens > layer.max_cache_len:
        raise ValueError(
            f"cache: got {new_tokens} new tokens behind {past}, want at most max_cache_len = "
            f"{layer.max_cache_len} in all"
        )


def reserve_static_cache(
    cache: StaticCache,
    config_or_shapes: ConfigOrShapes,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Reserves the buffers of a static cache: its own early initialisation gives K and V one shape."""
    for layer, shape in zip(cache.layers, cache_shapes(config_or_shapes), strict=True):
        if not layer.is_initialized:
            widths = shape.k_per_group * shape.d_k, shape.v_per_group * shape.d_v
            layer.lazy_initialization(
                *(torch.empty(batch_size, shape.groups, 0, width, dtype=dtype, device=device) for width in widths)
            )
