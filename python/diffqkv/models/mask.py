"""Mask function "diffqkv" for Hugging Face models: which keys are seen, in a few numbers instead of a dense mask."""

from __future__ import annotations

from collections.abc import Callable
from inspect import getclosurevars
from typing import Any, NamedTuple

import torch
from transformers import masking_utils
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask


class Packing(NamedTuple):
    """Sequences that lie one after another in `[b, s]` tokens, in the order of `flash_attention_varlen`'s arguments."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class Spans(NamedTuple):
    """What a mask of `diffqkv_mask` says, as the ops take it; start and end `[b]` are None where nothing is padding.

    All three tensors are None without a mask.
    """

    start: torch.Tensor | None
    end: torch.Tensor | None
    total: torch.Tensor | None
    window: int = -1
    packing: Packing | None = None


def diffqkv_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor | None:
    """The spans of keys that are seen, int32 `[b, 1, 1, 3]`: first slot, end, and slots written including padding.

    The queries are the last of the slots written, and see nothing after their own. In sliding windows and in packed
    rows each has a span of its own, `[b, 1, q_length, 3]`. Four dimensions keep a second pass through the mask code
    from taking the result for a padding mask; int32 tells it from a dense mask. That is returned, as by `sdpa_mask`,
    for what spans cannot say: holes in the padding mask, mask functions of other kinds, and under torch.compile
    windows and packed rows. A padding mask with holes is a RuntimeError of compiled code.
    """
    dense = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "device": device,
        **kwargs,
        "allow_is_causal_skip": False,
    }
    pattern = _pattern_of(mask_function)
    if pattern is None or attention_mask is not None and attention_mask.shape[-1] <= kv_offset:
        return sdpa_mask(**dense)
    window, sequences = pattern

    # A static cache passes its live counter as q_offset, which is used here at once and never kept.
    total = torch.zeros(batch_size, dtype=torch.int32, device=device) + (q_offset + q_length - kv_offset)
    total = total.to(torch.int32)
    start, end, padded = torch.zeros_like(total), total, False
    if attention_mask is not None:
        span = _one_span(attention_mask[:, kv_offset:], total, kv_length == q_length)
        if span is None:
            return sdpa_mask(**dense)
        start, end, padded = span

    spans = torch.stack([start, end, total], -1)[:, None, None]
    packing = None
    if window >= 0 or sequences is not None:
        first, packing = _first_seen(start, total[:, None] - q_length, q_length, window, sequences)
        spans = torch.cat([first[:, None, :, None].to(torch.int32), spans[..., 1:].expand(-1, -1, q_length, -1)], -1)
    if not torch.compiler.is_compiling():
        # Every layer would otherwise work this out again.
        spans.diffqkv_spans = Spans(*((start, end) if padded else (None, None)), total, window, packing)
    return spans


def _one_span(
    padding_mask: torch.Tensor, total: torch.Tensor, is_prompt: bool
) -> tuple[torch.Tensor, torch.Tensor, bool] | None:
    """First slot and end `[b]` of the tokens in a padding mask, and whether any row has padding; None if it has holes.

    total: the slots written, `[b]`. Compiled code, which cannot look, says that there is padding, and fails at holes.
    """
    slots = torch.arange(padding_mask.shape[-1], dtype=torch.int32, device=total.device)
    valid = (padding_mask & (slots < total[:, None])).to(torch.int32)
    start = valid.argmax(-1).to(torch.int32)
    end = ((slots + 1) * valid).amax(-1)
    count = valid.sum(-1)
    # Cached steps know no end but the newest slot: a mask that hides it cannot be said by a span either.
    one_span = ((count == end - start) & ((end == total) | is_prompt)).all()
    if torch.compiler.is_compiling():
        torch._assert_async(one_span, "attention_mask: got holes, want one span of tokens per row to be compiled")
        return start, end, True
    is_one_span, is_full = torch.stack([one_span, (count == total).all()]).tolist()
    return (start, end, not is_full) if is_one_span else None


def _first_seen(
    start: torch.Tensor, first_query: torch.Tensor, q_length: int, window: int, sequences: torch.Tensor | None
) -> tuple[torch.Tensor, Packing | None]:
    """The first slot `[b, q_length]` that each query sees in its window or sequence, and the sequences of packed rows.

    start `[b]` is the first slot that is no padding, first_query `[b, 1]` the slot of the first query.
    """
    own = first_query + torch.arange(q_length, device=start.device)
    first, packing = start[:, None].expand(-1, q_length), None
    if sequences is not None:
        sequences = sequences.expand(len(start), -1).contiguous()
        first = torch.searchsorted(sequences, sequences)
        packing = packing_of(first == own)
    if window >= 0:
        first = torch.maximum(first, own - window)
    return first, packing


def _pattern_of(mask_function: Callable) -> tuple[int, torch.Tensor | None] | None:
    """The tokens that a query sees before its own, or -1, and the number of each token's sequence `[b, s]`, or None.

    Instead of both, None is returned if it is not known which keys the function lets a query see. Transformers makes
    those of windows and packed rows as closures, whose variables alone tell it.
    """
    if mask_function is causal_mask_function:
        return -1, None
    if torch.compiler.is_compiling():
        return None
    window, sequences = -1, None
    if parts := _both_of(mask_function, "packed_sequence_mask_function", "remap_positions_for_packed_sequence"):
        # The positions of a sequence are consecutive, so that its mask does not change with where it begins.
        packed, remapped = parts
        sequences, mask_function = packed["packed_sequence_mask"], remapped["mask_function"]
    parts = _made_by("and_masks", mask_function).get("mask_functions", ())
    if len(parts) == 2 and (sliding := _made_by("sliding_window_overlay", parts[0])):
        window, mask_function = sliding["sliding_window"] - 1, parts[1]
    return (window, sequences) if mask_function is causal_mask_function else None


def _both_of(function: Callable, *makers: str) -> list[dict[str, Any]] | None:
    """What the two parts of an intersection have closed over, in the order of their makers; None for other functions.

    Transformers 5.24 exchanged the parts.
    """
    parts = _made_by("and_masks", function).get("mask_functions", ())
    found = [next(filter(None, (_made_by(maker, part) for part in parts)), None) for maker in makers]
    return found if len(parts) == 2 and all(found) else None


def _made_by(maker: str, function: Callable | None) -> dict[str, Any]:
    """What a function that `transformers.masking_utils.<maker>` returned has closed over; {} for any other function."""
    is_of_transformers = getattr(function, "__module__", None) == masking_utils.__name__
    if not is_of_transformers or not function.__qualname__.startswith(f"{maker}.<locals>."):
        return {}
    return dict(getclosurevars(function).nonlocals)


def packing_of(begins: torch.Tensor) -> Packing:
    """The sequences of packed rows; begins: bool `[b, s]`, True at the first token of each, so at that of each row."""
    tokens = begins.numel()
    if torch.compiler.is_compiling():
        # Shapes must not depend on values: as many entries as tokens, all but the first few of them empty.
        slots = torch.arange(tokens, device=begins.device)
        first = torch.where(begins.flatten(), slots, tokens).sort().values
    else:
        first = begins.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.cat([first, first.new_full((1,), tokens)]).to(torch.int32)
    longest = begins.shape[1] if torch.compiler.is_compiling() else int(cu_seqlens.diff().max())
    return Packing(cu_seqlens, cu_seqlens, longest, longest)


def read_spans(mask: torch.Tensor) -> Spans | None:
    """The spans of a mask that `diffqkv_mask` returned; None if they are known per query only.

    That is the case under torch.compile, and for copies of a mask, which do not carry what `diffqkv_mask` attached.
    """
    known = None if torch.compiler.is_compiling() else getattr(mask, "diffqkv_spans", None)
    if known is not None:
        return known
    if mask.shape[2] != 1:
        return None
    return Spans(*(column.contiguous() for column in mask[:, 0, 0].unbind(-1)))


def spans_to_mask(mask: torch.Tensor, s_q: int, s_k: int) -> torch.Tensor:
    """The dense bool mask `[b, 1, s_q, s_k]` of what `diffqkv_mask` returned: True where a query sees a key."""
    start, end, total = (column[:, :, :, None] for column in mask.unbind(-1))
    slots = torch.arange(s_k, device=mask.device)
    last_visible = total - s_q + torch.arange(s_q, device=mask.device)[:, None]
    return (slots >= start) & (slots < end) & (slots <= last_visible)


AttentionMaskInterface.register("diffqkv", diffqkv_mask)
