"""Attention of prompts and training."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from . import checks, dispatch
from .arguments import refuse_forward_mode
from .attention import (
    AttentionOptions,
    attend,
    attention_flops,
    check_gradients,
    check_heads,
    check_options,
    fake_gradients,
    fake_out_and_lse,
    training_options,
)
from .autocast import outside_autocast
from .calls import call_differentiable
from .checks import TRAINING_DTYPES, Sizes, any_tensor
from .op import Op
from .rules import autograd, vmap


def _check(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Sizes:
    sizes = Sizes()
    checks.rows("q", q, q, sizes, "b n_q s_q d_k", TRAINING_DTYPES)
    checks.rows("k", k, q, sizes, "b n_k s_k d_k")
    checks.rows("v", v, q, sizes, "b n_v s_k d_v")
    check_heads(sizes)
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
    options: AttentionOptions,
) -> None:
    sizes = _check(q, k, v, options)
    check_gradients(q, dout, dlse, out, lse, sizes, "b n_q s_q d_v", "b n_q s_q")


@outside_autocast
def _composed(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *, need_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The op, differentiable by torch. With need_lse=False it leaves out the lse and the second pass over K."""
    causal, kv_start, kv_end = options.causal, options.kv_start, options.kv_end
    window = options.window_left, options.window_right
    s_q, s_k = q.shape[2], k.shape[2]
    masked = kv_start is not None or kv_end is not None or window != (-1, -1)
    visible = None
    if masked or causal:
        visible = reference.visible_keys(
            s_q, s_k, s_k, causal=causal, window=window, start=kv_start, end=kv_end, device=q.device
        )
    k, v = reference.keep_keys(k, kv_start, kv_end), reference.keep_keys(v, kv_start, kv_end)
    square_causal = True if causal and s_q == s_k and not masked else False  # a plain bool also under torch.compile
    return attend(q, k, v, visible, square_causal, need_lse, options)


def _fake(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions):
    return fake_out_and_lse(q, v.shape[3])


def _flops(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, dout: Tensor | None = None, **rest) -> int:
    b, n_q, s_q, d_k = q.shape
    return attention_flops(b, n_q, s_q, k.shape[2], d_k, v.shape[3], causal=causal, backward=dout is not None)


_BACKWARD = Op(
    "flash_attention_backward",
    check=_check_backward,
    fake=fake_gradients,
    vmap=vmap.over_batch,
    flops=_flops,
)
_OP = dispatch.register(
    Op(
        "flash_attention",
        check=_check,
        fake=_fake,
        composed=_composed,
        backward=_BACKWARD,
        gradient=autograd.of_attention(_BACKWARD),
        dtypes=TRAINING_DTYPES,
        casts=True,
        vmap=vmap.over_batch,
        flops=_flops,
    )
)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    """Attention with unequal numbers of K and V heads (eq. 16 and 17), without a matrix of scores; differentiable once.

    The backward pass computes the scores again from lse, as FlashAttention does (arXiv 2205.14135, algorithm 4). Beside
    its results it takes memory for tiles on each thread and, of 16-bit inputs, for q's gradient in float32.

    Args:
        q: `[b, n_q, s_q, d_k]`.
        k: `[b, n_k, s_k, d_k]`.
        v: `[b, n_v, s_k, d_v]`.
        causal: query i sees the keys j <= i + s_k - s_q (aligned at the bottom right).
        softmax_scale: factor of the scores, from -1e38 to 1e38; d_k ** -0.5 by default.
        window: (left, right): query i sees left keys before and right keys behind its own, j = i + s_k - s_q; -1: all.
        softcap: c > 0 replaces a scaled score x by c * tanh(x / c) (Gemma 2, arXiv 2408.00118).
        sinks: `[n_q]`, float32 or q's dtype, contiguous: logits of one more key per head, without a value. They count
            in the softmax and in lse (arXiv 2309.17453). Differentiable.
        kv_start, kv_end: int32 `[b]`: only the keys in [kv_start, kv_end) exist, for left or right padding. The causal
            alignment does not move. What lies outside may be NaN; its gradients are 0.
        dropout_p: in [0, 1): probability, in steps of 2 ** -16, that a softmax weight is dropped; the others are
            multiplied by 1 / (1 - dropout_p). lse is without dropout.
        seed, offset: which weights are dropped (`reference.dropout_mask`): a function of these two numbers and of the
            weight's entry, head, query and key, the same on every device. seed: 64 bits, from torch's default
            generator on the CPU by default, so that `torch.manual_seed` and activation checkpointing repeat it;
            offset: 0 to 2 ** 32 - 1.
        deterministic: neither results nor gradients ever depend on the run, the batch or the number of threads,
            whatever is given here.
        return_lse: also return the logarithm of the softmax denominator, differentiable too.

    Returns:
        out `[b, n_q, s_q, d_v]` in q's dtype; with return_lse also lse `[b, n_q, s_q]`, float32 (float64 of float64),
        natural logarithm. A query that sees no key gets out 0, lse -inf or its sink, and gradients 0. Under
        torch.autocast, q, k and v that are not float64 are cast to its dtype.

    Raises:
        ValueError, TypeError: an argument is wrong; torch.compile traces dropout without a seed.
        NotImplementedError: the gradient of a gradient is asked of the kernel.
    """
    any_tensor("q", q)
    run = dispatch.uses_kernel(_OP, q, k, v, sinks)
    options = training_options(causal, softmax_scale, window, softcap, sinks, kv_start, kv_end, dropout_p, seed, offset)
    if run:
        refuse_forward_mode("flash_attention", q, k, v)
        out, lse = call_differentiable(_OP.kernel, (q, k, v, sinks), q, k, v, *options)
    else:
        out, lse = _OP.composed(q, k, v, need_lse=return_lse, **options._asdict())
    return (out, lse) if return_lse else out
