"""Checkpoints of the Llama family made into Sigma checkpoints, and back.

    to_sigma   Llama, Mistral or Qwen2 -> Sigma with fewer K heads, and fewer V heads where asked for
    to_llama   Sigma without augmented Q -> Llama, exactly

Safetensors files are read and written a tensor at a time, in the memory of about one file. The result appears under its
name when it is whole: what was interrupted leaves nothing there, and is run again.
"""

from .job import to_llama, to_sigma

__all__ = ["to_llama", "to_sigma"]
