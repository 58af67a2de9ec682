"""Sigma checkpoints with weights of 8 or 4 bits, made of plain ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.packed_linear import BITS, PackedEmbedding, PackedLinear
from ..models.quantizer import WeightsConfig
from ..models.sigma import SigmaConfig, SigmaForCausalLM
from .checkpoint import EMBEDDING, Checkpoint, check_dtype, empty_model, open_model, plan_files, streamed_model
from .files import check_output, copy_companions, new_folder, sample_windows, write_report

WEIGHTS = tuple(name for name, bits in BITS.items() if bits is not None)
REPORT = "quantization.json"


def to_integers(
    source: str | Path,
    output: str | Path,
    *,
    weights: str,
    group_size: int = 32,
    text: str | Path | Sequence[str | Path] = (),
    text_tokens: int = 16384,
    context: int = 512,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> dict[str, object]:
    """Makes a Sigma checkpoint with weights of integers of a plain one, and returns the report that lies beside it.

    The model is the one of `from_pretrained(source, quantization_config=WeightsConfig(weights, group_size))`. It is
    held in memory, and besides it about one layer of the source.

    Args:
        weights: "int8" or "int4".
        group_size: the input features that share a scale; a multiple of 32 up to 256.
        source, output, text, text_tokens, context, max_shard_size, overwrite: as in `to_sigma`. Both models compute in
            float32 on the text.
        dtype: what the result computes in, and of its other weights: float32, bfloat16 or float16. Default: the
            source's.

    Raises:
        FileNotFoundError: there is no model at `source`, or no text. ValueError: something about an argument or the
            source is wrong; the message names it. Nothing has been written then.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights: got {weights!r}, want {' or '.join(map(repr, WEIGHTS))}")
    form = WeightsConfig(weights, group_size)
    checkpoint, config = open_model(source, (SigmaConfig.model_type,))
    dtype = dtype or checkpoint.tensors[EMBEDDING].dtype
    check_dtype(dtype)
    empty_model(config)._check_form(weights, group_size)
    plan_files(checkpoint.tensors, max_shard_size)
    output = Path(output).resolve()
    check_output(output, checkpoint.folder, overwrite)
    windows = sample_windows(text, checkpoint, config, context, text_tokens, least=1)
    _check_finite(checkpoint, dtype)
    name = str(dtype).removeprefix("torch.")
    try:
        model = SigmaForCausalLM.from_pretrained(
            checkpoint.folder, dtype=dtype, quantization_config=form, local_files_only=True
        ).eval()
    except RuntimeError as error:  # transformers has printed the layer and the reason
        raise ValueError(f"source: got weights that are not finite in {name} when folded ({error})") from error
    plain = list(checkpoint.tensors.values())
    report = {
        "weights": weights,
        "group_size": group_size,
        "before": _costs(sum(x.numel() for x in plain), sum(x.nbytes for x in plain)),
        "after": _costs(_numbers(model), sum(x.nbytes for x in model.parameters())),
        "text": None,
    }
    with new_folder(output) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        copy_companions(checkpoint.folder, folder)
        if windows is not None:
            from .measure import compare

            report["text"] = compare(streamed_model(checkpoint, config), model.to(torch.float32), windows)
        write_report(folder / REPORT, report)
    return report


def _check_finite(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    for name in checkpoint.tensors:
        values = checkpoint[name].to(dtype)
        if not (finite := values.isfinite()).all():
            bad = values[~finite][0].item()
            raise ValueError(f"{name}: got {bad} in {str(dtype).removeprefix('torch.')}, want finite numbers")


def _numbers(model: PreTrainedModel) -> int:
    """The parameters that a model's integers stand for, with all others."""
    return sum(_own_numbers(module) for module in model.modules())


def _own_numbers(module: nn.Module) -> int:
    if isinstance(module, PackedLinear):
        return module.in_features * module.out_features + (0 if module.bias is None else module.bias.numel())
    if isinstance(module, PackedEmbedding):  # the head's
        return 0
    return sum(x.numel() for x in module.parameters(recurse=False))


def _costs(parameters: int, size: int) -> dict[str, object]:
    return {"parameters": parameters, "bytes": size, "bits_per_weight": 8 * size / parameters}
