"""DiffQKV attention (SIGMA, arXiv 2501.13629): ops, a cache and Hugging Face models with unequal Q, K and V heads.

Without the compiled library everything runs in plain torch, more slowly; `diffqkv.show_config()` says what runs. The
models and `diffqkv.Cache` need transformers; without one that imports the ops are all there is.
"""

from __future__ import annotations

from pathlib import Path

from . import _transformers, flash_attn_interface, ops, profiling, quantization, reference
from ._version import OLDEST_TRANSFORMERS, __version__
from .installation import config, explain, show_config
from .ops import *  # noqa: F403 (`__all__` names them)
from .reference import SelectiveVStats

# For CMake's find_package(diffqkv), as torch.utils.cmake_prefix_path is for Torch.
cmake_prefix_path = str(Path(__file__).parent / "share" / "cmake")

__all__ = [
    "SelectiveVStats",
    "__version__",
    "cmake_prefix_path",
    "config",
    "explain",
    "flash_attn_interface",
    "profiling",
    "quantization",
    "reference",
    "show_config",
]
__all__ += ops.__all__

if _transformers.error is None:
    try:
        from .cache import Cache
        from .models.quantizer import WeightsConfig
        from .models.sigma import (
            SigmaConfig,
            SigmaForCausalLM,
            SigmaForQuestionAnswering,
            SigmaForSequenceClassification,
            SigmaForTokenClassification,
            SigmaModel,
        )
    except Exception as error:
        if not _transformers.is_untested:
            raise
        _transformers.error = error
        globals().pop("Cache", None)

if _transformers.error is None:
    __all__ += [
        "Cache",
        "SigmaConfig",
        "SigmaForCausalLM",
        "SigmaForQuestionAnswering",
        "SigmaForSequenceClassification",
        "SigmaForTokenClassification",
        "SigmaModel",
        "WeightsConfig",
    ]
else:

    def __getattr__(name: str) -> object:
        if name in ("Cache", "WeightsConfig") or name.startswith("Sigma"):
            why_not = f"needs transformers {OLDEST_TRANSFORMERS} or newer: {_transformers.why_not()}"
            raise ImportError(f"diffqkv.{name} {why_not}") from _transformers.error
        raise AttributeError(f"module 'diffqkv' has no attribute {name!r}")
