"""llama.cpp as a peer, where the packages `llama_cpp` and `gguf` are installed: a Llama with random weights."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from . import models

_TYPES = {models.PLAIN: "BF16", "packed": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
_RANDOM = 1 << 20  # numbers that are drawn; they repeat
_PROMPT = 1024  # tokens that are computed to fill a cache; longer ones repeat their K and V
_BATCH = 512


@lru_cache(maxsize=1)
def _is_importable() -> bool:
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    except ImportError:
        return False
    return True


def has_peer(dtype: torch.dtype) -> bool:
    """Whether llama.cpp can be measured beside models of this dtype: its cache has 16 bits."""
    return dtype == torch.bfloat16 and _is_importable()


def step(form: str, tokens: int) -> Callable[[], object]:
    """One more token behind so many, which are left as they were."""
    context = _Context(form, tokens)
    context.fill(tokens)
    return context.step


def prompt(form: str, tokens: int) -> Callable[[], object]:
    context = _Context(form, tokens)
    return lambda: context.prompt(tokens)


def _write(path: Path, form: str) -> None:
    """A GGUF file of the Llama of equal size, all matrices in the form's type."""
    import gguf
    import numpy as np

    config = models.llama_of_equal_size(models.sigma_config())
    kind = gguf.GGMLQuantizationType[_TYPES[form]]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    numbers = np.random.default_rng(0).standard_normal((_RANDOM // 1024, 1024), dtype=np.float32) * 0.02
    pattern = gguf.quants.quantize(numbers, kind).view(np.uint8).reshape(-1)
    n_q, n_kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    hidden, ffn = config.hidden_size, config.intermediate_size
    largest = max(config.vocab_size, ffn) * hidden // block * block_bytes
    pattern = np.resize(pattern, largest)  # all matrices are views of it

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(n_q)
    writer.add_head_count_kv(n_kv)
    writer.add_key_length(d)
    writer.add_value_length(d)
    writer.add_rope_dimension_count(d)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    def matrix(name: str, rows: int, columns: int) -> None:
        row = columns // block * block_bytes
        writer.add_tensor(f"{name}.weight", pattern[: rows * row].reshape(rows, row), raw_dtype=kind)

    def ones(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))

    matrix("token_embd", config.vocab_size, hidden)
    for i in range(config.num_hidden_layers):
        ones(f"blk.{i}.attn_norm")
        ones(f"blk.{i}.ffn_norm")
        matrix(f"blk.{i}.attn_q", n_q * d, hidden)
        matrix(f"blk.{i}.attn_k", n_kv * d, hidden)
        matrix(f"blk.{i}.attn_v", n_kv * d, hidden)
        matrix(f"blk.{i}.attn_output", hidden, n_q * d)
        matrix(f"blk.{i}.ffn_gate", ffn, hidden)
        matrix(f"blk.{i}.ffn_up", ffn, hidden)
        matrix(f"blk.{i}.ffn_down", hidden, ffn)
    ones("output_norm")
    matrix("output", config.vocab_size, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@lru_cache(maxsize=1)
def _model(form: str) -> Any:
    import llama_cpp

    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda *args: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    _model.silent = silent  # it is called for as long as the process lives
    handle, name = tempfile.mkstemp(suffix=".gguf")
    os.close(handle)
    try:
        _write(Path(name), form)
        model = llama_cpp.llama_model_load_from_file(name.encode(), llama_cpp.llama_model_default_params())
    finally:
        os.unlink(name)  # it stays mapped
    if not model:
        raise RuntimeError(f"llama.cpp: could not load a model of {_TYPES[form]}")
    return model


class _Context:
    def __init__(self, form: str, tokens: int) -> None:
        import llama_cpp

        self.lib = llama_cpp
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = tokens + 2 * _PROMPT
        params.n_batch = params.n_ubatch = _BATCH
        params.n_seq_max = -(-tokens // _PROMPT) + 1
        params.kv_unified = True
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(_model(form), params)
        if not self.context:
            raise RuntimeError("llama.cpp: could not make a context")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.length = 0

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.lib.llama_free(self.context)

    def _decode(self, tokens: int) -> None:
        ids = (self.lib.llama_token * tokens)(*([1] * tokens))
        if code := self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(ids, tokens)):
            raise RuntimeError(f"llama.cpp: llama_decode returned {code}")
        self.lib.llama_get_logits(self.context)  # waits for them

    def fill(self, tokens: int) -> None:
        """Makes the next token see so many: those of a prompt, and copies of their K and V in cells of their own."""
        self.length = min(tokens, _PROMPT)
        for begin in range(0, self.length, _BATCH):
            self._decode(min(_BATCH, self.length - begin))
        size = self.lib.llama_state_seq_get_size(self.context, 0)
        state = (ctypes.c_uint8 * size)()
        self.lib.llama_state_seq_get_data(self.context, state, size, 0)
        for copy in range(1, -(-tokens // _PROMPT)):
            if not self.lib.llama_state_seq_set_data(self.context, state, size, copy):
                raise RuntimeError("llama.cpp: could not copy a sequence")
            self.lib.llama_memory_seq_cp(self.memory, copy, 0, -1, -1)

    def step(self) -> None:
        self._decode(1)
        self.lib.llama_memory_seq_rm(self.memory, 0, self.length, -1)

    def prompt(self, tokens: int) -> None:
        self.lib.llama_memory_clear(self.memory, True)
        for begin in range(0, tokens, _BATCH):
            self._decode(min(_BATCH, tokens - begin))
