"""Calls of decode_attention."""

from __future__ import annotations

from torch import Tensor

import diffqkv

from .. import oracle
from ..draw import Draw
from ..oracle import Result
from .base import Circumstances, compare_attention, oracle_options, precision_of
from .caches import Filled, check_alone


def decode_attention(d: Draw) -> None:
    here, f = Circumstances(d), Filled(d)
    options = {"window": f.window, "softmax_scale": d.scale(), "softcap": d.softcap(), "sinks": d.sinks(f.n_q, f.dtype)}

    d.note(**options)

    def call(rows: slice = slice(None)) -> dict[str, Tensor]:
        out, lse = diffqkv.decode_attention(**f.tensors(rows), **options, return_lse=True)
        return {"out": out, "lse": lse}

    results = here.call(call)
    p = precision_of(f.dtype, here.kernels)
    wanted, _ = oracle.attend(
        f.entries(), oracle_options(options, f.d_k, options["sinks"], p, f.exact and here.kernels)
    )
    compare_attention(results, lambda name, e: results[name][e], wanted, Result())
    here.check_threads(call, results)
    check_alone(d, here, call, results, len(f.lengths))
