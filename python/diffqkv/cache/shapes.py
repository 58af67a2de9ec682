"""What each layer of a model caches: head counts and dimensions of K and V, and windows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd

from transformers import PreTrainedConfig


@dataclass
class CacheShape:
    """What one token stores in one layer: n_k K heads of d_k and n_v V heads of d_v (eq. 14).

    Neither a tuple nor frozen: the exporters of transformers take a cache apart and put it together.
    """

    n_k: int
    d_k: int
    n_v: int
    d_v: int

    @property
    def groups(self) -> int:
        return gcd(self.n_k, self.n_v)

    @property
    def k_per_group(self) -> int:
        return self.n_k // self.groups

    @property
    def v_per_group(self) -> int:
        return self.n_v // self.groups


# A model's config, or one (n_k, d_k, n_v, d_v) per layer.
ConfigOrShapes = PreTrainedConfig | Iterable[CacheShape | tuple[int, int, int, int]]


def cache_shapes(config_or_shapes: ConfigOrShapes) -> list[CacheShape]:
    """One `CacheShape` per layer, from a model's config or from tuples (n_k, d_k, n_v, d_v).

    A config without `num_key_heads` and `num_value_heads` counts as one with equal K and V heads.
    """
    if not isinstance(config_or_shapes, PreTrainedConfig):
        shapes = [x if isinstance(x, CacheShape) else CacheShape(*x) for x in config_or_shapes]
        for shape in shapes:
            sizes = (shape.n_k, shape.d_k, shape.n_v, shape.d_v)
            if any(not isinstance(size, int) or size < 1 for size in sizes):
                raise ValueError(f"config_or_shapes: got {sizes}, want positive integers (n_k, d_k, n_v, d_v)")
        return shapes
    return [_shape_of(config) for config in _layer_configs(config_or_shapes)]


def _layer_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    config = config.get_text_config(decoder=True)
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * config.num_hidden_layers


def _shape_of(config: PreTrainedConfig) -> CacheShape:
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(
            "config_or_shapes: got a model with latent attention, want (n_k, d_k, n_v, d_v) of what each layer caches: "
            "K and V in some releases of transformers, latents in others"
        )
    n_q = config.num_attention_heads
    n_kv = getattr(config, "num_key_value_heads", None) or n_q
    dim = getattr(config, "head_dim", None) or config.hidden_size // n_q
    return CacheShape(
        n_k=getattr(config, "num_key_heads", None) or n_kv,
        d_k=getattr(config, "k_head_dim", None) or dim,
        n_v=getattr(config, "num_value_heads", None) or n_kv,
        d_v=getattr(config, "v_head_dim", None) or dim,
    )


def cache_windows(config_or_shapes: ConfigOrShapes, layers: int) -> list[int | None]:
    """The sliding window of each layer, its own token included; None for layers that see all tokens."""
    if not isinstance(config_or_shapes, PreTrainedConfig):
        return [None] * layers
    windows = [getattr(config, "sliding_window", None) for config in _layer_configs(config_or_shapes)]
    layer_types = getattr(config_or_shapes.get_text_config(decoder=True), "layer_types", None)
    for i, layer_type in enumerate(layer_types or ()):
        if layer_type not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"config_or_shapes: got a layer of type {layer_type!r}, want 'full_attention' or 'sliding_attention' "
                f"(transformers' DynamicCache and StaticCache know the others)"
            )
        if layer_type == "full_attention":
            windows[i] = None
    return windows
