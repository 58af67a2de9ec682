"""Augmented Q (section 2.2, Appendix E) that hands q on nearly unchanged."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Where the common gate stands: at the minimum of silu, where its small movements change nothing, or where silu is
# nearly the identity, which is coarser but bears rare large movements.
_GATES = (-1.2784645, 4.0)
# Of the mean square of the features.
_RIDGE = 1e-5
_FITTED_PART = 0.75


class AugmentedQ(NamedTuple):
    """Weights of `q_gate_proj`, `q_up_proj` and `q_down_proj`."""

    gate: Tensor  # [dim, n_q * d]
    up: Tensor  # [dim, n_q * d]
    down: Tensor  # [n_q * d, dim]
    error: float  # mean square of what q is changed by, relative to that of q, on tokens that were not fitted to


def fit_augmented_q(q: Tensor, dim: int) -> AugmentedQ:
    """The gated MLP down(silu(gate q) * up q) nearest to q on a sample, float32 `[tokens, n_q * d]`, in closed form.

    Without bias and residual it is not the identity for any weights: for small q it is a square. But q of real models
    is far from zero on average. So there is a direction w with w q near 1, by least squares, and gates along w are near
    a constant. `up` has the principal directions of q, of which `dim` below n_q * d keeps the largest; `down` is a
    regression of q on the products. Rows beyond n_q * d have gates with random parts.
    """
    scale = q.square().mean().sqrt()
    x = q.double() / scale
    cut = max(1, int(len(x) * _FITTED_PART))
    gate, up, down, error = min((_fit(x[:cut], x[cut:], dim, at) for at in _GATES), key=lambda fit: fit.error)
    return AugmentedQ((gate / scale).float(), (up / scale).float(), (down * scale).float(), error)


def _fit(x: Tensor, held_out: Tensor, dim: int, gate_at: float) -> AugmentedQ:
    size = x.shape[1]
    w = _regression(x, torch.ones_like(x[:, :1]))
    gate = (gate_at * w).repeat(dim, 1)
    if dim > size:
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(dim - size, size, generator=generator, dtype=x.dtype)
        gate[size:] += random / (random * x.std(0)).norm(dim=1, keepdim=True)
    principal = torch.linalg.eigh(x.T @ x).eigenvectors.flip(-1).T
    up = principal.repeat(-(-dim // size), 1)[:dim]
    # What the first rows would do if w q were 1, and a correction: so few tokens do no harm.
    down = torch.zeros(size, dim, dtype=x.dtype)
    rows = min(dim, size)
    down[:, :rows] = principal[:rows].T / F.silu(torch.tensor(gate_at, dtype=x.dtype))

    def features(x: Tensor) -> Tensor:
        return F.silu(x @ gate.T) * (x @ up.T)

    down += _regression(features(x), x - features(x) @ down.T)
    change = features(held_out) @ down.T - held_out
    return AugmentedQ(gate, up, down, (change.square().sum() / held_out.square().sum()).item())


def _regression(x: Tensor, y: Tensor) -> Tensor:
    """The `[y's, x's]` that takes x `[tokens, x's]` nearest to y, with a little ridge."""
    gram = x.T @ x
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, x.T @ y).T
