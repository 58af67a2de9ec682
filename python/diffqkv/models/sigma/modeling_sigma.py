# SPDX-License-Identifier: BSD-3-Clause
"""The SIGMA models with DiffQKV attention (SIGMA, arXiv 2501.13629, section 2 and Appendix E).

This file stands alone, with those that it imports from its folder: `save_pretrained` copies them beside a checkpoint,
where they run without the diffqkv package, then on stock attention functions and caches. With the package, attention
"diffqkv" and `diffqkv.Cache` are the defaults.
"""

import functools
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from math import gcd, lcm
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.integrations import use_kernel_forward_from_hub
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_peft_available, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_sigma import SigmaConfig
from .fusing_sigma import SigmaFusingMixin, project_fused, refuse_unreadable
from .generation_sigma import (
    CACHE,
    OP_DTYPES,
    SigmaGenerationMixin,
    cache_of_checkpointed_layers,
    cache_of_stage,
    cache_to_fill,
    is_empty,
    one_cache,
    positions_in_sequences,
    positions_of_slots,
    sequence_begins,
    use_cache_of_packed_rows,
)

try:
    import diffqkv
    from diffqkv.models import decode_step as fast
    from diffqkv.profiling import span
except ImportError:
    diffqkv = fast = None

    def span(name: str, layer_idx: int, x: torch.Tensor) -> AbstractContextManager:
        """A named range in a profile; nothing while no profiler runs."""
        if torch.compiler.is_compiling() or not torch.autograd.profiler._is_profiler_enabled:
            return nullcontext()
        return torch.profiler.record_function(name)


logger = logging.get_logger(__name__)


def _swiglu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    if diffqkv is not None and activation == "silu" and gate.dtype in OP_DTYPES:
        return diffqkv.swiglu(gate, up)
    return ACT2FN[activation](gate) * up


_PLAIN = (torch.Tensor, nn.Parameter)


def _is_for_inference_op(*tensors: torch.Tensor) -> bool:
    """Whether an op without gradients may take tensors: plain ones on the CPU, of which nothing is recorded.

    Elsewhere, and for forward mode and transforms of torch.func, torch's own functions stay. A module in training mode
    does not ask: activation checkpointing may compute once without and once with a graph, and wants the same bits.
    """
    if diffqkv is None or not diffqkv.ops.library.loaded or tensors[0].dtype not in OP_DTYPES:
        return False
    records_graph = torch.is_grad_enabled()
    for x in tensors:
        if type(x) not in _PLAIN or not x.is_cpu or (records_graph and x.requires_grad):
            return False
    if torch.compiler.is_compiling():
        return True
    return forward_ad._current_level < 0 and torch._C._functorch.peek_interpreter_stack() is None


@use_kernel_forward_from_hub("RMSNorm")
class SigmaRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype, weight = hidden_states.dtype, self.weight
        if not self.training and weight.dtype == dtype and _is_for_inference_op(hidden_states, weight):
            return diffqkv.rms_norm(hidden_states, weight, self.variance_epsilon)
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return weight * hidden_states.to(dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class SigmaRotaryEmbedding(nn.Module):
    """cos and sin `[b or 1, tokens, d]` of RoPE in the dimension where Q and K meet."""

    def __init__(self, config: SigmaConfig) -> None:
        super().__init__()
        # Transformers' initialisers of scaled RoPE read head_dim, which is that of V where K is absorbed.
        self.config = copy(config)
        self.config.head_dim = config.attention_head_dim
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = self.config.rope_parameters["rope_type"]
        is_default = self.rope_type == "default"
        initialise = self.compute_default_rope_parameters if is_default else ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = initialise(self.config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: SigmaConfig, **kwargs) -> tuple[torch.Tensor, float]:
        dim = config.attention_head_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((freqs, freqs), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 2) -> torch.Tensor:
    """Rotates x, by default `[b, tokens, heads, d]`, by cos and sin `[b or 1, tokens, d]` (half-split convention)."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    # Under autocast x is narrower than cos and sin; K must keep the dtype of V.
    return (x * cos.unsqueeze(unsqueeze_dim) + rotated * sin.unsqueeze(unsqueeze_dim)).to(x.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention over K and V of equal head counts; returns out `[b, s_q, n_q, d_v]` and the probabilities."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class StockAttention:
    """How a forward pass stores K and V and attends to them by an attention function of transformers.

    Such a function knows one head count and, save for eager attention, one dimension of heads, takes every token from
    the cache and reads every V row. `diffqkv.models.attention.DiffqkvAttention` is the same for attention "diffqkv".
    Both have this protocol, which `SigmaModel` and, layer by layer, `SigmaAttention` follow:

        takes_packed_rows    rows of several sequences come with their bounds, by packing(begins), not a dense mask
        selects_v_rows       it reads the V rows alone that `selective_v` asks for
        store(layer, ...)    writes the new K and V into the cache; returns K, V and options of `attend`
        attend(layer, ...)   computes attention with what `store` returned; returns out and the probabilities, or None

    Of the layer they use config, layer_idx, head_dim, shared_heads, num_key_value_groups, is_causal and expands_k, and
    the methods key_to_cache, key_from_cache and update_cache.
    """

    takes_packed_rows = False
    selects_v_rows = False

    def __init__(self, function: Callable) -> None:
        self.function = function

    def store(
        self,
        layer: "SigmaAttention",
        key: torch.Tensor,
        value: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None,
        cache_is_empty: bool,
        cached_rope: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Writes the new tokens, key `[b, t, n_k, d_k]` and value `[b, t, n_v, d_v]`, into the cache, if there is one.

        Returns K and V of all tokens as `[b, heads, s, d]`, K ready for the scores, and what `attend` takes besides.

        Args:
            rope: cos and sin `[b or 1, t, d]` of the new tokens.
            cache_is_empty: the new tokens are all there is; asked before any layer writes.
            cached_rope: cos and sin of all slots of the cache, for keys that are cached without their rotation.
        """
        key = layer.key_to_cache(key, rope)
        if cache is None:
            return layer.key_from_cache(key, rope).transpose(1, 2), value.transpose(1, 2), {}
        key, value = (x.transpose(2, 3).flatten(1, 2) for x in layer.update_cache(cache, key, value))
        return layer.key_from_cache(key, cached_rope, unsqueeze_dim=1), value, {}

    def attend(
        self, layer: "SigmaAttention", query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Calls the function with K and V of equal head counts and, if need be, Q and K as wide as V."""
        key = key.repeat_interleave(layer.shared_heads // layer.config.num_key_heads, dim=1)
        value = value.repeat_interleave(layer.shared_heads // layer.config.num_value_heads, dim=1)
        if query.shape[-1] < layer.head_dim and self.function is not eager_attention_forward:
            # Stock flash functions cut V to the dimension of Q; SDPA's fused kernels refuse. Zeros change no score.
            padding = [0, layer.head_dim - query.shape[-1]]
            query, key = F.pad(query, padding), F.pad(key, padding)
        return self.function(layer, query, key, value, *args, **kwargs)


def _chosen_attention(config: SigmaConfig) -> StockAttention:
    """The attention that config names: one with K and V of unequal heads, or a stock one."""
    function = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)
    if getattr(function, "takes_unequal_heads", False):
        return diffqkv.models.attention.DiffqkvAttention(function)
    return StockAttention(function)


class SigmaMLP(nn.Module):
    def __init__(self, config: SigmaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.hidden_act = config.hidden_act

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(_swiglu(self.gate_proj(hidden_states), self.up_proj(hidden_states), self.hidden_act))


class SigmaAttention(nn.Module):
    """DiffQKV attention: K and V with head counts and dimensions of their own, and an augmented Q (section 2.1, 2.2).

    It reads as `LlamaAttention`, but `_project` augments Q, and an object, see `StockAttention`, updates the cache and
    calls the attention function: those of transformers want K and V of one shape.

    Caches hold the grouped layout: K `[b, G, s, (n_k / G) * d_k]` and V `[b, G, s, (n_v / G) * d_v]` with
    G = gcd(n_k, n_v), so K and V have the same number of "heads" for code that expects that.
    """

    def __init__(self, config: SigmaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.k_head_dim = config.k_head_dim
        self.scaling = config.attention_head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        # Stock attention functions get K and V expanded to this many heads, the smallest count that both divide.
        self.shared_heads = lcm(config.num_key_heads, config.num_value_heads)
        self.num_key_value_groups = config.num_attention_heads // self.shared_heads

        hidden, bias = config.hidden_size, config.attention_bias
        q_size = config.num_attention_heads * config.head_dim
        k_size, v_size = config.num_key_heads * config.k_head_dim, config.num_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, q_size, bias=bias)
        self.k_proj = nn.Linear(hidden, k_size, bias=bias)
        self.v_proj = nn.Linear(hidden, v_size, bias=bias)
        self.o_proj = nn.Linear(q_size, hidden, bias=bias)
        self.augments_q = config.q_aug_dim is not None
        self.hidden_act = config.hidden_act
        # CODEPATH: Sigma-1.5B and 10B augment Q; rows without AugQ of Tables 1 to 6 do not.
        if self.augments_q:
            self.q_gate_proj = nn.Linear(q_size, config.q_aug_dim, bias=False)
            self.q_up_proj = nn.Linear(q_size, config.q_aug_dim, bias=False)
            self.q_down_proj = nn.Linear(config.q_aug_dim, q_size, bias=False)
        self.expands_k = config.k_compression == "expand"
        if self.expands_k:
            self.k_expand_proj = nn.Linear(config.k_head_dim, config.head_dim, bias=False)
        self.absorbs_k = config.k_compression == "absorbed"
        if self.absorbs_k:
            self.q_absorb_proj = nn.Linear(config.head_dim, config.k_head_dim, bias=False)
        self.fused_proj = None  # After `fuse_for_inference`, all projections of hidden_states in one.

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        cache_is_empty: bool = False,
        cached_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention: StockAttention | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attention = _chosen_attention(self.config) if attention is None else attention
        query_states, key_states, value_states = self._project(hidden_states)
        query_states = self._rotate(query_states, *position_embeddings).transpose(1, 2)
        with span("kv_cache", self.layer_idx, hidden_states):
            key_states, value_states, options = attention.store(
                self, key_states, value_states, position_embeddings, cache, cache_is_empty, cached_position_embeddings
            )
        with span("attention", self.layer_idx, hidden_states):
            attn_output, attn_weights = attention.attend(
                self,
                query_states,
                key_states,
                value_states,
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                **options,
                **kwargs,
            )
        attn_output = attn_output.reshape(*hidden_states.shape[:-1], -1)
        return self.o_proj(attn_output), attn_weights

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Q, K and V of the new tokens, `[b, t, heads, dim]`, not rotated.

        Q is augmented by a SwiGLU without residual, norm or bias (Appendix E).
        """
        tokens = hidden_states.shape[:-1]
        is_fused = self.fused_proj is not None
        if is_fused:
            *for_query, key, value = project_fused(self, hidden_states)
        else:
            for_query = [self.q_proj(hidden_states)]
            key, value = self.k_proj(hidden_states), self.v_proj(hidden_states)
        query = for_query[0]
        if self.augments_q:
            with span("augmented_q", self.layer_idx, hidden_states):
                gate, up = for_query if is_fused else (self.q_gate_proj(query), self.q_up_proj(query))
                query = self.q_down_proj(_swiglu(gate, up, self.hidden_act))
        query = query.view(*tokens, -1, self.head_dim)
        if self.absorbs_k:
            query = self.q_absorb_proj(query)
        return query, key.view(*tokens, -1, self.k_head_dim), value.view(*tokens, -1, self.head_dim)

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 2) -> torch.Tensor:
        """`apply_rope`; without a graph by the op, which rounds once, as the cache rounds K."""
        if self.training or cos.dtype not in (x.dtype, torch.float32) or not _is_for_inference_op(x, cos, sin):
            return apply_rope(x, cos, sin, unsqueeze_dim)
        if unsqueeze_dim == 2:
            return diffqkv.rotary_embedding(x, cos, sin)
        return diffqkv.rotary_embedding(x.transpose(1, 2), cos, sin).transpose(1, 2)

    def key_to_cache(self, key: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """New K `[b, t, n_k, d_k]` as it is cached: rotated, unless `key_from_cache` expands it at every step."""
        return key if self.expands_k else self._rotate(key, *rope)

    def key_from_cache(
        self, key: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None, unsqueeze_dim: int = 2
    ) -> torch.Tensor:
        """K as it meets Q, made of what is cached; unsqueeze_dim is its dimension of heads."""
        if not self.expands_k:
            return key
        return self._rotate(self.k_expand_proj(key), *rope, unsqueeze_dim=unsqueeze_dim)

    def update_cache(self, cache: Cache, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds new K and V `[b, t, heads, d]` as to a cache of transformers; returns all, `[b, G, s, heads / G, d]`."""
        groups = gcd(key.shape[2], value.shape[2])
        grouped = (x.flatten(2).unflatten(2, (groups, -1)).transpose(1, 2) for x in (key, value))
        keys, values = cache.update(*grouped, self.layer_idx)
        return keys.unflatten(-1, (-1, self.k_head_dim)), values.unflatten(-1, (-1, self.head_dim))


class SigmaDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: SigmaConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = SigmaAttention(config, layer_idx)
        self.mlp = SigmaMLP(config)
        self.input_layernorm = SigmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = SigmaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        with span("decoder_layer", self.self_attn.layer_idx, hidden_states):
            attended, _ = self.self_attn(
                self.input_layernorm(hidden_states),
                position_embeddings,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )
            hidden_states = hidden_states + attended
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@functools.cache
def _tell_peft() -> None:
    """PEFT chooses the layers of its methods by model type, where the user does not: those of Llama, by their names."""
    if not is_peft_available():
        return
    from peft.utils import constants

    for name, layers in vars(constants).items():
        if name.endswith("_MODULES_MAPPING") and "llama" in layers:
            layers.setdefault(SigmaConfig.model_type, layers["llama"])


class MismatchedWeightsError(ValueError, RuntimeError):
    """A checkpoint holds weights of other shapes than the model: a RuntimeError to callers of transformers."""


def _fast_path_obstacle(config: SigmaConfig) -> str | None:
    """Why attention "diffqkv" cannot compute this model, or None."""
    if diffqkv is None:
        return "the package diffqkv is not importable"
    for name in ("head_dim", "attention_head_dim", "k_head_dim"):
        dim = getattr(config, name)
        if dim % 8 or dim > 256:
            return f"{name}: got {dim}, want a multiple of 8 up to 256"
    return None


class SigmaPreTrainedModel(SigmaFusingMixin, PreTrainedModel):  # trf-ignore: TRF013 (its models call post_init)
    """What all SIGMA models share: loading and saving, the choice of the attention function, fusing."""

    config: SigmaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["SigmaDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict] = {"hidden_states": SigmaDecoderLayer, "attentions": SigmaAttention}

    def __init__(self, config: SigmaConfig, *args, **kwargs) -> None:
        # Loaded from a folder, the file of the configuration is a module, and its SigmaConfig a class, of its own.
        if getattr(config, "model_type", None) != SigmaConfig.model_type:
            raise ValueError(f"config: got a {type(config).__name__}, want a SigmaConfig")
        if not isinstance(config, SigmaConfig):
            AutoModel.register(type(config), SigmaModel, exist_ok=True)  # The task heads make their base by it.
        config.check_fields()
        refuse_unreadable(config)
        _tell_peft()
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, ignore_mismatched_sizes: bool = False, **kwargs):
        """As in `PreTrainedModel`, but a checkpoint that lacks weights, or has others, is a ValueError.

        Task heads alone may be missing or left over. Callers who want such a checkpoint all the same ask for
        `output_loading_info=True` and look at what they got. `ignore_mismatched_sizes=True` takes weights of another
        shape for missing ones, and makes them up.
        """
        # Transformers' own error for another shape names no weight.
        ignores = ignore_mismatched_sizes or not output_loading_info
        model, info = super().from_pretrained(
            *args, output_loading_info=True, ignore_mismatched_sizes=ignores, **kwargs
        )
        # Transformers has no look at the shapes of what a quantizer reads.
        info["mismatched_keys"] = info["mismatched_keys"] | getattr(model, "_mismatched_weights", set())
        if output_loading_info:
            return model, info
        for kind, problem, allowed in (
            ("missing_keys", "without", ("score.", "qa_outputs.")),
            ("unexpected_keys", "with", ("score.", "qa_outputs.", "lm_head.")),
        ):
            keys = sorted(key for key in info[kind] if not key.startswith(allowed))
            if kind == "unexpected_keys" and getattr(model, "quantization_method", "diffqkv") != "diffqkv":
                continue  # Methods of others store what they then do not read.
            if keys:
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                raise ValueError(
                    f"pretrained_model_name_or_path: got a checkpoint {problem} {', '.join(keys[:3])}{more}, "
                    f"want the weights of a {cls.__name__}; output_loading_info=True takes it as it is"
                )
        if info["mismatched_keys"] and not ignore_mismatched_sizes:
            (name, got, want), *others = sorted(info["mismatched_keys"])
            more = f" and {len(others)} more of other shapes" if others else ""
            raise MismatchedWeightsError(
                f"pretrained_model_name_or_path: got a checkpoint with {name} of shape {list(got)}{more}, "
                f"want {list(want)} by the configuration; ignore_mismatched_sizes=True makes such weights up"
            )
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As in `PreTrainedModel`, with these model files beside the weights.

        After `fuse_for_inference`, weights of integers alone are saved, as they are.
        """
        self._refuse_saving()
        saved_as = next(cls for cls in type(self).__mro__ if not cls.__module__.startswith("torch."))
        if saved_as.__module__ == __name__ and saved_as._auto_class is not None:
            # A checkpoint of any head serves all Auto classes to readers without the package.
            module = __name__.rpartition(".")[2]
            self.config.auto_map = {auto.__name__: f"{module}.{model.__name__}" for auto, model in AUTO_CLASSES.items()}
            if saved_as is not type(self):
                # FSDP2 derives a class of its own, whose file transformers would save instead of this one.
                type(self)._auto_class = None
                if kwargs.get("is_main_process", True):
                    os.makedirs(save_directory, exist_ok=True)
                    for file in (__file__, *get_relative_import_files(__file__)):
                        shutil.copy(file, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    # Transformers sets the size before it shards anything.
    @property
    def _tp_size(self) -> int | None:
        return self.__dict__.get("_tensor_parallel_size")

    @_tp_size.setter
    def _tp_size(self, size: int | None) -> None:
        groups = self.config.num_key_value_heads
        if size is not None and groups % size:
            raise ValueError(
                f"tp_size: got {size}, want a divisor of {groups}, the greatest common divisor of num_key_heads "
                f"({self.config.num_key_heads}) and num_value_heads ({self.config.num_value_heads})"
            )
        self._refuse_tensor_parallel(size)
        for model in (self, self.base_model):
            model.__dict__["_tensor_parallel_size"] = size

    def _cache_shapes(self) -> list[tuple[int, int, int, int]]:
        """(n_k, d_k, n_v, d_v) of each layer's cache in this process."""
        config, processes = self.config, self._tp_size or 1
        n_k, n_v = config.num_key_heads // processes, config.num_value_heads // processes
        return [(n_k, config.k_head_dim, n_v, config.head_dim)] * config.num_hidden_layers

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Makes "diffqkv" the default where it can run; an explicit request stands."""
        if requested_attention is None:
            obstacle = _fast_path_obstacle(self.config)
            if obstacle is None:
                requested_attention = "diffqkv"
            elif diffqkv is not None:
                logger.warning_once(f"attention 'diffqkv' cannot run this model, 'sdpa' is used instead ({obstacle})")
        return super().get_correct_attn_implementation(requested_attention, is_init_check)


class SigmaModel(SigmaPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: SigmaConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(SigmaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = SigmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = SigmaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        selective_v: dict[str, Any] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """The hidden states `[b, t, hidden_size]` of the new tokens.

        Args:
            input_ids: the new tokens `[b, t]`; or inputs_embeds `[b, t, hidden_size]`.
            attention_mask: 1 for tokens, 0 for padding, `[b, cached + t]`, or a dense mask `[b, 1, t, cached + t]`.
            position_ids: `[b or 1, t]`. Rows whose positions jump hold several sequences, which do not see each other;
                they take neither a mask nor a cache. So do rows with flash attention's arguments cu_seq_lens_q, ...
            cache: the tokens before, to which the new ones are added: a `diffqkv.Cache`, which reads and writes in
                place, or any cache of transformers. Its name before transformers 5.24, past_key_values, is taken too.
            use_cache: make a cache if there is none. Default: the configuration's.
            selective_v: for this call, values in place of the configuration's selective_v_*, by their names without
                that prefix: {"top_k": 100, "max_error": 0.1}. Prompts are not concerned, only steps with cached tokens.
            output_attentions, output_hidden_states: also return the probabilities, or the states before each layer.

        Raises:
            ValueError: naming the argument; before any layer runs.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: got both or neither of input_ids and inputs_embeds, want exactly one")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        tokens = inputs_embeds.shape[1]
        attention = _chosen_attention(self.config)
        cache = cache_of_checkpointed_layers(one_cache(cache, past_key_values), tokens, self.layers)
        selected_v = self._selected_v(selective_v, attention, cache)

        packed_positions = None
        begins = sequence_begins(position_ids, attention_mask, cache, kwargs, inputs_embeds)
        if begins is not None:
            use_cache = use_cache_of_packed_rows(cache, use_cache)
            packed_positions = positions_in_sequences(begins)
            position_ids = packed_positions if position_ids is None else position_ids
            if attention.takes_packed_rows and kwargs.get("cu_seq_lens_q") is None:
                kwargs.update(attention.packing(begins))

        cache = cache_to_fill(self, cache, use_cache, inputs_embeds)
        counted_cache = cache_of_stage(cache, self.layers)
        past = counted_cache.get_seq_length() if counted_cache is not None else 0
        # It is asked before the first layer writes: the counter of a static cache is live.
        cache_is_empty = is_empty(past, tokens)
        if position_ids is None:
            position_ids = (torch.arange(tokens, device=inputs_embeds.device) + past).unsqueeze(0)

        causal_mask = self._causal_mask(attention, inputs_embeds, attention_mask, packed_positions, counted_cache)
        rope = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        cached_rope = None
        # CODEPATH: the rows with half K dim of Tables 2 and 6.
        if self.config.k_compression == "expand" and cache is not None:
            positions = positions_of_slots(position_ids, attention_mask, counted_cache, past, cache_is_empty)
            cached_rope = self.rotary_emb(inputs_embeds, position_ids=positions)
        options = {name: getattr(self.config, name) for name in ("output_attentions", "output_hidden_states")}
        options |= {"selective_v": any(selected_v), **kwargs}
        if fast is not None and fast.can_step(self.layers, inputs_embeds, attention, causal_mask, cache, options):
            hidden_states = fast.decode_step(self.layers, inputs_embeds, rope, causal_mask, cache)
            return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})
        hidden_states = inputs_embeds
        for layer, selection in zip(self.layers[: len(selected_v)], selected_v, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=rope,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                attention=attention,
                cache_is_empty=cache_is_empty,
                cached_position_embeddings=cached_rope,
                selective_v=selection,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})

    def _causal_mask(
        self,
        attention: StockAttention,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packed_positions: torch.Tensor | None,
        cache: Cache | None,
    ) -> torch.Tensor | None:
        """The mask as the attention function takes it; None where the bounds of packed rows say all."""
        is_packed = packed_positions is not None
        if is_packed and attention.takes_packed_rows:
            return None
        return create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=packed_positions,
            # With a cache, which compiled code may fill here, transformers looks for no sequences.
            **{CACHE: None if is_packed else cache},
        )

    def _selected_v(
        self, selective_v: dict[str, Any] | None, attention: StockAttention, cache: Cache | None
    ) -> list[dict[str, Any] | None]:
        """What each layer is told of the V rows to read."""
        per_layer = self.config.selective_v(selective_v)
        if any(per_layer) and not attention.selects_v_rows:
            problem = f"attention {self.config._attn_implementation!r} reads all V rows, only 'diffqkv' selects"
            if selective_v is not None:
                raise ValueError(f"selective_v: got {selective_v}, want None: {problem}")
            if cache is not None and not torch.compiler.is_compiling():
                logger.warning_once(f"selective_v_top_k: {problem}")
        return per_layer


def _positions_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The hidden states `[b, t, hidden_size]` that logits are wanted of."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)


class SigmaForCausalLM(SigmaPreTrainedModel, SigmaGenerationMixin):
    """SIGMA with a language-model head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    _pp_plan: ClassVar[dict] = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}

    def __init__(self, config: SigmaConfig) -> None:
        super().__init__(config)
        self.model = SigmaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        selective_v: dict[str, Any] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """The logits `[b, t, vocab_size]` of the token after each new one. The other arguments: see `SigmaModel`.

        Args:
            labels: `[b, t]`, the tokens themselves (they are shifted here), -100 where there is nothing to predict;
                the mean cross-entropy is returned as loss.
            logits_to_keep: the last so many positions (0: all), positions `[n]` or `[b, n]`, or a bool mask `[b, t]`,
                whose logits are returned flat.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            selective_v=selective_v,
            **kwargs,
        )
        logits = self.lm_head(_positions_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )


class SigmaForSequenceClassification(GenericForSequenceClassification, SigmaPreTrainedModel):
    """SIGMA with a linear classifier on the last token that is not padding."""


class SigmaForTokenClassification(GenericForTokenClassification, SigmaPreTrainedModel):
    """SIGMA with a linear classifier on each token."""


class SigmaForQuestionAnswering(GenericForQuestionAnswering, SigmaPreTrainedModel):
    """SIGMA with a linear layer that scores each token as the first and as the last of the answer."""


AUTO_CLASSES = {
    AutoModel: SigmaModel,
    AutoModelForCausalLM: SigmaForCausalLM,
    AutoModelForSequenceClassification: SigmaForSequenceClassification,
    AutoModelForTokenClassification: SigmaForTokenClassification,
    AutoModelForQuestionAnswering: SigmaForQuestionAnswering,
}
AutoModel.register(SigmaConfig, SigmaModel, exist_ok=True)

__all__ = [
    "AUTO_CLASSES",
    "MismatchedWeightsError",
    "SigmaAttention",
    "SigmaDecoderLayer",
    "SigmaForCausalLM",
    "SigmaForQuestionAnswering",
    "SigmaForSequenceClassification",
    "SigmaForTokenClassification",
    "SigmaModel",
    "SigmaPreTrainedModel",
    "StockAttention",
]
