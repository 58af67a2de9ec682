"""The functions of FlashAttention 2.x and FlexHeadFA, over the ops of this package: only the import line changes.

Names, order of parameters, defaults, layouts and results are those of flash_attn 2.6.3 to 2.8.4
(github.com/Dao-AILab/flash-attention) and flex_head_fa 0.1.2 (github.com/xiayuqing0622/flex_head_fa). Notation of the
shapes as in `ops`, with tokens before heads: q `[b, s_q, n_q, d_k]`, k `[b, s_k, n_k, d_k]`, v `[b, s_k, n_v, d_v]`.

Options that all functions share:
    softmax_scale: factor of the scores; d_k ** -0.5 by default.
    causal: query i sees the keys j <= i + s_k - s_q (aligned at the bottom right).
    window_size: (left, right): query i sees the keys from i + s_k - s_q - left to i + s_k - s_q + right; a negative
        number is no limit.
    softcap: c > 0 replaces a scaled score x by c * tanh(x / c).
    alibi_slopes: None; anything else is a NotImplementedError.

What differs from FlashAttention:
    - n_k and n_v may differ (as in FlexHeadFA) and so may d_k and d_v, in every function that takes K and V apart.
    - float32 works besides bfloat16 and float16, and float64 except in `flash_attn_with_kvcache`; so does the CPU.
    - Head dimensions are at most 256. As in FlashAttention those that are no multiple of 8 are padded, which copies
      the tensors, in `flash_attn_with_kvcache` the whole cache.
    - A query that sees no key has a softmax_lse of -inf; there it is +inf. The output is 0 in both.
    - Results never depend on the run: deterministic and num_splits are taken and change nothing.
    - dropout_p goes together with softcap.

Integers may be numpy's, or tensors without dimensions. A wrong argument is a ValueError that is a RuntimeError too, or
a TypeError if its type or dtype is wrong: `argument: got ..., want ...`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, reference
from .ops import checks
from .ops.arguments import as_integer, as_number, as_scale, refuse_gradients
from .ops.attention import AttentionOptions, check_options
from .ops.caches import check_blocks_of_tokens
from .ops.checks import Sizes, wrong
from .ops.flash_attention_varlen import check_cu_seqlens

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def _not_built(argument: str, got: object, want: str) -> NotImplementedError:
    return NotImplementedError(f"{argument}: got {got}, want {want}; more is not built")


def _tensor(name: str, x: Tensor, sizes: Sizes, layout: str) -> None:
    checks.any_tensor(name, x)
    sizes.check(name, x, layout)


def _head_dims(d_k: int, d_v: int, softmax_scale: float | None) -> float | None:
    """Checks the head dimensions; returns softmax_scale, whose default padding of q must not change."""
    for name, d in (("q", d_k), ("v", d_v)):
        if d < 1 or d > 256:
            raise wrong(name, f"head dimension {d}", "1 to 256")
    return d_k**-0.5 if softmax_scale is None and d_k % 8 != 0 else softmax_scale


def _padded(x: Tensor) -> Tensor:
    """x with zeros behind each row up to a multiple of 8; x itself if there is nothing to add."""
    return F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 != 0 else x


def _rows(x: Tensor) -> Tensor:
    """x as `ops` takes it: padded, the last dimension of stride 1."""
    x = _padded(x)
    return x if x.stride(-1) == 1 else x.contiguous()


def _unpadded(out: Tensor, d_v: int) -> Tensor:
    return out if out.shape[-1] == d_v else out[..., :d_v]


def _tokens_first(out: Tensor) -> Tensor:
    """`[b, heads, s, d]` -> `[b, s, heads, d]`, contiguous as in FlashAttention: callers merge the heads by `view`."""
    return out.transpose(1, 2).contiguous()


def _scores(
    alibi_slopes: None, softmax_scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float
) -> dict[str, Any]:
    """The options of the scores, with the names that they have in `ops` and `reference`."""
    if not isinstance(causal, int) and getattr(causal, "dtype", None) != "bool":  # numpy's
        raise wrong("causal", type(causal).__name__, "a bool", TypeError)
    if alibi_slopes is not None:
        raise _not_built("alibi_slopes", type(alibi_slopes).__name__, "None")
    try:
        left, right = window_size
    except TypeError:
        raise wrong("window_size", type(window_size).__name__, "a tuple (left, right)", TypeError) from None
    except ValueError:
        raise wrong("window_size", window_size, "(left, right)") from None
    left, right = (max(-1, as_integer("window_size", n, -(2**63))) for n in (left, right))
    softcap = as_number("softcap", softcap)
    return {
        "softmax_scale": as_scale(softmax_scale),
        "causal": bool(causal),
        "window": (left, right),
        "softcap": 0.0 if softcap <= 0 else softcap,  # NaN is refused by the op
    }


def _seed(dropout_p: float, wanted: bool) -> int | None:
    """The seed that `ops` would draw, if there is dropout and it is wanted here too."""
    return int(torch.randint(2**63 - 1, (), device="cpu")) if wanted and dropout_p > 0 else None


def _s_dmask(q: Tensor, k: Tensor, kept: Tensor, **scores: Any) -> Tensor:
    """The softmax of q and k, `[b, heads, s, d_k]`: `[b, n_q, s_q, s_k]`, negative where it is not kept."""
    b, s_k = k.shape[0], k.shape[2]
    identity = torch.eye(s_k, dtype=q.dtype, device=q.device).expand(b, 1, s_k, s_k)
    weights = reference.attention(q.detach(), k.detach(), identity, **scores).to(q.dtype)
    return torch.where(kept, weights, -weights)


# ---- batches of equal lengths ----------------------------------------------------------------------------------------


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Attention; differentiable.

    Args:
        q: `[b, s_q, n_q, d_k]`.
        k: `[b, s_k, n_k, d_k]`.
        v: `[b, s_k, n_v, d_v]`.
        dropout_p: the probability that a softmax weight is dropped; the seed comes from torch's generator.
        return_attn_probs: also return softmax_lse and S_dmask.
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic: as above.

    Returns:
        out `[b, s_q, n_q, d_v]`, contiguous; with return_attn_probs also softmax_lse `[b, n_q, s_q]`, float32, and
        S_dmask: with dropout the softmax `[b, n_q, s_q, s_k]`, negative where it was dropped, from plain torch in
        quadratic memory and without a gradient; otherwise an empty tensor.
    """
    scores = _scores(alibi_slopes, softmax_scale, causal, window_size, softcap)
    sizes = Sizes()
    _tensor("q", q, sizes, "b s_q n_q d_k")
    _tensor("k", k, sizes, "b s_k n_k d_k")
    _tensor("v", v, sizes, "b s_k n_v d_v")
    scores["softmax_scale"] = _head_dims(sizes["d_k"], sizes["d_v"], scores["softmax_scale"])
    q, k, v = (_rows(x).transpose(1, 2) for x in (q, k, v))
    seed = _seed(dropout_p, return_attn_probs)
    result = ops.flash_attention(
        q, k, v, dropout_p=dropout_p, seed=seed, deterministic=deterministic, return_lse=return_attn_probs, **scores
    )
    out, lse = result if return_attn_probs else (result, None)
    out = _tokens_first(_unpadded(out, sizes["d_v"]))
    if lse is None:
        return out
    s_dmask = q.new_empty(0)
    if seed is not None:
        kept = reference.dropout_mask(*lse.shape, k.shape[2], dropout_p, seed, device=q.device)
        s_dmask = _s_dmask(q, k, kept, **scores)
    return out, lse, s_dmask


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` of q `[b, s_q, n_q, d]` and kv `[b, s_k, 2, n, d]`: as many K as V heads, of one dimension."""
    _tensor("kv", kv, Sizes(), "b s_k 2 n d")
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` of qkv `[b, s, 3, n, d]`: equally many heads of one dimension."""
    _tensor("qkv", qkv, Sizes(), "b s 3 n d")
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


# ---- packed sequences ------------------------------------------------------------------------------------------------


def _places(
    block_table: Tensor, cu_seqlens_k: Tensor, max_seqlen_k: int, q: Tensor, blocks: int, slots: int
) -> tuple[Tensor, Tensor]:
    """Block and slot of each row that packed K and V would have, int64 `[total_k]`."""
    checks.tensor("cu_seqlens_k", cu_seqlens_k, q, (torch.int32,), Sizes(), "b+1")
    checks.tensor("block_table", block_table, q, (torch.int32,), Sizes(), "b max_blocks")
    b, max_blocks = block_table.shape
    if len(cu_seqlens_k) == 0:
        raise wrong("cu_seqlens_k", "shape [0]", "[b + 1]")
    if len(cu_seqlens_k) != b + 1:
        raise wrong("block_table", f"{b} entries", f"{len(cu_seqlens_k) - 1}, those of cu_seqlens_k")
    lengths = cu_seqlens_k.diff()
    if checks.readable(cu_seqlens_k):
        check_cu_seqlens("k", cu_seqlens_k, int(cu_seqlens_k[-1]), max_seqlen_k)
        longest = int(lengths.max()) if b else 0
        if longest > max_blocks * slots:
            raise wrong("cu_seqlens_k", f"a sequence of {longest}", f"at most {max_blocks * slots}, as block_table has")
        check_blocks_of_tokens(block_table, slots, None, lengths, blocks)
    entry = torch.arange(b, device=q.device).repeat_interleave(lengths)
    token = torch.arange(len(entry), device=q.device) - cu_seqlens_k[entry]
    # Where the table cannot be looked at, a block that is outside must not be an illegal memory access.
    block = block_table[entry, (token // slots).clamp(max=max_blocks - 1)].clamp(0, blocks - 1)
    return block.long(), token % slots


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Attention within each of b packed sequences; differentiable.

    Args:
        q: `[total_q, n_q, d_k]`.
        k: `[total_k, n_k, d_k]`.
        v: `[total_k, n_v, d_v]`.
        cu_seqlens_q, cu_seqlens_k: int32 `[b + 1]`: sequence i has the rows from cu_seqlens[i] to cu_seqlens[i + 1].
        max_seqlen_q, max_seqlen_k: integers, at least the longest sequence.
        dropout_p: the probability that a softmax weight is dropped; the seed comes from torch's generator.
        return_attn_probs: also return softmax_lse and S_dmask.
        block_table: int32 `[b, max_blocks]`: k and v are `[blocks, block_size, n_k, d_k]` and
            `[blocks, block_size, n_v, d_v]`, of any block size, and row t of sequence i lies in block
            `block_table[i, t // block_size]`. The rows are copied behind each other first, which on CUDA synchronises.
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic: as above.

    Returns:
        out `[total_q, n_q, d_v]`; with return_attn_probs also softmax_lse `[n_q, total_q]`, float32, and S_dmask as in
        `flash_attn_func`, `[b, n_q, max_seqlen_q, max_seqlen_k]`, zero behind the ends of a sequence.

    Raises:
        NotImplementedError: alibi_slopes.
    """
    scores = _scores(alibi_slopes, softmax_scale, causal, window_size, softcap)
    max_seqlen_q = as_integer("max_seqlen_q", max_seqlen_q, 0)
    max_seqlen_k = as_integer("max_seqlen_k", max_seqlen_k, 0)
    rows = "total_k" if block_table is None else "blocks block_size"
    sizes = Sizes()
    _tensor("q", q, sizes, "total_q n_q d_k")
    _tensor("k", k, sizes, f"{rows} n_k d_k")
    _tensor("v", v, sizes, f"{rows} n_v d_v")
    scores["softmax_scale"] = _head_dims(sizes["d_k"], sizes["d_v"], scores["softmax_scale"])
    if block_table is not None:
        places = _places(block_table, cu_seqlens_k, max_seqlen_k, q, sizes["blocks"], sizes["block_size"])
        k, v = k[places], v[places]
    q, k, v = (_rows(x) for x in (q, k, v))
    seed = _seed(dropout_p, return_attn_probs)
    result = ops.flash_attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=dropout_p,
        seed=seed,
        deterministic=deterministic,
        return_lse=return_attn_probs,
        **scores,
    )
    out, lse = result if return_attn_probs else (result, None)
    out = _unpadded(out, sizes["d_v"]).contiguous()
    if lse is None:
        return out
    s_dmask = q.new_empty(0)
    if seed is not None:
        b, n_q = len(cu_seqlens_q) - 1, q.shape[1]
        kept = reference.dropout_mask(b, n_q, max_seqlen_q, max_seqlen_k, dropout_p, seed, device=q.device)
        s_dmask = q.new_zeros(kept.shape)
        q_parts, k_parts = q.split(cu_seqlens_q.diff().tolist()), k.split(cu_seqlens_k.diff().tolist())
        for entry, (q_part, k_part) in enumerate(zip(q_parts, k_parts, strict=True)):
            block = (slice(entry, entry + 1), slice(None), slice(len(q_part)), slice(len(k_part)))
            q_part, k_part = q_part.transpose(0, 1)[None], k_part.transpose(0, 1)[None]
            s_dmask[block] = _s_dmask(q_part, k_part, kept[block], **scores)
    return out, lse, s_dmask


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` of q `[total_q, n_q, d]` and kv `[total_k, 2, n, d]`."""
    _tensor("kv", kv, Sizes(), "total_k 2 n d")
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` of qkv `[total, 3, n, d]`; cu_seqlens and max_seqlen are those of queries and keys."""
    _tensor("qkv", qkv, Sizes(), "total 3 n d")
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


# ---- the cache -------------------------------------------------------------------------------------------------------


def _int32(name: str, x: Tensor, like: Tensor, batch: int, most: int, why: str = "") -> None:
    checks.per_entry(name, x, like, Sizes(b=batch))
    checks.values(name, x, 0, most, f"0 to {most}{why}")


def _angles(name: str, table: Tensor, q: Tensor, slots: Tensor, capacity: int, sizes: Sizes) -> Tensor:
    """The rows of rotary_cos or rotary_sin for slots `[b, n]`."""
    checks.tensor(name, table, q, (q.dtype, torch.float32), sizes, "positions d_rot/2")
    needed = max(capacity, int(slots.max()) + 1) if slots.numel() and checks.readable(slots) else capacity
    if table.shape[0] < needed:
        raise wrong(name, f"{table.shape[0]} positions", f"at least {needed}")
    if 2 * table.shape[1] > q.shape[3]:
        raise wrong(name, f"d_rot / 2 = {table.shape[1]}", f"at most d_k / 2 = {q.shape[3] // 2}")
    # Where the slots cannot be looked at, one that is outside must not be an illegal memory access.
    return table[slots.clamp(0, table.shape[0] - 1)]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """RoPE of x `[b, s, heads, d]`; cos, sin `[b, s or 1, d_rot / 2]`, one for each pair of dimensions."""
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs].float(), x[..., 2 * pairs :]
    first, second = turned.unflatten(-1, (pairs, 2)).unbind(-1) if interleaved else turned.chunk(2, dim=-1)
    cos, sin = cos.float()[:, :, None], sin.float()[:, :, None]
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1 if interleaved else -2)
    return torch.cat([turned.flatten(-2).to(x.dtype), rest], dim=-1)


def _ranges(s_q: int, start: Tensor | None, lengths: Tensor, window: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The slots [first, end) that each query sees, int32 `[b * s_q]`; query i stands at lengths - s_q + i."""
    query = lengths[:, None] - s_q + torch.arange(s_q, device=lengths.device)  # int64
    first = (torch.zeros_like(lengths) if start is None else start)[:, None].expand_as(query)
    end = lengths[:, None].expand_as(query)
    left, right = (min(n, 2**32) for n in window)  # no slot is farther
    if left >= 0:
        first = torch.maximum(first, query - left)
    if right >= 0:
        end = torch.minimum(end, query + right + 1).clamp_min(0)
    return first.int().contiguous().flatten(), end.int().contiguous().flatten()


def _blocks(
    block_table: Tensor | None, cache_batch_idx: Tensor | None, q: Tensor, sizes: Sizes
) -> tuple[Tensor | None, int]:
    """The block table of `ops`, None if the batch is the cache's, and the number of slots that an entry has."""
    entries, slots = sizes["entries"], sizes["slots"]
    if block_table is not None:
        if cache_batch_idx is not None:
            raise wrong("cache_batch_idx", "a tensor", "None, as block_table is given")
        _tensor("block_table", block_table, sizes, "b max_blocks")
        return block_table, slots * sizes["max_blocks"]
    if cache_batch_idx is not None:
        _int32("cache_batch_idx", cache_batch_idx, q, q.shape[0], entries - 1)
        return cache_batch_idx[:, None], slots  # each entry of the cache is a block
    if entries < q.shape[0]:
        raise wrong("k_cache", f"{entries} entries", f"at least the batch size, {q.shape[0]}")
    return None, slots


def _attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    start: Tensor | None,
    table: Tensor | None,
    *,
    causal: bool,
    window: tuple[int, int],
    return_lse: bool,
    **scores: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q `[b, s_q, n_q, d_k]` with a cache of `ops`: out `[b, s_q, n_q, d_v]` and lse `[b, n_q, s_q]`."""
    b, s_q, n_q, d_k = q.shape
    left, right = window
    by_query = False
    if causal or right == 0 or s_q <= 1:
        q, window = q.transpose(1, 2), (left, -1)
    elif left < 0 and right < 0:
        # The queries of an entry see the same keys: as more heads of one query they share a pass over the cache.
        q = q.transpose(1, 2).reshape(b, n_q * s_q, 1, d_k)
    else:
        # Each query sees a range of its own: each becomes an entry, and all read the blocks of theirs.
        by_query = True
        q, window = q.reshape(b * s_q, n_q, 1, d_k), (-1, -1)
        if table is None:
            table = torch.arange(b, dtype=torch.int32, device=q.device)[:, None]
        table = table.repeat_interleave(s_q, dim=0)
        start, lengths = _ranges(s_q, start, lengths, (left, right))
    result = ops.decode_attention(
        q,
        k_cache,
        v_cache,
        lengths,
        cache_start=start,
        block_table=table,
        window=window,
        return_lse=return_lse,
        **scores,
    )
    out, *lse = result if return_lse else (result,)
    if by_query:
        out = out.view(b, s_q, n_q, out.shape[-1])
        lse = [x.view(b, s_q, n_q).transpose(1, 2).contiguous() for x in lse]
    else:
        out = _tokens_first(out.view(b, n_q, s_q, out.shape[-1]))
        lse = [x.view(b, n_q, s_q) for x in lse]
    return (out, *lse) if return_lse else out


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """Writes new tokens into a cache, in place, and attends to all that it holds. For inference only.

    Args:
        q: `[b, s_q, n_q, d_k]`. For causal and window_size the queries are the last s_q of the tokens.
        k_cache: `[entries, s, n_k, d_k]`, at least b entries; with block_table `[blocks, block_size, n_k, d_k]`, of any
            block size.
        v_cache: `[entries, s, n_v, d_v]` or `[blocks, block_size, n_v, d_v]`.
        k, v: `[b, s_new, n_k, d_k]` and `[b, s_new, n_v, d_v]`, written behind the cache_seqlens tokens that are there.
        rotary_cos, rotary_sin: `[positions, d_rot / 2]`, with k and v only; as many positions as the cache has slots.
            k is rotated for its slot on the way into the cache. q is rotated for the slots from cache_seqlens on, one
            after the other if there is causality or a window, otherwise all for the first of them.
        cache_seqlens: int, or int32 `[b]`: the tokens in the cache, before k and v are added; all slots by default.
        cache_batch_idx: int32 `[b]`: the entry of the cache of each entry of q, not with block_table; entries that are
            written must be distinct.
        cache_leftpad: int32 `[b]`: the first slot that counts.
        block_table: int32 `[b, max_blocks]`: the blocks of each entry.
        rotary_interleaved: rotate dimension 2 c with 2 c + 1, instead of c with c + d_rot / 2.
        softmax_scale, causal, window_size, softcap, alibi_slopes, num_splits: as above.
        return_softmax_lse: also return softmax_lse.

    Returns:
        out `[b, s_q, n_q, d_v]`, contiguous; with return_softmax_lse also softmax_lse `[b, n_q, s_q]`, float32.

    Raises:
        ValueError, TypeError: an argument is wrong, or requires a gradient in grad mode; nothing has been written. The
            contents of integer tensors are checked on the CPU.
        NotImplementedError: alibi_slopes.
    """
    scores = _scores(alibi_slopes, softmax_scale, causal, window_size, softcap)
    if torch.is_grad_enabled():
        refuse_gradients(
            "flash_attn_with_kvcache",
            q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        )  # fmt: skip

    sizes = Sizes()
    _tensor("q", q, sizes, "b s_q n_q d_k")
    _tensor("k_cache", k_cache, sizes, "entries slots n_k d_k")
    _tensor("v_cache", v_cache, sizes, "entries slots n_v d_v")
    b, s_q, d_k, d_v = (sizes[name] for name in ("b", "s_q", "d_k", "d_v"))
    scores["softmax_scale"] = _head_dims(d_k, d_v, scores["softmax_scale"])
    checks.tensor("q", q, k_cache, (k_cache.dtype,), sizes, "b s_q n_q d_k")
    checks.heads("k_cache", sizes["n_k"], sizes["n_q"])
    checks.heads("v_cache", sizes["n_v"], sizes["n_q"])
    options = AttentionOptions(softmax_scale=scores["softmax_scale"], softcap=scores["softcap"])
    check_options(q, sizes, options)
    full = "" if block_table is None else ", what block_table has room for"
    block_table, capacity = _blocks(block_table, cache_batch_idx, q, sizes)

    if (k is None) != (v is None):
        missing, given = ("k", "v") if k is None else ("v", "k")
        raise wrong(missing, None, f"a tensor, as {given} is given")
    if k is not None:
        _tensor("k", k, sizes, "b s_new n_k d_k")
        _tensor("v", v, sizes, "b s_new n_v d_v")
        if cache_seqlens is None:
            raise wrong("cache_seqlens", None, "the number of tokens before k")
    s_new = sizes.get("s_new", 0)
    if not isinstance(cache_seqlens, Tensor) or cache_seqlens.dim() == 0:
        length = capacity if cache_seqlens is None else as_integer("cache_seqlens", cache_seqlens, 0, 2**31 - 1)
        cache_seqlens = torch.full((b,), length, dtype=torch.int32, device=q.device)
    _int32("cache_seqlens", cache_seqlens, q, b, capacity - s_new, full)
    if cache_leftpad is not None:
        _int32("cache_leftpad", cache_leftpad, q, b, capacity)

    if rotary_cos is not None or rotary_sin is not None:
        if k is None:
            raise wrong("k", None, "a tensor, as rotary_cos or rotary_sin is given")
        in_turn = s_q if scores["causal"] or scores["window"] != (-1, -1) else 1
        slots = cache_seqlens[:, None] + torch.arange(max(in_turn, s_new), device=q.device)
        cos = _angles("rotary_cos", rotary_cos, q, slots, capacity, sizes)
        sin = _angles("rotary_sin", rotary_sin, q, slots, capacity, sizes)
        q = _rotate(q, cos[:, :in_turn], sin[:, :in_turn], rotary_interleaved)
        k = _rotate(k, cos[:, :s_new], sin[:, :s_new], rotary_interleaved)

    groups = checks.gcd(sizes["n_k"], sizes["n_v"])
    caches = k_cache, v_cache
    copies = [_padded(x) for x in caches]
    k_cache, v_cache = (reference.group(x.transpose(1, 2), groups) for x in copies)
    if block_table is None:
        k_cache, v_cache = k_cache[:b], v_cache[:b]
    if k is not None:
        slots = cache_seqlens[:, None] + torch.arange(s_new, device=q.device)
        k, v = (_rows(x).transpose(1, 2) for x in (k, v))
        # Of the caches themselves: the op sees copies of those that are padded.
        checks.memory(dict(zip(("k_cache", "v_cache"), caches, strict=True)), {"k": k, "v": v})
        ops.kv_cache_update(k_cache, v_cache, k, v, slots, block_table=block_table)
        for cache, copy in zip(caches, copies, strict=True):
            if copy is not cache:
                cache.copy_(copy[..., : cache.shape[-1]])
    result = _attend(
        _rows(q), k_cache, v_cache, cache_seqlens + s_new, cache_leftpad, block_table,
        return_lse=return_softmax_lse, **scores,
    )  # fmt: skip
    out, lse = result if return_softmax_lse else (result, None)
    out = _unpadded(out, d_v).contiguous()
    return out if lse is None else (out, lse)
