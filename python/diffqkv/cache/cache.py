"""`diffqkv.Cache`: a Hugging Face cache whose K and V have their own head counts and dimensions, written in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from transformers.cache_utils import Cache as HuggingFaceCache
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .layers import CacheLayer, SlidingCacheLayer, SlotPositions
from .shapes import ConfigOrShapes, cache_shapes, cache_windows
from .stock import check_stock_cache, tokens_of


class Cache(HuggingFaceCache):
    """K and V of all layers, each with its own head count and dimension, written in place.

    A drop-in for the caches of every Hugging Face model whose layers cache K and V of fixed shapes. It grows by
    doubling, so a token costs an amortised O(1) copy, or not at all when `max_length` reserves the memory at once. With
    attention "diffqkv" new tokens are rotated and written by one `kv_cache_update` and read where they lie; the other
    attention functions get dense tensors from `update`.

    Args:
        config_or_shapes: a model's config, or one (n_k, d_k, n_v, d_v) per layer.
        max_length: tokens per row, a hard limit whose memory is reserved at the first write. None: grow without limit.
        batch_size, dtype, device: what the cache must be used with. None: what the first write brings.
        initial_length: tokens to reserve at the first write, without being a limit.

    Raises:
        ValueError: a negative argument, a shape of another model, another batch size, dtype or device, more tokens than
            `max_length`; always before anything is written.
    """

    def __init__(
        self,
        config_or_shapes: ConfigOrShapes,
        *,
        max_length: int | None = None,
        batch_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        initial_length: int = 0,
    ) -> None:
        self.shapes = cache_shapes(config_or_shapes)
        if not self.shapes:
            raise ValueError("config_or_shapes: got no layer, want at least one")
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, want a positive integer or None")
        if initial_length < 0:
            raise ValueError(f"initial_length: got {initial_length}, want a number >= 0")
        options = {
            "max_length": max_length,
            "initial_length": initial_length,
            "batch_size": batch_size,
            "dtype": dtype,
            "device": None if device is None else _resolve(device),
            "positions": SlotPositions(),
        }
        windows = cache_windows(config_or_shapes, len(self.shapes))
        super().__init__(
            layers=[
                CacheLayer(shape, **options) if window is None else SlidingCacheLayer(shape, window=window, **options)
                for shape, window in zip(self.shapes, windows, strict=True)
            ]
        )

    @classmethod
    def from_stock(
        cls,
        config_or_shapes: ConfigOrShapes,
        stock: HuggingFaceCache | Iterable[tuple[torch.Tensor, torch.Tensor]],
        **options,
    ) -> Cache:
        """A cache with copies of the tokens of a cache of transformers, or of one (keys, values) per layer, as such a
        cache hands them out when iterated over: K `[b, G, s, (n_k / G) * d_k]` and V `[b, G, s, (n_v / G) * d_v]`.

        `options` are those of the constructor. `to_dynamic` is the way back.

        Raises:
            ValueError: the cache of another model, a quantised one, or one that has dropped tokens needed here.
        """
        cache = cls(config_or_shapes, **options)
        layers = list(stock.layers if isinstance(stock, HuggingFaceCache) else stock)
        if len(layers) != len(cache.layers):
            raise ValueError(f"stock: got {len(layers)} layers, want {len(cache.layers)}")
        for i, (layer, source) in enumerate(zip(cache.layers, layers, strict=True)):
            tokens = tokens_of(source, f"stock: layer {i}")
            if tokens is not None:
                layer.adopt(*tokens)
        return cache

    def to_dynamic(self) -> DynamicCache:
        """A `DynamicCache` with copies of the tokens; of layers with a sliding window, of those still to be seen."""
        dynamic = DynamicCache()
        for layer in self.layers:
            layer.check_complete()
            if torch.is_grad_enabled():
                layer.check_graph()
            stock = DynamicSlidingWindowLayer(sliding_window=layer.window) if layer.is_sliding else DynamicLayer()
            if layer.is_initialized:
                stock.update(layer.keys, layer.values)
            if layer.is_sliding:
                stock.cumulative_length = layer.get_seq_length()
            dynamic.layers.append(stock)
        return dynamic

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
        """keys, values and sliding window of each layer, as of a `DynamicCache`: code that gathers caches iterates."""
        for layer in self.layers:
            layer.check_complete()
            yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        layer_idx: int,
        cos: torch.Tensor | None = None,
        sin: torch.Tensor | None = None,
    ) -> None:
        """Writes new tokens of one layer in place: k `[b, n_k, s_new, d_k]`, v `[b, n_v, s_new, d_v]`.

        With cos and sin `[b or 1, s_new, d_rot]`, k is rotated while it is written.
        """
        self._layer(layer_idx).append(k, v, cos, sin)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Hugging Face's entry, on the grouped layout `[b, G, s, (heads / G) * d]`; returns all valid tokens."""
        return self._layer(layer_idx).update(key_states, value_states)

    def to_dense(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A copy of the valid tokens per layer: k `[b, n_k, s, d_k]` as it was cached, v `[b, n_v, s, d_v]`.

        Of layers with a sliding window, the tokens that are still to be seen.
        """
        if not self.is_initialized:
            raise ValueError("to_dense: got a cache without tokens, want one that was written")
        return [tuple(x.clone() for x in layer.dense()) for layer in self.layers]

    def check_fits(self, config_or_shapes: ConfigOrShapes, batch_size: int, new_tokens: int) -> None:
        """Raises ValueError unless a model of these shapes can add `new_tokens` for `batch_size` rows.

        Models call it before their first layer writes, so that a cache is never left half written.
        """
        wanted = cache_shapes(config_or_shapes)
        if len(self.shapes) != len(wanted):
            raise ValueError(f"cache: got a cache of {len(self.shapes)} layers, want {len(wanted)}")
        for i, (got, want) in enumerate(zip(self.shapes, wanted, strict=True)):
            if got != want:
                raise ValueError(f"cache: got {got} in layer {i} of the cache, want {want} as in the model")
        for layer in self.layers:
            layer.check_complete()
            if torch.is_grad_enabled():
                layer.check_graph()
        self.layers[0].check_fits(batch_size, new_tokens)

    def early_initialization(
        self,
        batch_size: int,
        num_heads: int | list[int],
        head_dim: int | list[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Reserves the buffers before the first write. K and V have shapes of their own here, which the cache knows
        since it was made: `num_heads` and `head_dim`, one number for both, are not used."""
        for layer in self.layers:
            if not layer.is_initialized:
                layer.initialize(batch_size, dtype, _resolve(device))

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        self._layer(layer_idx).offload()

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        self._layer(layer_idx % len(self.layers)).prefetch()

    def _layer(self, layer_idx: int) -> CacheLayer:
        if layer_idx >= len(self.layers):
            raise ValueError(f"layer_idx: got {layer_idx}, want less than {len(self.layers)}, the layers of the cache")
        return self.layers[layer_idx]


def check_cache(cache: HuggingFaceCache, config_or_shapes: ConfigOrShapes, batch_size: int, new_tokens: int) -> None:
    """Raises unless a model of these shapes can add `new_tokens` for `batch_size` rows to a cache of any kind."""
    if isinstance(cache, Cache):
        cache.check_fits(config_or_shapes, batch_size, new_tokens)
    elif not torch.compiler.is_compiling():
        check_stock_cache(cache, config_or_shapes, batch_size, new_tokens)


def _resolve(device: torch.device | str) -> torch.device:
    """The device with its index, as tensors on it report it."""
    return torch.empty(0, device=device).device
