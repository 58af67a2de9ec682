"""Cache size and decode time of a Sigma-1.5B layer, as `python -m diffqkv bench` measures them."""

import torch
from rich.table import Table

from diffqkv import SigmaConfig
from diffqkv.benchmarks import decode
from diffqkv.benchmarks.layer import Size
from diffqkv.benchmarks.line import OURS
from diffqkv.benchmarks.targets import SDPA_REPEATED, SDPA_TWIN

CONTEXTS = (2048, 8192)
SECONDS_PER_ROW = 1.0


def decode_table() -> Table:
    """A row per dtype and context: this library, torch SDPA on the same shape, torch SDPA on the GQA-16 twin.

    Raises:
        RuntimeError: an attention result is wrong; no time is shown then.
    """
    config = SigmaConfig.from_preset("sigma-1.5b")
    n_q, n_k, n_v, d = config.num_attention_heads, config.num_key_heads, config.num_value_heads, config.head_dim
    table = Table(title=f"Decode attention of one Sigma-1.5B layer ({n_q}/{n_k}/{n_v} heads, d = {d}), batch 1, median")
    table.add_column("dtype")
    table.add_column("tokens\nin cache", justify="right")
    table.add_column("cache bytes\nper token:\nSigma / GQA-16", justify="right")
    for contender in ("diffqkv", "torch SDPA,\nK repeated", "torch SDPA,\nGQA-16"):
        table.add_column(contender, justify="right")
    for dtype in (torch.bfloat16, torch.float32):
        sigma, twin = (heads * d * dtype.itemsize for heads in (n_k + n_v, 2 * n_v))
        for tokens in CONTEXTS:
            with torch.inference_mode():
                line = decode.run(Size(tokens), dtype, SECONDS_PER_ROW).record
            if not line["correct"]:
                raise RuntimeError(f"decode attention in {line['dtype']} is wrong: error {line['error']:.3g}")
            times = (f"{line['ms'][name]:.3f} ms" for name in (OURS, SDPA_REPEATED, SDPA_TWIN))
            table.add_row(line["dtype"], f"{tokens:,}", f"{sigma:,} / {twin:,}", *times)
    return table
