"""A step of a packed model on the CPU: the layers' ops one after the other, without the modules around them.

Between weights that are read at the speed of memory, the modules of a layer, the checks of its arguments and the choice
of its attention take as long as a tenth of a step. They give the same for every token. What a step leaves out it cannot
need: `can_step` says when.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..cache import Cache
from ..cache.layers import CacheLayer
from ..ops import library
from ..ops.arguments import may_have_tangents
from ..ops.autocast import autocast_dtype
from ..ops.dispatch import OPS
from ..profiling import span
from ..reference import LAYOUTS
from .attention import MAX_DECODE_QUERIES, DiffqkvAttention, diffqkv_attention
from .mask import Spans
from .packed_linear import PackedLinear

# Modules whose hooks a step may leave out: they collect nothing that was not asked for, or nothing of layers.
_IDLE = ("transformers.utils.output_capturing", "diffqkv.profiling")


def can_step(
    layers: nn.ModuleList,
    hidden_states: Tensor,
    attention: object,
    mask: Tensor | None,
    cache: object,
    options: dict[str, Any],
) -> bool:
    """Whether `decode_step` computes what the layers would.

    That is for a few tokens behind a `diffqkv.Cache` that has some, in plain inference: no graph, forward mode,
    autocast, compiler, hook on a module, selection of V, packed row, dense mask, or wish for probabilities.

    Args:
        hidden_states: `[b, t, hidden_size]`, the layers' input.
        attention: the object that the layers would attend by.
        mask: as attention "diffqkv" takes it.
        options: what the layers would be told besides.
    """
    return (
        not torch.compiler.is_compiling()  # first: a graph must not depend on what follows
        and type(hidden_states) is Tensor
        and hidden_states.device.type == "cpu"
        and library.loaded
        and hidden_states.shape[1] <= MAX_DECODE_QUERIES
        and type(attention) is DiffqkvAttention
        and attention.function is diffqkv_attention
        and isinstance(cache, Cache)
        and not (torch.is_grad_enabled() and hidden_states.requires_grad)
        and not may_have_tangents()
        and autocast_dtype("cpu") is None
        and all(x is None or x is False for x in options.values())
        and mask is not None
        and getattr(mask, "diffqkv_spans", None) is not None
        and mask.diffqkv_spans.packing is None
        and len(cache.layers) == len(layers)
        and all(_is_written(layer, hidden_states.dtype) for layer in cache.layers)
        and not _calls_hooks(nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks)
        and all(_is_plain(layer, hidden_states.dtype) for layer in layers)
    )


def _is_written(layer: CacheLayer, dtype: torch.dtype) -> bool:
    is_here = type(layer) is CacheLayer and layer.is_initialized and layer.k_cache.device.type == "cpu"
    return is_here and layer.length > 0 and layer.dtype == dtype


def _calls_hooks(*hooks: dict) -> bool:
    """Whether a forward pass calls hooks that a step would leave out."""
    return any(getattr(hook, "__module__", None) not in _IDLE for each in hooks for hook in each.values())


def _is_plain(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the layer computes as `decode_step` does."""
    attention, mlp = layer._modules.get("self_attn"), layer._modules.get("mlp")
    if attention is None or mlp is None or attention.hidden_act != "silu" or attention.absorbs_k or attention.expands_k:
        return False
    linears = (attention._modules["o_proj"], attention.fused_proj, *mlp._modules.values())
    if attention.augments_q:
        linears += (attention._modules["q_down_proj"],)
    for module in linears:
        if type(module) is not PackedLinear:
            return False
    for norm in (layer._modules["input_layernorm"], layer._modules["post_attention_layernorm"]):
        if norm._parameters["weight"].dtype != dtype:  # torch's product with it would be wider
            return False
    for module in (layer, *layer._modules.values(), *linears):
        before, after = module._forward_pre_hooks, module._forward_hooks
        if (before or after) and _calls_hooks(before, after):
            return False
    return True


def decode_step(
    layers: nn.ModuleList, hidden_states: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: Cache
) -> Tensor:
    """The hidden states `[b, t, hidden_size]` behind the layers; K and V of the new tokens are in the cache then.

    rope: cos and sin `[b or 1, t, d]` of the new tokens.
    """
    # As in `ops.calls.write`: no op here is asked for gradients.
    with torch._C._AutoDispatchBelowADInplaceOrView():
        for i, (layer, cached) in enumerate(zip(layers, cache.layers, strict=True)):
            with span("decoder_layer", i, hidden_states):
                hidden_states = _layer_step(i, layer, cached, hidden_states, rope, mask.diffqkv_spans)
    written = (x for cached in cache.layers for x in (cached.k_cache, cached.v_cache, cached.kept_v_stats))
    torch.autograd.graph.increment_version([x for x in written if x is not None])
    for cached in cache.layers:
        cached.end_step(hidden_states.shape[1])
    return hidden_states


def _layer_step(
    i: int, layer: nn.Module, cached: CacheLayer, hidden_states: Tensor, rope: tuple[Tensor, Tensor], spans: Spans
) -> Tensor:
    norm, swiglu, rotate = OPS["rms_norm"].kernel, OPS["swiglu"].kernel, OPS["rotary_embedding"].kernel
    update, attend = OPS["kv_cache_update"].kernel, OPS["decode_attention"].kernel
    attention, mlp = layer._modules["self_attn"], layer._modules["mlp"]
    batch, tokens = hidden_states.shape[:2]
    cos, sin = rope

    normed = norm(hidden_states, *_norm_of(layer._modules["input_layernorm"]))
    *for_query, k, v = _linear(normed, attention.fused_proj).split(attention.fused_sizes, -1)
    query = for_query[0]
    if attention.augments_q:
        with span("augmented_q", i, query):
            query = _linear(swiglu(*for_query), attention.q_down_proj)
    query = rotate(query.view(batch, tokens, -1, attention.head_dim), cos, sin)
    with span("kv_cache", i, k):
        positions = cached.begin_step(batch, tokens)
        update(
            cached.k_cache,
            cached.v_cache,
            k.view(batch, tokens, -1, attention.k_head_dim).transpose(1, 2),
            v.view(batch, tokens, -1, attention.head_dim).transpose(1, 2),
            positions,
            cos=cos,
            sin=sin,
            v_stats=cached.kept_v_stats,
            k_layout=LAYOUTS.index(cached.k_layout),
        )
    with span("attention", i, query):
        attended, _ = attend(
            query.transpose(1, 2),
            cached.k_cache,
            cached.v_cache,
            spans.total,
            cache_start=spans.start,
            softmax_scale=attention.scaling,
            k_layout=LAYOUTS.index(cached.k_layout),
            window_left=spans.window,
        )
    attended = _linear(attended.transpose(1, 2).reshape(batch, tokens, -1), attention.o_proj)
    hidden_states = attended.add_(hidden_states)
    normed = norm(hidden_states, *_norm_of(layer._modules["post_attention_layernorm"]))
    gate, up, down = (mlp._modules[name] for name in ("gate_proj", "up_proj", "down_proj"))
    return _linear(swiglu(_linear(normed, gate), _linear(normed, up)), down).add_(hidden_states)


def _norm_of(norm: nn.Module) -> tuple[Tensor, float]:
    return norm._parameters["weight"], norm.variance_epsilon


def _linear(x: Tensor, linear: PackedLinear) -> Tensor:
    weight = linear._parameters
    return OPS["packed_linear"].kernel(x, weight["weight"], weight["scales"], None, weight["bias"], linear.out_features)
