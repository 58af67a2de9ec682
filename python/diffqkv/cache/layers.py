"""The layers of `diffqkv.Cache`: where K and V of one layer lie, and how they are written."""

from __future__ import annotations

from inspect import signature
from math import prod

import torch
from transformers.cache_utils import Cache as HuggingFaceCache
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from .. import memory
from ..ops import kv_cache_update
from ..reference import PANEL_TOKENS, group, panels_to_rows, ungroup
from .shapes import CacheShape

# Before transformers 5.15 a positive argument of `crop` is the number of tokens to keep.
_CROPS_TO_LENGTH = "max_length" in signature(HuggingFaceCache.crop).parameters
_PANEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SMALLEST_CAPACITY = 64
# Heads at power-of-two distances fall into the same cache sets and halve the read rate; this many bytes between them,
# 68 cache lines, cost a large head little.
_HEAD_GAP = 68 * 64


def _whole_panels(tokens: int) -> int:
    return -(-tokens // PANEL_TOKENS) * PANEL_TOKENS


def _empty_heads(
    heads: tuple[int, ...], each: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """An uninitialised tensor `[*heads, *each]`; on CPU with a gap behind each head that is large."""
    if device.type != "cpu":
        return torch.empty(*heads, *each, dtype=dtype, device=device)
    used = prod(each)
    gap = _HEAD_GAP // dtype.itemsize if used * dtype.itemsize >= 10 * _HEAD_GAP else 0
    return memory.empty((*heads, used + gap), dtype)[..., :used].unflatten(-1, each)


class SlotPositions:
    """The cache slots of the newest tokens, built once per forward pass and shared by all layers."""

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._positions: torch.Tensor | None = None

    def __call__(self, batch: int, start: int, count: int, device: torch.device) -> torch.Tensor:
        key = (batch, start, count, device)
        if key != self._key:
            self._positions = torch.arange(start, start + count, device=device).expand(batch, count)
            self._key = key
        return self._positions


class CacheLayer(CacheLayerMixin):
    """K and V of one layer, pre-allocated; a counter says how many tokens are valid.

    `k_cache` and `v_cache` are what the ops take. V, and K in the layout "rows", is `[b, G, capacity, heads / G, d]`;
    K in the layout "panels" is `[b, n_k, capacity / 32, d_k, 32]` (bf16: `[..., d_k / 2, 32, 2]`). A layer that is
    first written by `append` takes the layout its device computes best with; one that is first written by `update`
    takes rows, in an order of memory that lets `update` return views.
    """

    is_croppable = True
    is_sliding = False
    unseen = 0  # tokens that are kept but that no later one sees

    def __init__(
        self,
        shape: CacheShape,
        *,
        max_length: int | None = None,
        initial_length: int = 0,
        batch_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        positions: SlotPositions | None = None,
    ) -> None:
        self.shape = shape
        self.max_length = max_length
        self.initial_length = max_length or initial_length
        self.is_initialized = False
        self.length = 0
        self.capacity = 0
        self.k_layout: str | None = None
        self.k_cache: torch.Tensor | None = None
        self.v_cache: torch.Tensor | None = None
        self._v_stats: torch.Tensor | None = None
        self._v_stats_version = 0  # of v_cache, when they were last right
        self._assigned: dict[str, torch.Tensor] = {}
        self._first_cut: int | None = None  # the first token whose graph was not kept
        self._wanted_batch, self._wanted_dtype, self._wanted_device = batch_size, dtype, device
        self._positions = positions or SlotPositions()

    def __repr__(self) -> str:
        return f"CacheLayer({self.shape}, length={self.length}, capacity={self.capacity}, k_layout={self.k_layout!r})"

    @property
    def keys(self) -> torch.Tensor | None:
        """The valid K in the grouped layout `[b, G, s, (n_k / G) * d_k]`; of K in panels, a copy.

        Tools that shorten or change a cache assign keys and values, one after the other: what is assigned is copied,
        and until both are as long as each other nothing else can be done with the layer.
        """
        return self._seen("keys")

    @keys.setter
    def keys(self, keys: torch.Tensor) -> None:
        self._assign("keys", keys)

    @property
    def values(self) -> torch.Tensor | None:
        """The valid V in the grouped layout `[b, G, s, (n_v / G) * d_v]`; assigned as `keys` is."""
        return self._seen("values")

    @values.setter
    def values(self, values: torch.Tensor) -> None:
        self._assign("values", values)

    def _seen(self, name: str) -> torch.Tensor | None:
        if name in self._assigned:
            return self._assigned[name]
        return self._grouped()[name == "values"][:, :, self.unseen :] if self.is_initialized else None

    def _assign(self, name: str, x: torch.Tensor) -> None:
        if self.is_sliding:
            raise NotImplementedError(f"{name}: assignment is not built for layers with a sliding window")
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, want a Tensor (reset forgets the tokens)")
        shape = self.shape
        width = shape.v_per_group * shape.d_v if name == "values" else shape.k_per_group * shape.d_k
        self._check_grouped(name, x, width)
        assigned = self._assigned | {name: x.detach().clone(memory_format=torch.contiguous_format)}
        both = {side: assigned.get(side, getattr(self, side)) for side in ("keys", "values")}
        if self.max_length is not None and x.shape[2] > self.max_length:
            raise ValueError(f"{name}: got {x.shape[2]} tokens, want at most max_length = {self.max_length}")
        if torch.is_grad_enabled() and x.requires_grad:
            self._first_cut = 0
        like = x.shape[:3], x.dtype, x.device
        if any(y is None or (y.shape[:3], y.dtype, y.device) != like for y in both.values()):
            self._assigned = assigned
            return
        # What was not assigned may be a view of the buffers that are written next.
        keys, values = (y if side in assigned else y.clone() for side, y in both.items())
        is_cut = self._first_cut is not None
        self.reset()
        if self.is_initialized and (x.shape[0], x.dtype, x.device) != (self.batch_size, self.dtype, self.device):
            self.is_initialized = False
            self._wanted_batch = self._wanted_dtype = self._wanted_device = None
        self.adopt(keys, values, keys.shape[2])
        self._first_cut = 0 if is_cut else None

    def check_complete(self) -> None:
        """Raises ValueError where keys have been assigned and values of their length have not, or the other way."""
        for name in self._assigned:
            other = {"keys": "values", "values": "keys"}[name]
            got, want = (
                "none" if x is None else f"{x.dtype} of shape {list(x.shape)}"
                for x in (getattr(self, other), getattr(self, name))
            )
            raise ValueError(f"{other}: got {got}, want what fits the assigned {name}, {want}")

    def append(
        self, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor | None = None, sin: torch.Tensor | None = None
    ) -> None:
        """Writes k `[b, n_k, s_new, d_k]` and v `[b, n_v, s_new, d_v]` behind the valid tokens, in place.

        With cos and sin `[b or 1, s_new, d_rot]`, k is rotated on the way (see `diffqkv.kv_cache_update`).
        """
        self._check_heads("k", k, self.shape.n_k, self.shape.d_k)
        self._check_heads("v", v, self.shape.n_v, self.shape.d_v)
        self._check_write(k, v, k.shape[2])
        if not self.is_initialized:
            self.initialize(k.shape[0], k.dtype, k.device)
        self._reserve(k.shape[2])
        self._write(k, v, cos, sin)

    def begin_step(self, batch: int, tokens: int) -> torch.Tensor:
        """Makes room for new tokens that the caller writes into k_cache, v_cache and kept_v_stats, at the positions
        `[batch, tokens]` that are returned. `end_step` counts them. `check_fits` has been asked before."""
        self._reserve(tokens)
        if not self._v_stats_are_current():
            self._v_stats = None
        return self._positions(batch, self.length, tokens, self.device)

    def end_step(self, tokens: int) -> None:
        self.length += tokens
        self._note_v_version()

    @property
    def kept_v_stats(self) -> torch.Tensor | None:
        """The statistics that `v_stats` would return without reading V, or None; whoever writes V writes them too."""
        return self._v_stats

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Hugging Face's entry: k `[b, G, s_new, (n_k / G) * d_k]` and v `[b, G, s_new, (n_v / G) * d_v]`.

        Returns all valid tokens in the same form. The cache stores values without a graph: a gradient flows into the
        new tokens only, and when a later write records one, too, it is a ValueError.
        """
        shape = self.shape
        if torch.is_autocast_enabled(value_states.device.type):
            key_states = key_states.to(value_states.dtype)  # rotations may have left K in float32
        self._check_grouped("key_states", key_states, shape.k_per_group * shape.d_k)
        self._check_grouped("value_states", value_states, shape.v_per_group * shape.d_v)
        self._check_write(key_states, value_states, key_states.shape[2])
        records_graph = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if records_graph:
            self.check_graph()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        self._v_stats = None
        self._reserve(new)
        past = self.length
        k = key_states.detach().unflatten(-1, (shape.k_per_group, shape.d_k))
        v = value_states.detach().unflatten(-1, (shape.v_per_group, shape.d_v))
        if self.k_layout == "rows":
            self.k_cache[:, :, past : past + new] = k
            self.v_cache[:, :, past : past + new] = v
            self.length += new
        else:
            self._write(ungroup(k), ungroup(v), None, None)
        keys, values = self._grouped()
        if records_graph:
            self._first_cut = past
            keys = torch.cat([keys[:, :, :past], key_states], dim=2)
            values = torch.cat([values[:, :, :past], value_states], dim=2)
        return keys, values

    def adopt(self, keys: torch.Tensor, values: torch.Tensor, seen: int) -> None:
        """Takes over what another cache holds of `seen` tokens: grouped K and V, as `update` takes them."""
        if keys.shape[2] != seen:
            raise ValueError(f"keys: got the newest {keys.shape[2]} of {seen} tokens, want all of them")
        shape = self.shape
        self._check_grouped("keys", keys, shape.k_per_group * shape.d_k)
        self._check_grouped("values", values, shape.v_per_group * shape.d_v)
        # What the ops do not take.
        if any(dim % 8 or dim > 256 for dim in (shape.d_k, shape.d_v)) or keys.dtype not in _PANEL_DTYPES:
            self.update(keys.detach(), values.detach())
            return
        k = keys.detach().unflatten(-1, (shape.k_per_group, shape.d_k))
        v = values.detach().unflatten(-1, (shape.v_per_group, shape.d_v))
        self.append(*(x if x.stride(-1) == 1 else x.contiguous() for x in (ungroup(k), ungroup(v))))
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            self._first_cut = 0

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The valid tokens as k `[b, n_k, s, d_k]` and v `[b, n_v, s, d_v]`; views where the memory allows it."""
        self.check_complete()
        k = self._panels() if self.k_layout == "panels" else ungroup(self.k_cache[:, :, : self.length])
        v = ungroup(self.v_cache[:, :, : self.length])
        return k[:, :, self.unseen :], v[:, :, self.unseen :]

    def v_stats(self) -> torch.Tensor:
        """Sum and largest norm of the valid V rows, float32 `[b, n_v, d_v + 1]`, as `selective_v_attention` takes them.

        The first call reads all of V; from then on `append` keeps the result up to date. Whatever else changes the
        tokens, save batch operations, makes the next call read V again.
        """
        self.check_complete()
        if self._v_stats is None or not self._v_stats_are_current():
            self.prefetch()
            with torch.inference_mode(False):  # later writes may be outside of it
                v = ungroup(self.v_cache[:, :, : self.length]).flatten(0, 1)
                stats = v.new_zeros(len(v), self.shape.d_v + 1, dtype=torch.float32)
                if self.length:
                    for rows, head in zip(v, stats, strict=True):  # one by one: their float copies stay small
                        rows = rows.float()
                        head[:-1] = rows.sum(0)
                        head[-1] = torch.linalg.vector_norm(rows, dim=-1).max()
            self._v_stats = stats.unflatten(0, (self.batch_size, -1))
            self._note_v_version()
        return self._v_stats

    def _v_stats_are_current(self) -> bool:
        """Whether nothing but the layer has written into V since they were taken. Compiled code cannot tell."""
        return torch.compiler.is_compiling() or self.v_cache._version == self._v_stats_version

    def _note_v_version(self) -> None:
        if not torch.compiler.is_compiling():
            self._v_stats_version = self.v_cache._version

    def initialize(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Reserves buffers in the layout that the device computes best with: K in panels on CPU, rows elsewhere."""
        panels = device.type == "cpu" and dtype in _PANEL_DTYPES
        self._initialize(batch_size, dtype, device, "panels" if panels else "rows", heads_first=True)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._initialize(key_states.shape[0], key_states.dtype, key_states.device, "rows", heads_first=False)

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.max_length is None else self.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reset(self) -> None:
        """Forgets the tokens and keeps the buffers."""
        self.length = 0
        self._v_stats = self._first_cut = None
        self._assigned = {}

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest tokens: a number <= 0, as in Hugging Face's caches. Moves a counter, copies nothing."""
        if not self.is_initialized:
            return  # as in Hugging Face's: layers that share the K and V of another are never written
        if _CROPS_TO_LENGTH and tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.length)
        if not -self.length <= tokens_to_remove <= 0:
            raise ValueError(f"tokens_to_remove: got {tokens_to_remove}, want {-self.length} to 0 (negative: remove)")
        self.check_complete()
        self.length += tokens_to_remove
        self._v_stats = None
        if self._first_cut is not None and self.length <= self._first_cut:
            self._first_cut = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the batch entries `indices` (positions or a bool mask), in that order."""
        if not self.is_initialized:
            return
        self.check_complete()
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(1)
        indices = indices.to(self.k_cache.device)
        self._wanted_batch = self.batch_size = len(indices)
        self._move_to_new_buffers(self.capacity, indices)
        if self._v_stats is not None:
            self._v_stats = self._v_stats.index_select(0, indices.to(self._v_stats.device))

    def offload(self) -> None:
        """Moves the buffers to the CPU; the next write, or `prefetch`, brings them back."""
        if self.is_initialized:
            self.k_cache = self.k_cache.to("cpu", non_blocking=True)
            self.v_cache = self.v_cache.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        if self.is_initialized and self.k_cache.device != self.device:
            self.k_cache = self.k_cache.to(self.device, non_blocking=True)
            self.v_cache = self.v_cache.to(self.device, non_blocking=True)

    def check_fits(self, batch_size: int, new_tokens: int) -> None:
        """Raises ValueError if the next write of `new_tokens` for `batch_size` rows cannot succeed."""
        self.check_complete()
        wanted = self._wanted_batch
        if wanted is not None and batch_size != wanted:
            raise ValueError(
                f"cache: got a batch of {batch_size}, want {wanted}, the batch of the cache "
                f"(batch_repeat_interleave and batch_select_indices change it)"
            )
        if self.max_length is not None and self.get_seq_length() + new_tokens > self.max_length:
            raise ValueError(
                f"cache: got {new_tokens} new tokens behind {self.get_seq_length()}, "
                f"want at most max_length = {self.max_length} in all"
            )

    def check_graph(self) -> None:
        """Raises ValueError if a graph that goes on from the cached tokens would not reach what they were made of."""
        if self._first_cut is not None:
            raise ValueError(
                f"cache: got a step that records gradients behind tokens that were recorded too, from number "
                f"{self._first_cut} on, whose graph diffqkv.Cache does not keep; want them written under "
                f"torch.no_grad(), or a DynamicCache"
            )

    def _check_heads(self, name: str, x: torch.Tensor, heads: int, dim: int) -> None:
        if x.dim() != 4 or x.shape[1] != heads or x.shape[3] != dim:
            raise ValueError(f"{name}: got shape {list(x.shape)}, want [batch, {heads}, tokens, {dim}]")

    def _check_grouped(self, name: str, x: torch.Tensor, width: int) -> None:
        if x.dim() != 4 or x.shape[1] != self.shape.groups or x.shape[3] != width:
            raise ValueError(f"{name}: got shape {list(x.shape)}, want [batch, {self.shape.groups}, tokens, {width}]")

    def _check_write(self, k: torch.Tensor, v: torch.Tensor, new_tokens: int) -> None:
        if v.shape[0] != k.shape[0] or v.shape[2] != k.shape[2]:
            raise ValueError(
                f"v: got {v.shape[0]} rows of {v.shape[2]} tokens, want {k.shape[0]} of {k.shape[2]} as in k"
            )
        for name, x in (("k", k), ("v", v)):
            for what, got, want in (
                ("dtype", x.dtype, self._wanted_dtype or k.dtype),
                ("device", x.device, self._wanted_device or k.device),
            ):
                if got != want:
                    raise ValueError(f"{name}: got {what} {got}, want {want}")
        self.check_fits(k.shape[0], new_tokens)

    def _initialize(
        self, batch: int, dtype: torch.dtype, device: torch.device, k_layout: str, *, heads_first: bool
    ) -> None:
        self.batch_size, self.dtype, self.device, self.k_layout = batch, dtype, device, k_layout
        self._wanted_batch, self._wanted_dtype, self._wanted_device = batch, dtype, device
        self._heads_first = heads_first
        self.capacity = _whole_panels(self.initial_length)
        self.k_cache, self.v_cache = self._allocate(self.capacity)
        self.is_initialized = True

    def _allocate(self, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Buffers made under inference_mode could not be written outside of it later.
        with torch.inference_mode(False):
            shape = self.shape
            v_cache = self._allocate_rows(shape.v_per_group, shape.d_v, capacity)
            if self.k_layout == "rows":
                return self._allocate_rows(shape.k_per_group, shape.d_k, capacity), v_cache
            panel = (shape.d_k // 2, PANEL_TOKENS, 2) if self.dtype == torch.bfloat16 else (shape.d_k, PANEL_TOKENS)
            heads, panels = (self.batch_size, shape.n_k), (capacity // PANEL_TOKENS, *panel)
            return _empty_heads(heads, panels, self.dtype, self.device), v_cache

    def _allocate_rows(self, per_group: int, dim: int, capacity: int) -> torch.Tensor:
        groups = (self.batch_size, self.shape.groups)
        if self._heads_first:
            heads_first = _empty_heads((*groups, per_group), (capacity, dim), self.dtype, self.device)
            return heads_first.transpose(2, 3)
        return _empty_heads(groups, (capacity, per_group, dim), self.dtype, self.device)

    def _reserve(self, new_tokens: int) -> None:
        self.prefetch()
        needed = self.length + new_tokens
        if needed <= self.capacity:
            return
        self._move_to_new_buffers(_whole_panels(max(needed, 2 * self.capacity, _SMALLEST_CAPACITY)))

    def _move_to_new_buffers(self, capacity: int, batch_indices: torch.Tensor | None = None) -> None:
        device = self.k_cache.device
        k_cache, v_cache = (buffer.to(device) for buffer in self._allocate(capacity))
        k_used = _whole_panels(self.length) // PANEL_TOKENS if self.k_layout == "panels" else self.length
        for old, new, used in ((self.k_cache, k_cache, k_used), (self.v_cache, v_cache, self.length)):
            valid = old[:, :, :used]
            new[:, :, :used] = valid if batch_indices is None else valid.index_select(0, batch_indices)
        if not self._v_stats_are_current():
            self._v_stats = None
        self.k_cache, self.v_cache, self.capacity = k_cache, v_cache, capacity
        self._note_v_version()

    def _write(self, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> None:
        new = k.shape[2]
        positions = self._positions(k.shape[0], self.length, new, k.device)
        options = {"cos": cos, "sin": sin, "v_stats": self._v_stats, "k_layout": self.k_layout}
        were_current = self._v_stats_are_current()
        kv_cache_update(self.k_cache, self.v_cache, k, v, positions, **options)
        if were_current:
            self._note_v_version()
        self.length += new

    def _grouped(self) -> tuple[torch.Tensor, torch.Tensor]:
        values = self.v_cache[:, :, : self.length].flatten(3)
        if self.k_layout == "rows":
            return self.k_cache[:, :, : self.length].flatten(3), values
        # Of a single panel this would be a view whose last stride is not 1, as the ops want it.
        return group(self._panels(), self.shape.groups).flatten(3).contiguous(), values

    def _panels(self) -> torch.Tensor:
        """The valid K of the layout "panels", as `[b, n_k, s, d_k]`."""
        used = _whole_panels(self.length) // PANEL_TOKENS
        return panels_to_rows(self.k_cache[:, :, :used])[:, :, : self.length]


class SlidingCacheLayer(CacheLayer):
    """A layer whose tokens see the newest `window` tokens, their own included: it keeps those, and older ones only
    until it needs their room.

    `length` counts the tokens that are kept, `dropped` those before them. It is written by `update` alone, as the
    models of Hugging Face that have such layers do.
    """

    is_sliding = True

    def __init__(self, shape: CacheShape, *, window: int, **options) -> None:
        super().__init__(shape, **options)
        self.window = window
        self.initial_length = min(self.initial_length, 2 * window)
        self.dropped = 0
        self.record_past = False
        self._since_crop = 0
        # What Hugging Face's sliding layers hand out beside K and V.
        self._sliding_window_tensor = DynamicSlidingWindowLayer(sliding_window=window)._sliding_window_tensor

    @property
    def unseen(self) -> int:
        return max(0, self.length - (self.window - 1))

    def append(self, *args, **kwargs) -> None:
        raise NotImplementedError("append: not built for layers with a sliding window; update writes them")

    def adopt(self, keys: torch.Tensor, values: torch.Tensor, seen: int) -> None:
        if keys.shape[2] < min(seen, self.window - 1):
            raise ValueError(f"keys: got the newest {keys.shape[2]} of {seen} tokens, want {self.window - 1} or all")
        self.dropped = seen - keys.shape[2]
        self.update(keys.detach(), values.detach())

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """As in other layers, but returns no more than the new tokens and the window - 1 before them."""
        past, new = self.length - self.unseen, key_states.shape[2]
        keys, values = super().update(key_states, value_states)
        first = self.length - new - past
        if self.record_past:
            self._since_crop += new
        elif self.capacity > max(4 * self.window, _SMALLEST_CAPACITY):  # a long prompt has been
            self._drop_unseen(0)
        return keys[:, :, first:], values[:, :, first:]

    def get_seq_length(self) -> int:
        return self.dropped + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = self.length - self.unseen
        return past + query_length, self.get_seq_length() - past

    def activate_past_recording(self) -> None:
        """From now on a `crop` can take back all tokens since the one before: none of what they see is dropped."""
        self.record_past = True
        self._since_crop = 0

    def crop(self, tokens_to_remove: int) -> None:
        if _CROPS_TO_LENGTH and tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        if self.dropped and tokens_to_remove < -self.unseen:
            raise ValueError(
                f"tokens_to_remove: got {tokens_to_remove}, want {-self.unseen} to 0: older tokens of the window have "
                f"been dropped; after activate_past_recording they are kept"
            )
        super().crop(tokens_to_remove)
        self._since_crop = 0

    def reset(self) -> None:
        super().reset()
        self.dropped = self._since_crop = 0

    def _reserve(self, new_tokens: int) -> None:
        self.prefetch()
        if self.length + new_tokens > self.capacity:
            self._drop_unseen(new_tokens)

    def _drop_unseen(self, new_tokens: int) -> None:
        """Moves the tokens that may still be seen to buffers for `new_tokens` more, or for twice as many as they are: a
        token then costs an amortised O(1) copy."""
        kept = min(self.length, self.window - 1 + self._since_crop)
        first = self.length - kept
        self.k_cache, self.v_cache = self.k_cache[:, :, first:], self.v_cache[:, :, first:]
        self.dropped, self.length = self.dropped + first, kept
        if self._first_cut is not None:
            self._first_cut = max(0, self._first_cut - first)
        self._move_to_new_buffers(_whole_panels(max(kept + new_tokens, 2 * kept, _SMALLEST_CAPACITY)))
