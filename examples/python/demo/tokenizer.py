"""A byte-level tokenizer: the id of a byte is its value, so any UTF-8 text goes in and comes out unchanged."""

import numpy as np
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = 256
PADDING = 257
VOCAB_SIZE = 258


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Ids 0..255 are bytes, then end of text and padding. `max_length`: the longest input its model takes, in bytes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        # A text that spells out a special token is text too.
        split_special_tokens=True,
    )


def encode(texts: list[str]) -> np.ndarray:
    """What the tokenizer gives for these texts, an end of text after each: int16 `[tokens]`, without its overhead."""
    parts = []
    for text in texts:
        parts += [np.frombuffer(text.encode(), np.uint8), np.array([END_OF_TEXT])]
    return np.concatenate(parts, dtype=np.int16)
