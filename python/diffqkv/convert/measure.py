"""What a conversion does to a model, on text."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from ..data import read_texts


def read_windows(
    text: Sequence[str | Path], folder: Path, vocab_size: int, context: int, tokens: int, least: int
) -> Tensor:
    """The first tokens of text files in windows, int64 `[windows, context]`, by the tokenizer in `folder`.

    Documents follow each other with an end of text between them; a window begins with what the tokenizer puts first.

    Raises:
        ValueError: there is no tokenizer, its ids are no tokens of the model, or the text has fewer windows than
            `least`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"text: got a source without tokenizer ({error}), want its files beside the weights"
        ) from error
    first = [] if tokenizer.bos_token_id not in tokenizer("a")["input_ids"][:1] else [tokenizer.bos_token_id]
    last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for document in read_texts(*text):
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + last
        if len(ids) >= tokens:
            break
    body = context - len(first)
    windows = min(len(ids), tokens) // body
    if windows < least:
        raise ValueError(f"text: got {len(ids)} tokens, want at least {least * body}: {least} windows of context")
    if max(ids) >= vocab_size:
        raise ValueError(f"text: got token {max(ids)} from the tokenizer, want ids below vocab_size ({vocab_size})")
    rows = torch.tensor(ids[: windows * body]).view(windows, body)
    return torch.cat((torch.tensor(first, dtype=rows.dtype).expand(windows, -1), rows), dim=1)


@torch.no_grad()
def compare(before: PreTrainedModel, after: PreTrainedModel, windows: Tensor) -> dict[str, object]:
    """How the logits of two models differ on windows of tokens, and the perplexity of each."""
    # All windows pass a layer together: each model is read once.
    hidden = [model.model(windows, use_cache=False).last_hidden_state for model in (before, after)]
    largest, divergence, nats = 0.0, 0.0, [0.0, 0.0]
    for ids, *states in zip(windows, *hidden, strict=True):
        logits = [model.lm_head(state) for model, state in zip((before, after), states, strict=True)]
        largest = max(largest, (logits[0] - logits[1]).abs().max().item())
        p, q = (x.double().log_softmax(-1) for x in logits)
        divergence += F.kl_div(q, p, reduction="sum", log_target=True).item()
        nats = [n + F.nll_loss(x[:-1], ids[1:], reduction="sum").item() for n, x in zip(nats, (p, q), strict=True)]
    targets = windows[:, 1:].numel()
    return {
        "tokens": windows.numel(),
        "max_logit_difference": largest,
        "mean_kl": divergence / windows.numel(),
        "perplexity": {name: exp(n / targets) for name, n in zip(("before", "after"), nats, strict=True)},
        "perplexity_quotient": exp((nats[1] - nats[0]) / targets),
    }
