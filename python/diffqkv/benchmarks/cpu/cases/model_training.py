"""Model training: one step of a whole Sigma through its op, and of the same model through torch's SDPA."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

import diffqkv

from ...common.accuracy import distance
from ...common.line import Contenders
from ...common.targets import SDPA_MODEL
from ..layer import Size

TITLE = (
    "a training step (forward, backward, AdamW) of a Sigma, and of the same model through SDPA; bfloat16: autocast. "
    "Batches of 8: the demo's model; batches of 1: a Sigma with 104 M parameters"
)
# The demo's model: bytes, two special tokens.
SMALL = {
    "vocab_size": 258,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_heads": 2,
    "num_value_heads": 4,
    "q_aug_dim": 256,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    # hidden_size ** -0.5 keeps the size of augmented Q, a product of three matrices, near 1.
    "initializer_range": 0.0625,
}
LARGE = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_heads": 2,
    "num_value_heads": 8,
    "head_dim": 64,
    "q_aug_dim": 1024,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.036,
}
TRAINS = True
SIZES = (Size(256, 8), Size(1024, 8), Size(1024, 1))
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # a distance of the gradients


class Steps:
    """Training steps of one model on random tokens, through either attention."""

    def __init__(self, config: dict, size: Size, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model = diffqkv.SigmaForCausalLM(diffqkv.SigmaConfig(**config)).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ids = torch.randint(config["vocab_size"], (size.batch, size.tokens))
        self.dtype = dtype

    def through(self, attention: str) -> Callable[[], None]:
        def step() -> None:
            self.gradients(attention)
            self.optimizer.step()

        return step

    def gradients(self, attention: str) -> Tensor:
        """The gradients of all parameters, end to end."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.set_attn_implementation(attention)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        return torch.cat([p.grad.flatten() for p in self.model.parameters()])

    def error(self) -> float:
        """The distance of our gradients from SDPA's."""
        return distance(self.gradients("diffqkv"), self.gradients("sdpa"))


@lru_cache(maxsize=1)
def _steps(size: Size, dtype: torch.dtype) -> Steps:
    return Steps(LARGE if size.batch == 1 else SMALL, size, dtype)


def contenders(size: Size, dtype: torch.dtype) -> Contenders:
    steps = _steps(size, dtype)
    tokens = size.batch * size.tokens
    return Contenders(
        error=steps.error(),
        tolerance=_TOLERANCE[dtype],
        ours=[steps.through("diffqkv")],
        peers={SDPA_MODEL: [steps.through("sdpa")]},
        figures=lambda record: {"tokens/s": {who: tokens / ms * 1e3 for who, ms in record["ms"].items()}},
    )
