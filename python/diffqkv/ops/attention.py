"""What the attention ops share: options, checks, plain torch and shapes of results.

In plain torch K is repeated to a common head count for `scaled_dot_product_attention`, which reads a group's K once per
V head: right everywhere, fast nowhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from . import checks
from .arguments import as_integer, as_number, as_scale, as_window
from .checks import Sizes, wrong

MOST_SCALE = 1e38  # times log2(e) it is still a number of float32
_SCORE_BYTES = 256 * 2**20  # of the float32 scores that the lse holds at a time


def lse_dtype(q: Tensor) -> torch.dtype:
    """The dtype of scores and lse: float32, or float64 of float64."""
    return torch.promote_types(q.dtype, torch.float32)


# ---- options ---------------------------------------------------------------------------------------------------------


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


def _drawn(dropout_p: float, seed: int | None) -> int:
    """The seed of a call; one that is not given comes from torch's default generator on the CPU."""
    if seed is not None:
        seed = as_integer("seed", seed, -(2**63))
    if dropout_p == 0:
        return 0
    if seed is None:
        if torch.compiler.is_compiling():
            raise wrong("seed", None, "an int where torch.compile traces dropout: it cannot draw one for each call")
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    return seed


def training_options(
    causal: bool,
    softmax_scale: float | None,
    window: tuple[int, int],
    softcap: float,
    sinks: Tensor | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    dropout_p: float,
    seed: int | None,
    offset: int,
) -> AttentionOptions:
    """The arguments of a public function as the schemas have them."""
    offset = as_integer("offset", offset, 0, 2**32 - 1)
    dropout_p = as_number("dropout_p", dropout_p)
    scores = as_scale(softmax_scale), *as_window(window), as_number("softcap", softcap)
    return AttentionOptions(causal, *scores, sinks, kv_start, kv_end, dropout_p, _drawn(dropout_p, seed), offset)


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_options(q: Tensor, sizes: Sizes, options: AttentionOptions) -> None:
    """Checks the options of a call on q, whose b and n_q are among the sizes."""
    for name in ("window_left", "window_right"):
        if (tokens := getattr(options, name)) < -1:
            raise wrong(name, tokens, "a number of tokens, or -1 (unlimited)")
    if options.softmax_scale is not None and not -MOST_SCALE <= options.softmax_scale <= MOST_SCALE:
        raise wrong("softmax_scale", options.softmax_scale, "a number from -1e38 to 1e38")
    if not 0 <= options.softcap <= MOST_SCALE:
        raise wrong("softcap", options.softcap, "0 (none) to 1e38")
    if options.sinks is not None:
        checks.tensor("sinks", options.sinks, q, (torch.float32, q.dtype), sizes, "n_q")
        checks.contiguous("sinks", options.sinks)
    for name in ("kv_start", "kv_end"):
        if (x := getattr(options, name)) is not None:
            checks.per_entry(name, x, q, sizes)
    if not 0 <= options.dropout_p < 1:
        raise wrong("dropout_p", options.dropout_p, "a probability in [0, 1)")
    if not 0 <= options.offset < 2**32:
        raise wrong("offset", options.offset, "an integer from 0 to 2**32 - 1")


def check_heads(sizes: Sizes) -> None:
    checks.head_dim("q", sizes["d_k"])
    checks.head_dim("v", sizes["d_v"])
    checks.heads("k", sizes["n_k"], sizes["n_q"])
    checks.heads("v", sizes["n_v"], sizes["n_q"])


def check_gradients(
    q: Tensor, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sizes: Sizes, of_out: str, of_lse: str
) -> None:
    wide = (lse_dtype(q),)
    checks.tensor("dout", dout, q, (q.dtype,), sizes, of_out)
    checks.tensor("out", out, q, (q.dtype,), sizes, of_out)
    checks.unit_last_stride("out", out)
    if dlse is not None:
        checks.tensor("dlse", dlse, q, wide, sizes, of_lse)
    checks.tensor("lse", lse, q, wide, sizes, of_lse)
    checks.contiguous("lse", lse)


# ---- plain torch -----------------------------------------------------------------------------------------------------


def repeat(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def dot_products(q: Tensor, k: Tensor) -> Tensor:
    """Dot products in float32, or float64 of float64, `[b, n_q, s_q, s_k]`; K is not repeated."""
    dtype = lse_dtype(q)
    per_k = q.shape[1] // k.shape[1]
    rows = q.unflatten(1, (k.shape[1], per_k)).flatten(2, 3).to(dtype)
    return (rows @ k.to(dtype).transpose(2, 3)).unflatten(2, (per_k, q.shape[2])).flatten(1, 2)


def _lse(q: Tensor, k: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    b, n_q, s_q, _ = q.shape
    rows = max(1, _SCORE_BYTES // (4 * max(1, b * n_q * k.shape[2])))
    parts = []
    for start in range(0, max(1, s_q), rows):
        logits = dot_products(q[:, :, start : start + rows], k) * scale
        if visible is not None:
            logits = logits.masked_fill(~visible[:, :, start : start + rows], float("-inf"))
        parts.append(logits.logsumexp(-1))
    return torch.cat(parts, dim=2)


@torch.library.custom_op("diffqkv::dropout_mask", mutates_args=())
def _dropout_mask(
    b: int, n_q: int, s_q: int, s_k: int, dropout_p: float, seed: int, offset: int, device: torch.device
) -> Tensor:
    """An op, so that inductor does not trace into Philox: its code for one round is three times that of the last."""
    return reference.dropout_mask(b, n_q, s_q, s_k, dropout_p, seed, offset, device)


@_dropout_mask.register_fake
def _(b, n_q, s_q, s_k, dropout_p, seed, offset, device):
    return torch.empty((b, n_q, s_q, s_k), dtype=torch.bool, device=device)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    square_causal: bool,
    need_lse: bool,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor | None]:
    """visible: bool, broadcastable to `[b, n_q, s_q, s_k]`, or None; square_causal: the mask of s_q = s_k.

    SDPA where it knows the options. softcap, sinks and dropout are plain mathematics, with all scores in memory.
    """
    (b, n_q, s_q, d_k), n_k, s_k, n_v = q.shape, k.shape[1], k.shape[2], v.shape[1]
    scale, softcap, sinks, dropout_p = options.softmax_scale, options.softcap, options.sinks, options.dropout_p
    if softcap != 0 or sinks is not None or dropout_p != 0:
        kept = None
        if dropout_p != 0:
            kept = _dropout_mask(b, n_q, s_q, s_k, dropout_p, options.seed, options.offset, q.device)
        if visible is None:
            visible = reference.visible_keys(s_q, s_k, s_k, device=q.device)
        exact = (x.to(lse_dtype(q)) for x in (q, k, v))
        out, lse = reference.attend(*exact, visible, scale, softcap, sinks, dropout_p, kept)
        return out.to(q.dtype), lse
    heads = n_k * n_v // checks.gcd(n_k, n_v)  # lcm
    scale = d_k**-0.5 if scale is None else scale
    mask, nothing = None, None
    if visible is not None and not square_causal:
        # What SDPA returns for a row that sees nothing depends on its back-end, and its gradients are NaN in some.
        nothing = ~visible.any(-1, keepdim=True)
        mask = visible | nothing
    out = F.scaled_dot_product_attention(
        q,
        repeat(k, heads),
        repeat(v, heads),
        attn_mask=mask,
        is_causal=square_causal,
        scale=scale,
        enable_gqa=True if heads != n_q else False,  # a plain bool also where torch.compile has dynamic sizes
    )
    if nothing is not None:
        out = out.masked_fill(nothing, 0)
    return out.contiguous(), _lse(q, k, visible, scale) if need_lse else None


# ---- what torch is told ----------------------------------------------------------------------------------------------


def fake_out_and_lse(q: Tensor, d_v: int) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], d_v)), q.new_empty(q.shape[:3], dtype=lse_dtype(q))


def fake_gradients(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest) -> tuple[Tensor, ...]:
    sinks = rest[-1].sinks
    dsinks = q.new_empty(0, dtype=torch.float32) if sinks is None else sinks.new_empty(sinks.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v)), dsinks


def attention_flops(
    b: int, n_q: int, s_q: int, s_k: int, d_k: int, d_v: int, *, causal: bool = False, backward: bool = False
) -> int:
    """The FLOPs of q @ K^T and weights @ V; half of it if causal, as is the custom, whatever s_q and s_k are.

    The backward pass computes the scores once more, and dq, dk of d_k terms; the gradient of the weights and dv, of
    d_v terms.
    """
    flops = 2 * b * n_q * s_q * s_k * (3 * d_k + 2 * d_v if backward else d_k + d_v)
    return flops // 2 if causal else flops
