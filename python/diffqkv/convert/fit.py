"""A Sigma's attention fitted, layer by layer, to what its source computes on sample text."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from .augmented_q import fit_augmented_q
from .checkpoint import Checkpoint, streamed_model
from .head_maps import Moments, fit_key_map


class AttentionFit:
    """Fits as the source passes over windows of tokens, int64 `[windows, context]`.

    Attributes:
        tensors: those that differ from the source's, in files in `folder`.
        layers: the errors of each layer's fits.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        old: PreTrainedConfig,
        new: PreTrainedConfig,
        windows: Tensor,
        folder: Path,
        fits_keys: bool,
    ) -> None:
        self.checkpoint, self.new, self.folder, self.fits_keys = checkpoint, new, folder, fits_keys
        self.layers: list[dict[str, float]] = []
        folder.mkdir()
        model = streamed_model(checkpoint, old)
        with tqdm(total=old.num_hidden_layers, desc="fitting", unit="layer", disable=None) as progress:
            for index, layer in enumerate(model.model.layers):
                kept: dict[str, Tensor] = {}
                for name in ("q_proj", "k_proj"):
                    layer.self_attn.get_submodule(name).register_forward_hook(partial(_keep, kept, name))
                layer.self_attn.register_forward_hook(partial(self._fit, index, kept, progress))
            with torch.no_grad():
                model.model(windows, use_cache=False)
        self.tensors = Checkpoint(folder, sorted(path.name for path in folder.iterdir()))

    def _fit(self, index: int, kept: dict[str, Tensor], progress: tqdm, module: nn.Module, *_: object) -> None:
        q, k = (kept.pop(name).flatten(0, 1) for name in ("q_proj", "k_proj"))
        prefix = f"model.layers.{index}.self_attn."
        tensors: dict[str, Tensor] = {}
        errors: dict[str, float] = {}
        if self.fits_keys:
            d = self.new.head_dim
            key_map = fit_key_map(Moments.of(q.unflatten(1, (-1, d)), k.unflatten(1, (-1, d))), self.new.num_key_heads)
            for projection, mapped in (("q_proj", key_map.of_query), ("k_proj", key_map.of_key)):
                for name in (f"{prefix}{projection}.weight", f"{prefix}{projection}.bias"):
                    if name in self.checkpoint.tensors:
                        tensors[name] = mapped(self.checkpoint[name])
            q = key_map.of_query(q.T).T
            errors |= {"score_error": key_map.error, "score_error_of_mean_pooling": key_map.mean_error}
        if self.new.q_aug_dim is not None:
            fitted = fit_augmented_q(q, self.new.q_aug_dim)
            tensors |= {f"{prefix}q_{name}_proj.weight": getattr(fitted, name) for name in ("gate", "up", "down")}
            errors["q_error"] = fitted.error
        save_file({name: x.contiguous() for name, x in tensors.items()}, self.folder / f"{index:05d}.safetensors")
        self.layers.append(errors)
        progress.update()


def _keep(kept: dict[str, Tensor], name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
    kept[name] = output
