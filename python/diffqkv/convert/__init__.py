"""Checkpoints of the Llama family made into Sigma checkpoints, and back; Sigma checkpoints with weights of integers.

    to_sigma      Llama, Mistral or Qwen2 -> Sigma with fewer K heads, and fewer V heads where asked for
    to_llama      Sigma without augmented Q -> Llama, exactly
    to_integers   Sigma -> Sigma with weights of 8 or 4 bits

The first two read and write safetensors files a tensor at a time, in the memory of about one file. The result appears
under its name when it is whole: what was interrupted leaves nothing there, and is run again.
"""

from .job import to_llama, to_sigma

# The module above says what is to be installed, if something is missing.
from .integers import to_integers  # isort: skip

__all__ = ["to_integers", "to_llama", "to_sigma"]
