"""Heads of one number made of heads of another: by mean pooling, or by a map fitted to what the heads compute.

Heads stand in order: of n heads, head i serves the query heads i * n_q / n up to (i + 1) * n_q / n.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def _incidence(heads: int, target: int, n_q: int) -> Tensor:
    """float64 `[n_q, target, heads]`: 1 at the target head that serves a query head and the head that served it."""
    queries = torch.arange(n_q)
    serves = F.one_hot(queries * target // n_q, target)
    served = F.one_hot(queries * heads // n_q, heads)
    return (serves[:, :, None] * served[:, None]).double()


def _pooling(heads: int, target: int, n_q: int) -> Tensor:
    """float64 `[target, heads]`: of the query heads that a target head serves, the part that each head served."""
    return _incidence(heads, target, n_q).sum(0) * target / n_q


def pool_heads(x: Tensor, heads: int, target: int, n_q: int) -> Tensor:
    """The weight or bias `[heads * d, ...]` of a projection as `[target * d, ...]`, in its dtype.

    A target head is the mean, over the query heads that it serves, of the heads that served them: mean pooling (GQA,
    arXiv 2305.13245, section 2.1) where heads become fewer, repetition, which is exact, where they become more.
    """
    if target == heads:
        return x
    dtype = torch.promote_types(x.dtype, torch.float32)
    pooled = _pooling(heads, target, n_q).to(dtype) @ x.to(dtype).reshape(heads, -1)
    return pooled.reshape(-1, *x.shape[1:]).to(x.dtype)


class Moments(NamedTuple):
    """Second moments of q and k before RoPE over sample tokens, per frequency."""

    key: Tensor  # complex128 [d / 2, heads, heads]
    query: Tensor  # float64 [d / 2, n_q]

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> Moments:
        """q `[tokens, n_q, d]`, k `[tokens, heads, d]`."""
        q, k = to_complex(q), to_complex(k).permute(2, 1, 0)
        return cls((k @ k.mH).to(torch.complex128) / k.shape[-1], q.abs().square().mean(0).T.double())


class KeyMap(NamedTuple):
    """Fewer K heads, and what the query heads do about it. Complex: maps within a frequency commute with RoPE."""

    key: Tensor  # complex [n_k, heads, d / 2]: a new head is the sum of the old ones times this
    query: Tensor  # complex [n_q, d / 2]: q is multiplied by this
    error: float  # the criterion of `fit_key_map`, relative to the mean square of the scores
    mean_error: float  # the same for mean pooling

    def of_key(self, x: Tensor) -> Tensor:
        """The weight or bias of the K projection, `[heads * d, ...]`, as `[n_k * d, ...]`."""
        _, heads, pairs = self.key.shape
        old = to_complex(x.reshape(heads, 2 * pairs, -1).mT)
        return _from_complex(torch.einsum("tsf,sif->tif", self.key.to(old.dtype), old)).mT.reshape(-1, *x.shape[1:])

    def of_query(self, x: Tensor) -> Tensor:
        """The weight or bias of the Q projection, `[n_q * d, ...]`."""
        n_q, pairs = self.query.shape
        old = to_complex(x.reshape(n_q, 2 * pairs, -1).mT)
        return _from_complex(self.query[:, None].to(old.dtype) * old).mT.reshape(x.shape)


def to_complex(x: Tensor) -> Tensor:
    """The pairs (i, i + d / 2) that RoPE turns: `[..., d]` as complex `[..., d / 2]`."""
    return torch.complex(*x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1))


def _from_complex(x: Tensor) -> Tensor:
    return torch.cat((x.real, x.imag), dim=-1)


def fit_key_map(moments: Moments, n_k: int) -> KeyMap:
    """The n_k heads of K that change the scores least.

    With pairs as complex numbers, q and k at the distance m have the score Re(conj(q) exp(i m θ) k), summed over
    frequencies θ. Where old heads k_s become one new head κ, a_s κ stands for k_s, and a_s moves into the Q projection.
    Minimised is

        sum over frequencies and query heads h of  E|q_h|² E|k_s(h) - a_s(h) κ|²,  κ a linear map of the k_s.

    This is the mean squared error of the scores before the softmax if q and k are independent and products of different
    frequencies average out, as they do over distances. The minimum is closed: κ is, per frequency, the first principal
    component of the old heads weighted by the energy of their queries, and the a_s are regressions on it. Mean pooling
    is one of the candidates, with all a_s = 1, so that on the sample the fit is never worse. (The error of K itself,
    without queries and a_s, would give back mean pooling.)

    The parts are known, their combination is ours: aligning heads before merging them (Jin et al., arXiv 2412.20677),
    and principal components across the heads of one frequency, which commute with RoPE (TransMLA, arXiv 2502.07864).
    """
    pairs, heads, _ = moments.key.shape
    n_q = moments.query.shape[1]
    incidence, pooling = _incidence(heads, n_k, n_q), _pooling(heads, n_k, n_q)
    energy = torch.einsum("fh,hts->fts", moments.query, incidence)
    covariance = moments.key[:, None]
    root = energy.sqrt()
    values, vectors = torch.linalg.eigh(root[..., None] * covariance * root[..., None, :])
    b, power = root * vectors[..., -1], values[..., -1:]
    a = (covariance @ b[..., None]).squeeze(-1) / power

    # Of all scales and phases of κ, the one that leaves queries as large as they are and the main head as it is.
    size = (pooling * a.abs().square()).sum(-1, keepdim=True).sqrt()
    largest = (pooling * a.abs()).argmax(-1, keepdim=True)
    scale = size * torch.sgn(a.gather(-1, largest))
    b, a = b * scale.conj(), a / scale

    mean, one = pooling.expand_as(b).to(b.dtype), torch.ones_like(a)
    dead = power <= 0
    b, a = torch.where(dead, mean, b), torch.where(dead, one, a)
    return KeyMap(
        b.conj().permute(1, 2, 0),
        torch.einsum("fts,hts->hf", a.conj(), incidence.to(a.dtype)),
        _score_error(covariance, energy, b, a),
        _score_error(covariance, energy, mean, one),
    )


def _score_error(covariance: Tensor, energy: Tensor, b: Tensor, a: Tensor) -> float:
    """The criterion of `fit_key_map` for κ = b^H k and a, relative to what it is for κ = 0."""
    mapped = (covariance @ b[..., None]).squeeze(-1)
    power = (b.conj() * mapped).sum(-1, keepdim=True).real
    own = covariance.diagonal(dim1=-2, dim2=-1).real
    error = own - 2 * (a.conj() * mapped).real + a.abs().square() * power
    return ((energy * error).sum() / (energy * own).sum()).item()
