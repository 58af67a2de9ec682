"""Model prefill: the prompt of a whole Sigma-1.5B, unpacked and packed, beside a Llama of equal size."""

from __future__ import annotations

import torch

from ...common.line import Contenders
from ...common.targets import LLAMA, LLAMA_CPP, OURS, UNPACKED
from .. import limits, llama_cpp, models
from ..layer import Size
from .model_decode import models_of

TITLE = (
    "a prompt through Sigma-1.5B after `fuse_for_inference(weights)`, its cache included; the model as it was loaded; "
    "the Llama of equal size in transformers (sdpa) and in llama.cpp. tokens/s: ours (unpacked); limit: multiplying "
    "tokens by weights"
)
SIZES = tuple(Size(512, weights=form) for form in ("packed", *models.INTEGERS))
_ROUNDS = 3  # of seconds each


def contenders(size: Size, dtype: torch.dtype) -> Contenders:
    found = models_of(dtype, size.weights)
    sigma = found[OURS]
    peers = {UNPACKED: [lambda: models.prompt(models_of(dtype, models.PLAIN)[OURS], size.tokens)]}
    if LLAMA in found:
        peers[LLAMA] = [lambda: models.prompt(found[LLAMA], size.tokens)]
    if llama_cpp.has_peer(dtype):
        peers[LLAMA_CPP] = [llama_cpp.prompt(size.weights, size.tokens)]
    flops = 2.0 * size.tokens * models.multiplied_weights(sigma.model)

    def figures(record: dict) -> dict[str, dict[str, float]]:
        return {"tokens/s": {who: size.tokens * 1e3 / record["ms"][who] for who in (OURS, UNPACKED)}}

    return Contenders(
        error=models.error(size.weights, dtype),
        tolerance=models.tolerance(size.weights, dtype),
        ours=[lambda: models.prompt(sigma, size.tokens)],
        peers=peers,
        limit=limits.arithmetic(flops, dtype),
        work=flops,
        figures=figures,
        rounds=_ROUNDS,
    )
