"""The model that the examples run: what `make demo` trained, a checkpoint of yours, or else a small untrained one."""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from diffqkv import SigmaConfig, SigmaForCausalLM
from diffqkv.data import byte_tokenizer


def load(folder: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a folder, of the command line's last argument, or of the demo, and its tokenizer."""
    path = Path(folder or (sys.argv[1] if len(sys.argv) > 1 else "runs/demo/model"))
    if path.exists():
        return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    if folder or len(sys.argv) > 1:
        raise SystemExit(f"checkpoint: got {path}, want a folder that save_pretrained wrote")
    print(f"{path} is not there (make demo trains it): an untrained model answers with noise\n")
    tokenizer = byte_tokenizer(512)
    config = SigmaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_heads=2,
        num_value_heads=4,
        q_aug_dim=192,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return SigmaForCausalLM(config).eval(), tokenizer
