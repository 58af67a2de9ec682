"""What the ops are told beside their tensors: names, order and defaults are those of the schemas."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import Tensor

ROWS, PANELS = 0, 1
DROP, RENORM, MEAN = 0, 1, 2


Options = TypeVar("Options", bound=tuple)


def shared(options: NamedTuple, kind: type[Options]) -> Options:
    """The options that another kind has too, as that kind; the others have their defaults."""
    return kind(**{name: x for name, x in options._asdict().items() if name in kind._fields})


class AttentionOptions(NamedTuple):
    """The options of `flash_attention` and `flash_attention_varlen`, and of their backward passes."""

    causal: bool = False
    softmax_scale: float | None = None
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    sinks: Tensor | None = None
    kv_start: Tensor | None = None
    kv_end: Tensor | None = None
    dropout_p: float = 0.0
    seed: int = 0
    offset: int = 0


class DecodeOptions(NamedTuple):
    """The options of `decode_attention`."""

    cache_start: Tensor | None = None
    block_table: Tensor | None = None
    softmax_scale: float | None = None
    k_layout: int = ROWS
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    sinks: Tensor | None = None


class UpdateOptions(NamedTuple):
    """The options of `kv_cache_update`."""

    cos: Tensor | None = None
    sin: Tensor | None = None
    block_table: Tensor | None = None
    v_stats: Tensor | None = None
    k_layout: int = ROWS


class SelectiveVOptions(NamedTuple):
    """The options of `selective_v_attention`."""

    tail: int = DROP
    keep_first: int = 0
    keep_last: int = 0
    v_stats: Tensor | None = None
    cache_start: Tensor | None = None
    block_table: Tensor | None = None
    softmax_scale: float | None = None
    k_layout: int = ROWS
    max_error: float | None = None
    return_bound: bool = False
    return_indices: bool = False
