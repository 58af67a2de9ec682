"""packed_linear: a product of Sigma-1.5B's layer with its largest weights, beside torch's on the same weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import diffqkv
from diffqkv import memory
from diffqkv.models.packed_linear import PackedLinear

from ...common.accuracy import difference
from ...common.line import Contenders
from ...common.targets import MATMUL
from ...common.timing import pool
from .. import limits, models
from ..layer import CLOCK, Size, on_each

TITLE = (
    "rows of 2048 features times the weights of 7424 others, those of a fused layer of Sigma-1.5B; torch: the same "
    "product of plain weights; limit: reading the weights, or for many rows multiplying"
)
IN_FEATURES, OUT_FEATURES = 2048, 7424
_FORMS = ("packed", *models.INTEGERS)
_FEW = 16  # rows; more are limited by arithmetic
SIZES = tuple(Size(rows, weights=form) for form in _FORMS for rows in (1, 8, 16, 512))


def contenders(size: Size, dtype: torch.dtype) -> Contenders:
    x = torch.randn(size.tokens, IN_FEATURES).to(dtype)
    plain = (torch.randn(OUT_FEATURES, IN_FEATURES) / IN_FEATURES**0.5).to(dtype)
    layer = PackedLinear.of(plain, None, size.weights)
    want = F.linear(x.double(), layer.dense().weight.double())
    layers = pool(
        CLOCK,
        layer.weight.nbytes,
        lambda: PackedLinear(memory.contiguous(layer.weight), layer.scales, None, OUT_FEATURES),
    )
    plains = pool(CLOCK, plain.nbytes, plain.clone)
    flops = 2.0 * x.numel() * OUT_FEATURES
    is_read = size.tokens <= _FEW
    nbytes = layer.weight.nbytes + (0 if layer.scales is None else layer.scales.nbytes)

    def ours(layer: PackedLinear) -> torch.Tensor:
        return diffqkv.packed_linear(x, layer.weight, OUT_FEATURES, scales=layer.scales)

    return Contenders(
        error=difference(ours(layer), want),
        tolerance=3e-4 if size.weights in models.INTEGERS and dtype == torch.float32 else None,
        ours=on_each(layers, ours),
        peers={MATMUL: on_each(plains, lambda weight: F.linear(x, weight))},
        limit=limits.read(nbytes) if is_read else limits.arithmetic(flops, dtype),
        work=nbytes if is_read else flops,
    )
