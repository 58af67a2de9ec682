"""What DiffQKV saves in training and decoding, as `python -m diffqkv bench` measures it; forms for inference."""

import time
from pathlib import Path

import torch
from rich.table import Table

from diffqkv import SigmaConfig, SigmaForCausalLM
from diffqkv.benchmarks.common.targets import OURS, SDPA_MODEL, SDPA_REPEATED, SDPA_TWIN
from diffqkv.benchmarks.cpu.cases import run
from diffqkv.benchmarks.cpu.layer import Size
from diffqkv.ops import library

from .training import bits_per_byte

TRAINING_CONTEXTS = (256, 1024)
DECODE_CONTEXTS = (2048, 8192)
SECONDS_PER_ROW = 1.0
PROMPT_TOKENS = 64
NEW_TOKENS = 64
ROUNDS = 3


def training_table(dtype: torch.dtype, batch_size: int) -> Table:
    """A row per context: a training step of the demo's model through its op, and with torch SDPA in its place.

    Raises:
        RuntimeError: the gradients differ; no time is shown then.
    """
    name = str(dtype).removeprefix("torch.")
    table = Table(title=f"A training step of this model, {name}, batch {batch_size}, median")
    for column in ("context", "through diffqkv", "through torch SDPA", "speed-up"):
        table.add_column(column, justify="right")
    for context in TRAINING_CONTEXTS:
        line = run("model_training", Size(context, batch_size), dtype, SECONDS_PER_ROW)
        if not line["correct"]:
            raise RuntimeError(f"the gradients of attention are wrong: error {line['error']:.3g}")
        times = (f"{line['ms'][name]:.0f} ms" for name in (OURS, SDPA_MODEL))
        table.add_row(f"{context:,}", *times, f"{line['ratios'][SDPA_MODEL]:.2f}")
    return table


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
        for tokens in DECODE_CONTEXTS:
            line = run("decode_attention", Size(tokens), dtype, SECONDS_PER_ROW)
            if not line["correct"]:
                raise RuntimeError(f"decode attention in {line['dtype']} is wrong: error {line['error']:.3g}")
            times = (f"{line['ms'][name]:.3f} ms" for name in (OURS, SDPA_REPEATED, SDPA_TWIN))
            table.add_row(line["dtype"], f"{tokens:,}", f"{sigma:,} / {twin:,}", *times)
    return table


def forms_table(folder: Path, held_out: list[dict[str, torch.Tensor]]) -> Table:
    """A row per form of `fuse_for_inference`: the speed of generating with the saved model, and its bits per byte.

    Without the compiled library there is only the model as it was saved.
    """
    table = Table(title=f"Generating {NEW_TOKENS} tokens with this model, float32, batch 1, best of {ROUNDS}")
    table.add_column("weights")
    for column in ("tokens/s", "bits per byte,\nheld out"):
        table.add_column(column, justify="right")
    prompt = held_out[0]["input_ids"][:1, :PROMPT_TOKENS]
    for form in (None, *(("packed", "int8", "int4") if library.loaded else ())):
        model = SigmaForCausalLM.from_pretrained(folder).eval()
        if form is not None:
            model.fuse_for_inference(form)
        bits = bits_per_byte(model, held_out)
        table.add_row(form or "as trained", f"{_tokens_per_second(model, prompt):,.0f}", f"{bits:.4f}")
    return table


def _tokens_per_second(model: SigmaForCausalLM, prompt: torch.Tensor) -> float:
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        times.append(time.perf_counter() - begin)
    return NEW_TOKENS / min(times)
