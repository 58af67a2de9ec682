"""Model decode: one step of a whole Sigma-1.5B beside models of equal size, all with random weights."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from torch import nn

from ...common import timing
from ...common.line import Contenders
from ...common.targets import LLAMA, LLAMA_CPP, NO_AUGMENTED_Q, OURS, OWN_TWIN
from .. import limits, llama_cpp, models
from ..layer import Size

TITLE = (
    "one token of each sequence through Sigma-1.5B after `fuse_for_inference(weights)`, with its `diffqkv.Cache`; "
    "through models of equal size and the same form: own GQA-16 (32/16/16 heads, no augmented Q), and Sigma's heads "
    "without augmented Q; through a stock Llama, GQA-16 (sdpa, `DynamicCache`); and through llama.cpp on that Llama, "
    "where it is installed (its weights: those of the dtype, Q8_0, Q4_0; its cache: float16). tokens/s: ours (own "
    "GQA-16's); limit: reading weights and cache"
)
_FORMS = ("packed", *models.INTEGERS)
SIZES = (
    *(Size(tokens, weights=form) for form, tokens in product(_FORMS, (16, 1024, 4096, 16384))),
    *(Size(16, 8, weights=form) for form in _FORMS),
)


@lru_cache(maxsize=1)
def _pool(dtype: torch.dtype) -> models.Pool:
    return models.Pool(dtype, models.most_parameters(models.sigma_config()))


@lru_cache(maxsize=2)  # models of one form, and those that it is compared with
def models_of(dtype: torch.dtype, form: str) -> dict[str, nn.Module]:
    """What is measured, by the name of the contender."""
    config, pool = models.sigma_config(), _pool(dtype)
    n_v = config.num_value_heads
    found = {
        OURS: pool.model(config, form),
        OWN_TWIN: pool.model(models.equal_in_size(config, num_key_heads=n_v, q_aug_dim=None), form),
        NO_AUGMENTED_Q: pool.model(models.equal_in_size(config, q_aug_dim=None), form),
    }
    if form not in models.INTEGERS:
        found[LLAMA] = pool.model(models.llama_of_equal_size(config))
    return found


def contenders(size: Size, dtype: torch.dtype) -> Contenders:
    error = models.error(size.weights, dtype)
    found = models_of(dtype, size.weights)
    caches = {name: models.filled_cache(model, size.tokens, dtype, size.batch) for name, model in found.items()}
    calls = {
        name: [lambda model=model, cache=caches[name]: models.step(model, cache, size.batch)]
        for name, model in found.items()
    }
    if llama_cpp.has_peer(dtype) and size.batch == 1:
        calls[LLAMA_CPP] = [llama_cpp.step(size.weights, size.tokens)]
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[OURS].layers)

    def figures(record: dict) -> dict[str, dict[str, float]]:
        return {"tokens/s": {who: size.batch * 1e3 / record["ms"][who] for who in (OURS, OWN_TWIN)}}

    return Contenders(
        error=error,
        tolerance=models.tolerance(size.weights, dtype),
        ours=calls.pop(OURS),
        peers=calls,
        limit=limits.read(timing.POOL_BYTES),
        work=models.weight_bytes(found[OURS]) + cached,
        figures=figures,
    )
