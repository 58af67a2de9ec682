# SPDX-License-Identifier: BSD-3-Clause
"""`fuse_for_inference`: the projections of each attention's input folded into one matrix.

This file stands alone, as those beside it do: `save_pretrained` copies it beside a checkpoint, where it runs without
the diffqkv package.
"""

import torch
from torch import nn


def project_fused(attention: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All projections of hidden_states: gate and up of augmented Q, or else Q itself, then K and V."""
    if torch.is_grad_enabled() and (hidden_states.requires_grad or attention.fused_proj.weight.requires_grad):
        raise RuntimeError(
            "fuse_for_inference: got a forward pass that records gradients, want torch.no_grad(), or the model "
            "loaded again with from_pretrained"
        )
    return attention.fused_proj(hidden_states).split(attention.fused_sizes, -1)


def _fused_names(attention: nn.Module) -> list[str]:
    return ["q_proj", *(["q_gate_proj", "q_up_proj"] if attention.augments_q else []), "k_proj", "v_proj"]


def _check_fusable(attention: nn.Module) -> None:
    """Raises ValueError unless `_fuse` can fold the projections as they are now."""
    for name in _fused_names(attention):
        projection = getattr(attention, name)
        if (kind := type(projection)) is not nn.Linear:
            raise ValueError(f"{name}: got a {kind.__module__}.{kind.__name__}, want a torch.nn.Linear to fuse")
        weight = projection.weight
        if type(weight.data) is not torch.Tensor or not weight.is_floating_point() or weight.is_meta:
            raise ValueError(
                f"{name}: got a weight of type {type(weight.data).__name__}, {weight.dtype}, on {weight.device}, "
                f"want a whole floating-point tensor of this process to fuse"
            )


@torch.no_grad()
def _fuse(attention: nn.Module) -> None:
    """Makes the projections of hidden_states one, and frees them: gate(q_proj(h)) and up(q_proj(h)) are linear."""
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    folds = [attention.q_gate_proj.weight, attention.q_up_proj.weight] if attention.augments_q else []

    def folded(x: torch.Tensor) -> list[torch.Tensor]:
        """What becomes of Q's weight or bias."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return [(fold.to(wide) @ x.to(wide)).to(x.dtype) for fold in folds] or [x]

    weights = [*folded(q.weight), k.weight, v.weight]
    attention.fused_sizes = [len(weight) for weight in weights]
    fused = nn.Linear(q.in_features, sum(attention.fused_sizes), bias=q.bias is not None, device="meta")
    fused.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
    if q.bias is not None:
        fused.bias = nn.Parameter(torch.cat([*folded(q.bias), k.bias, v.bias]), requires_grad=False)
    for name in _fused_names(attention):
        delattr(attention, name)
    attention.fused_proj = fused.eval()


class SigmaFusingMixin:
    """`fuse_for_inference` of all SIGMA models, and what a model can do no more after it."""

    @property
    def is_fused(self) -> bool:
        """Whether `fuse_for_inference` has been called."""
        return any(attention.fused_proj is not None for attention in self._attentions())

    def fuse_for_inference(self) -> "SigmaFusingMixin":
        """Folds the projections of each attention's input into one matrix, in place, and returns the model.

        gate(q_proj(h)) and up(q_proj(h)) of augmented Q are linear in h, so that one product gives gate, up, K and V:
        for Sigma-1.5B, 7424 rows of weights are read instead of 9472. The original weights are freed, and no parameter
        takes gradients any more: training and saving are a RuntimeError, and `from_pretrained` is the way back.

        Raises:
            ValueError: the model is in training mode, or tensor parallel, or has projections that are not plain linear
                layers (LoRA, quantised) or not in memory; before any weight is changed.
        """
        if self.is_fused:
            return self
        if self.training:
            raise ValueError("fuse_for_inference: got a model in training mode, want eval()")
        if self._tp_size not in (None, 1):
            raise ValueError(f"fuse_for_inference: got tp_size = {self._tp_size}, want a model that is not sharded")
        for attention in self._attentions():
            _check_fusable(attention)
        for attention in self._attentions():
            _fuse(attention)
        return self.requires_grad_(False)

    def train(self, mode: bool = True) -> "SigmaFusingMixin":
        """As in `torch.nn.Module`; mode=True is refused after `fuse_for_inference`."""
        if mode:
            self._refuse_fused("train")
        return super().train(mode)

    def _attentions(self) -> list[nn.Module]:
        return [module for module in self.modules() if hasattr(module, "fused_proj")]

    def _refuse_fused(self, name: str) -> None:
        if self.is_fused:
            raise RuntimeError(
                f"{name}: got a model after fuse_for_inference, whose projections are folded into one; want the model "
                f"loaded again with from_pretrained"
            )


__all__ = ["SigmaFusingMixin", "project_fused"]
