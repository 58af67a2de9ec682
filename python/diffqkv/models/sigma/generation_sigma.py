# SPDX-License-Identifier: BSD-3-Clause
"""Caches and positions of the SIGMA models, and generation with them: what is made, counted and refused.

The functions serve the forward pass of the model, the mixin serves `generate`. This file stands alone, as those beside
it do: `save_pretrained` copies it beside a checkpoint, where it runs without the diffqkv package, on the caches of
transformers.
"""

from copy import copy
from inspect import signature

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache
from transformers.generation import GenerationMixin
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

try:
    import diffqkv
except ImportError:
    diffqkv = None

logger = logging.get_logger(__name__)

# What transformers calls a cache in arguments and results; before 5.24 it was past_key_values.
CACHE = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"

# The dtypes that the ops for inference take; models of other dtypes run on stock functions and caches.
OP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The slots that `generate` reserves at most before the first token; longer outputs grow the cache by doubling.
_MAX_RESERVED_SLOTS = 16384

_NO_CONTINUOUS_BATCHING = (
    "continuous batching: its paged cache has one shape for K and V; use generate on a left-padded batch instead"
)


def _has_own_cache(dtype: torch.dtype) -> bool:
    """Whether models of this dtype cache in a `diffqkv.Cache` by default."""
    return diffqkv is not None and dtype in OP_DTYPES


def cache_to_fill(
    model: PreTrainedModel, cache: Cache | None, use_cache: bool | None, inputs_embeds: torch.Tensor
) -> Cache | None:
    """The given cache, or a new one if use_cache asks for it; a ValueError if the given one has other shapes."""
    if cache is not None and diffqkv is not None:
        # A cache of another model or batch would be left half written.
        diffqkv.cache.check_cache(cache, model._cache_shapes(), *inputs_embeds.shape[:2])
    if cache is not None or not use_cache:
        return cache
    # A compiled region must not own the buffers that later calls write; and a graph must reach the cached tokens.
    records_graph = torch.is_grad_enabled() and (
        inputs_embeds.requires_grad or any(x.requires_grad for x in model.parameters())
    )
    if not _has_own_cache(inputs_embeds.dtype) or torch.compiler.is_compiling() or records_graph:
        return DynamicCache(config=model.config)
    return diffqkv.Cache(model._cache_shapes())


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that the caller gave, under either name."""
    if past_key_values is not None:
        if cache is not None and cache is not past_key_values:
            raise ValueError("past_key_values: got another cache than cache, want one of the two")
        cache = past_key_values
    if isinstance(cache, PagedAttentionCache):
        raise NotImplementedError(_NO_CONTINUOUS_BATCHING)
    return cache


def is_empty(past: int | torch.Tensor, tokens: int) -> bool:
    """Whether the new tokens are all there is, with so many cached ones before them.

    A static cache counts them in a tensor, which is read once per prompt only: to read it is to wait for the device.
    """
    if isinstance(past, torch.Tensor):
        return tokens > 1 and not torch.compiler.is_compiling() and int(past) == 0
    return past == 0


def cache_of_stage(cache: Cache | None, layers: nn.ModuleList) -> Cache | None:
    """The cache from the first layer on that is in this process: in a later stage of a pipeline, none before it is
    ever written, and a cache counts the tokens of its first layer."""
    is_elsewhere = [isinstance(layer, nn.Identity) for layer in layers]
    if cache is None or not any(is_elsewhere):
        return cache
    if cache.is_compileable:
        raise NotImplementedError("cache: a static cache is not built for pipeline parallelism")
    stage = copy(cache)
    stage.layers = cache.layers[is_elsewhere.index(False) :]
    return stage


def cache_of_checkpointed_layers(cache: Cache | None, tokens: int, layers: nn.ModuleList) -> Cache | None:
    """The given cache; None where the backward pass runs layers once more, which must not write into it again."""
    is_recording = layers.training and torch.is_grad_enabled()
    runs_twice = is_recording and any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
    if cache is None or not runs_twice:
        return cache
    if not is_empty(cache.get_seq_length(), tokens):
        raise ValueError(
            "cache: got one with tokens while activations are checkpointed, where layers run without a cache; "
            "want None, eval() or gradient_checkpointing_disable()"
        )
    logger.warning_once("cache: activations are checkpointed, so that nothing is cached")
    return None


def sequence_begins(
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    kwargs: dict,
    inputs_embeds: torch.Tensor,
) -> torch.Tensor | None:
    """The first tokens of sequences, bool `[b, tokens]`, where rows hold several; None where each row is one.

    Transformers tells it by flash attention's keyword arguments, or by jumps in position_ids without a mask.
    """
    batch, tokens = inputs_embeds.shape[:2]
    is_compiling = torch.compiler.is_compiling()
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask: got one beside cu_seq_lens_q, want None: packed rows have no padding")
        end = batch * tokens
        begins = torch.zeros(end + 1, dtype=torch.bool, device=cu_seqlens.device)
        begins = begins.index_fill(0, cu_seqlens.clamp(0, end).long(), True)[:-1].view(batch, tokens)
        if not is_compiling and not (int(cu_seqlens[-1]) == end and bool(begins[:, 0].all())):
            raise ValueError(
                f"cu_seq_lens_q: got {cu_seqlens.tolist()}, want the bounds of sequences that fill {batch} rows of "
                f"{tokens} tokens"
            )
        return begins
    if position_ids is None or attention_mask is not None or tokens == 1:
        return None
    if is_compiling and cache is not None:
        return None
    # Compiled code cannot look: there, any positions may be those of packed rows.
    sequences = find_packed_sequence_indices(position_ids)
    if sequences is None:
        return None
    return F.pad(sequences.diff(dim=-1) != 0, (1, 0), value=True).expand(batch, -1)


def positions_in_sequences(begins: torch.Tensor) -> torch.Tensor:
    """The positions `[b, tokens]` of tokens in rows of several sequences, each of which begins where `begins` says."""
    slots = torch.arange(begins.shape[1], device=begins.device)
    return slots - (slots * begins).cummax(-1).values


def use_cache_of_packed_rows(cache: Cache | None, use_cache: bool | None) -> bool | None:
    """use_cache, or False where a row holds several sequences, whose cache would mix them up."""
    if torch.compiler.is_compiling():
        return use_cache
    if cache is not None:
        raise ValueError("position_ids: got several sequences in a row with a cache, want no cache")
    if use_cache:
        logger.warning_once(
            "position_ids: without an attention_mask, jumps begin new sequences in a row, which do not see the "
            "tokens before them; they cannot be cached, so that use_cache returns none"
        )
    return False


def positions_of_slots(
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache,
    past: int | torch.Tensor,
    cache_is_empty: bool,
) -> torch.Tensor:
    """The positions of all cache slots, `[b or 1, s]`, for keys that are cached without their rotation.

    A cache keeps no positions. Those of older tokens follow from the newest one, since the tokens of a row are
    consecutive; where a mask shows that they are not, an error says so. Without older tokens any positions do, and the
    cache remembers in `has_position_gaps` whether they were consecutive.
    """
    tokens = position_ids.shape[1]
    slots, _ = cache.get_mask_sizes(tokens, 0)
    newest = past + tokens - 1
    positions = position_ids[:, -1:] - newest + torch.arange(slots, device=position_ids.device)
    new_slots = torch.arange(tokens, device=position_ids.device) + past
    positions = positions.index_copy(1, new_slots, position_ids)
    if torch.compiler.is_compiling():
        return positions
    has_gaps = _has_gaps(positions, attention_mask)
    if cache_is_empty:
        cache.has_position_gaps = has_gaps
    elif has_gaps or getattr(cache, "has_position_gaps", False):
        raise NotImplementedError(
            "k_compression='expand' with a cache: the tokens of a row must have consecutive positions, "
            "without padding between them"
        )
    return positions


def _has_gaps(positions: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
    """Whether positions `[b or 1, s]` jump, or padding lies, between two tokens of a row."""
    if attention_mask is None:
        return bool((positions.diff(dim=-1) != 1).any())
    visible = _visible_slots(attention_mask)
    if visible is None:
        return False
    visible = visible[:, : positions.shape[1]]
    both = visible[:, 1:] & visible[:, :-1]
    jumps = (positions[:, : visible.shape[1]].diff(dim=-1) != 1) & both
    resumes = visible[:, 1:] & ~visible[:, :-1] & (visible.cumsum(-1)[:, :-1] > 0)
    return bool((jumps | resumes).any())


def _visible_slots(attention_mask: torch.Tensor) -> torch.Tensor | None:
    """The slots `[b, s]` that the newest query sees, by a padding mask or a dense mask; None where a mask of spans
    says that nothing is hidden between them."""
    if attention_mask.dtype == torch.int32 and attention_mask.dim() == 4:
        return None
    if attention_mask.dim() == 2:
        return attention_mask.bool()
    newest = attention_mask[:, 0, -1]
    return newest if newest.dtype == torch.bool else newest > torch.finfo(newest.dtype).min / 2


class SigmaGenerationMixin(GenerationMixin):
    """Generation as in transformers, with a `diffqkv.Cache` by default, and without the modes that would go wrong."""

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,  # generate looks for the name
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> dict:
        """As in transformers, where assisted decoding would feed the tokens that a given cache holds once more."""
        cache = one_cache(cache, past_key_values)
        positions = kwargs.get("position_ids")
        if next_sequence_length is None and cache is not None and positions is not None:
            past = int(cache.get_seq_length())
            if past and positions.shape[-1] == input_ids.shape[1] and int(positions[..., 0].max()) == 0:
                next_sequence_length = input_ids.shape[1] - past
                if next_sequence_length < 1:
                    raise NotImplementedError(
                        f"prefill_chunk_size: got chunks within the {past} tokens of the cache, which this release of "
                        f"transformers would feed again; want None"
                    )
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **{CACHE: cache},
            **kwargs,
        )

    def generate(self, *args, **kwargs):
        """As in transformers. `cache` is taken as the name of the cache in the releases before 5.24 too."""
        if "cache" in kwargs:
            kwargs[CACHE] = one_cache(kwargs.pop("cache"), kwargs.get(CACHE) if CACHE != "cache" else None)
        return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Puts a `diffqkv.Cache` in place of the default cache, which copies itself at every token."""
        self._check_generation(generation_config, model_kwargs, generation_mode)
        kind, chunk_size = generation_config.cache_implementation, generation_config.prefill_chunk_size
        if kind in ("offloaded", "offloaded_static") and not torch.accelerator.is_available():
            # Without an accelerator every cache is in the host's memory.
            kind = generation_config.cache_implementation = {"offloaded_static": "static"}.get(kind)
        is_new = model_kwargs.get(CACHE) is None and generation_config.use_cache is not False
        # The code of contrastive search, which is in a repository of its own, takes no class but DynamicCache.
        if _has_own_cache(self.dtype) and is_new and kind is None and generation_mode != "contrastive_search":
            reserved = min(max_cache_length, _MAX_RESERVED_SLOTS)
            model_kwargs[CACHE] = diffqkv.Cache(self._cache_shapes(), initial_length=reserved)
            return
        # Candidates found in the prompt are fed before those too many are taken back.
        candidates = generation_config.prompt_lookup_num_tokens or 0
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length + candidates
        )
        is_on_one_device = len(set(getattr(self, "hf_device_map", {}).values())) < 2
        if diffqkv is not None and is_new and kind == "static" and chunk_size is not None and is_on_one_device:
            # Compiled prefill must not own the buffers.
            rows = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1) * batch_size
            cache = model_kwargs[CACHE]
            diffqkv.cache.reserve_static_cache(cache, self._cache_shapes(), rows, self.dtype, self.device)

    @staticmethod
    def _check_generation(generation_config, model_kwargs, generation_mode) -> None:
        """Refuses what transformers would compute from the wrong tokens, or fail at after the first forward pass."""
        given, embeds = model_kwargs.get(CACHE), model_kwargs.get("inputs_embeds")
        positions = model_kwargs.get("position_ids")
        if isinstance(given, Cache) and positions is not None and not generation_config.is_assistant:
            past, prompt = int(given.get_seq_length()), positions.shape[-1]
            if past >= prompt:
                raise ValueError(
                    f"cache: got {past} tokens and a prompt of {prompt}, want a prompt that repeats them and "
                    f"goes on (crop(-1) takes one back)"
                )
            if past and embeds is not None and embeds.shape[1] != prompt:
                raise ValueError(
                    f"inputs_embeds: got {embeds.shape[1]} tokens behind {past} in the cache, want all {prompt} of the "
                    f"prompt"
                )
        chunk_size = generation_config.prefill_chunk_size
        if chunk_size is not None and embeds is not None:
            raise NotImplementedError(f"prefill_chunk_size: got {chunk_size} with inputs_embeds, want None")
        is_quantised = generation_config.cache_implementation == "quantized" or isinstance(given, QuantizedCache)
        if is_quantised and generation_mode == "assisted_generation":
            raise NotImplementedError(
                "assisted decoding: a quantised cache cannot take back rejected tokens; use the default cache"
            )

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs):
        """As in transformers, which hands a draft model no mask: a pad token that was generated is no padding."""
        guessed = super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        return guessed.cummax(-1).values if generation_config.is_assistant else guessed

    def _get_static_cache_init_shape(self):
        # The early initialisation of transformers knows one shape for K and V, so that there is none to tell it.
        return None

    def init_continuous_batching(self, *args, **kwargs):
        raise NotImplementedError(_NO_CONTINUOUS_BATCHING)


__all__ = [
    "CACHE",
    "OP_DTYPES",
    "SigmaGenerationMixin",
    "cache_of_checkpointed_layers",
    "cache_of_stage",
    "cache_to_fill",
    "is_empty",
    "one_cache",
    "positions_in_sequences",
    "positions_of_slots",
    "sequence_begins",
    "use_cache_of_packed_rows",
]
