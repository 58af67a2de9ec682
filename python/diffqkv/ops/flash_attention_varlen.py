"""Attention of prompts and training, of sequences that lie one behind another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from . import checks, dispatch
from .arguments import as_integer, refuse_forward_mode
from .attention import (
    AttentionOptions,
    attend,
    attention_flops,
    check_gradients,
    check_heads,
    check_options,
    fake_gradients,
    lse_dtype,
    training_options,
)
from .autocast import outside_autocast
from .calls import call_differentiable
from .checks import TRAINING_DTYPES, Sizes, any_tensor, wrong
from .op import Op
from .rules import autograd, vmap


def check_cu_seqlens(which: str, x: Tensor, total: int, longest: int) -> None:
    """Checks cu_seqlens_q or cu_seqlens_k of a tensor of `total` rows; longest: the max_seqlen that belongs to it."""
    if not checks.readable(x):
        return
    name, lengths = f"cu_seqlens_{which}", x.diff()
    if x[0] != 0:
        raise wrong(name, f"{int(x[0])} first", "0")
    if (lengths < 0).any():
        raise wrong(name, f"an entry of length {int(lengths.min())}", "values that never decrease")
    if x[-1] != total:
        raise wrong(name, f"{int(x[-1])} last", f"{total}, the tokens of {which}")
    if (lengths > longest).any():
        want = f"at least {int(lengths.max())}, the longest sequence of {name}"
        raise wrong(f"max_seqlen_{which}", longest, want)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: AttentionOptions,
) -> Sizes:
    sizes = Sizes()
    checks.rows("q", q, q, sizes, "total_q n_q d_k", TRAINING_DTYPES)
    checks.rows("k", k, q, sizes, "total_k n_k d_k")
    checks.rows("v", v, q, sizes, "total_k n_v d_v")
    check_heads(sizes)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        checks.tensor(name, x, q, (torch.int32,), sizes, "b+1")
        if x.shape[0] < 1:
            raise wrong(name, "shape [0]", "[b+1]")
        checks.contiguous(name, x)
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if value < 0:
            raise wrong(name, value, "an integer >= 0")
    check_cu_seqlens("q", cu_seqlens_q, sizes["total_q"], max_seqlen_q)
    check_cu_seqlens("k", cu_seqlens_k, sizes["total_k"], max_seqlen_k)
    sizes["b"] = sizes["b+1"] - 1
    check_options(q, sizes, options)
    return sizes


def _check_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: AttentionOptions,
) -> None:
    packed = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    sizes = _check(q, k, v, *packed, options)
    check_gradients(q, dout, dlse, out, lse, sizes, "total_q n_q d_v", "n_q total_q")


def _unpack(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """`[total, heads, d]` -> `[b, heads, longest, d]`; what lies behind the end of an entry is of no meaning."""
    row = cu_seqlens[:-1, None] + torch.arange(longest, device=x.device)
    return F.pad(x, (0, 0, 0, 0, 0, 1))[row.clamp(0, x.shape[0])].transpose(1, 2)


@outside_autocast
def _composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: AttentionOptions,
    *,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The op, differentiable by torch: the entries are padded to max_seqlen_q and max_seqlen_k."""
    kv_start, kv_end = options.kv_start, options.kv_end
    total = q.shape[0]
    lengths_q, lengths_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    end = lengths_k if kv_end is None else torch.minimum(kv_end, lengths_k)
    visible = reference.visible_keys(
        max_seqlen_q, max_seqlen_k, lengths_k - lengths_q + max_seqlen_q, causal=options.causal,
        window=(options.window_left, options.window_right), start=kv_start, end=end, device=q.device,
    )  # fmt: skip
    k, v = (reference.keep_keys(_unpack(x, cu_seqlens_k, max_seqlen_k), kv_start, end) for x in (k, v))
    out, lse = attend(_unpack(q, cu_seqlens_q, max_seqlen_q), k, v, visible, False, need_lse, options)
    token = torch.arange(total, device=q.device)
    entry = torch.searchsorted(cu_seqlens_q[1:], token, right=True)
    index = token - cu_seqlens_q[entry]
    return out[entry, :, index], None if lse is None else lse[entry, :, index].T.contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest):
    total, n_q, _ = q.shape
    return q.new_empty((total, n_q, v.shape[2])), q.new_empty((n_q, total), dtype=lse_dtype(q))


def _pairs(q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_k: int) -> int:
    """Scores per head; from above where cu_seqlens are not known."""
    if not checks.readable(cu_seqlens_q) or not checks.readable(cu_seqlens_k):
        return q.shape[0] * max_seqlen_k
    return int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff()).sum())


def _flops(
    q: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    causal: bool = False,
    dout: Tensor | None = None,
    **rest,
) -> int:
    pairs = _pairs(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_k)
    backward = dout is not None
    return attention_flops(1, q.shape[1], 1, pairs, q.shape[2], v.shape[2], causal=causal, backward=backward)


_BACKWARD = Op(
    "flash_attention_varlen_backward",
    check=_check_backward,
    fake=fake_gradients,
    vmap=vmap.not_built,
    flops=_flops,
)
_OP = dispatch.register(
    Op(
        "flash_attention_varlen",
        check=_check,
        fake=_fake,
        composed=_composed,
        backward=_BACKWARD,
        gradient=autograd.of_attention(_BACKWARD),
        dtypes=TRAINING_DTYPES,
        casts=True,
        vmap=vmap.not_built,
        flops=_flops,
    )
)


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention` of sequences that lie one behind another, without padding; differentiable once.

    Args:
        q: `[total_q, n_q, d_k]`.
        k: `[total_k, n_k, d_k]`.
        v: `[total_k, n_v, d_v]`.
        cu_seqlens_q, cu_seqlens_k: int32 `[b + 1]`, contiguous: entry e owns the rows cu_seqlens[e] to
            cu_seqlens[e + 1]; they begin at 0, never decrease, and end at total_q and total_k.
        max_seqlen_q, max_seqlen_k: no entry is longer.
        kv_start, kv_end: int32 `[b]`, positions inside the entry.
        causal, softmax_scale, window, softcap, sinks, dropout_p, seed, offset, deterministic, return_lse: as in
            `flash_attention`, for each entry; the dropout of an entry is that of `flash_attention` on a batch.

    Returns:
        out `[total_q, n_q, d_v]` in q's dtype; with return_lse also lse `[n_q, total_q]`. As in `flash_attention`.

    Raises:
        ValueError, TypeError: an argument is wrong; torch.compile traces dropout without a seed. The contents of
            cu_seqlens_q and cu_seqlens_k are checked on the CPU.
        NotImplementedError: the gradient of a gradient, or torch.vmap.
    """
    any_tensor("q", q)
    run = dispatch.uses_kernel(_OP, q, k, v, sinks)
    max_seqlen_q = as_integer("max_seqlen_q", max_seqlen_q, 0)
    max_seqlen_k = as_integer("max_seqlen_k", max_seqlen_k, 0)
    args = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = training_options(causal, softmax_scale, window, softcap, sinks, kv_start, kv_end, dropout_p, seed, offset)
    if run:
        refuse_forward_mode("flash_attention_varlen", q, k, v)
        out, lse = call_differentiable(_OP.kernel, (q, k, v, sinks), *args, *options)
    else:
        out, lse = _OP.composed(*args, need_lse=return_lse, **options._asdict())
    return (out, lse) if return_lse else out
