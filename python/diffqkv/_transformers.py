"""Imports what the models need of transformers, and knows why if it cannot: the ops do without."""

from __future__ import annotations

import warnings
from importlib import import_module

from ._version import NEWEST_TRANSFORMERS, OLDEST_TRANSFORMERS

# Transformers imports its parts when they are asked for: these are the ones that the cache and the models ask for.
NEEDED = (
    "activations",
    "cache_utils",
    "core_model_loading",
    "dynamic_module_utils",
    "generation",
    "generation.continuous_batching",
    "integrations",
    "integrations.sdpa_attention",
    "masking_utils",
    "modeling_layers",
    "modeling_outputs",
    "modeling_rope_utils",
    "modeling_utils",
    "models.auto",
    "processing_utils",
    "quantizers",
    "quantizers.auto",
    "utils",
    "utils.generic",
    "utils.output_capturing",
    "utils.quantization_config",
)


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def _load() -> tuple[str | None, bool, Exception | None]:
    """The release, whether it is newer than the tested ones, and what keeps it from being used."""
    release = None
    try:
        import transformers
        from packaging.version import Version

        release = transformers.__version__
        if Version(release).release < _numbers(OLDEST_TRANSFORMERS):
            raise ImportError(f"transformers: got {release}, want {OLDEST_TRANSFORMERS} or newer", name="transformers")
        for name in NEEDED:
            import_module(f"transformers.{name}")
    except Exception as error:  # of transformers or of any package that it imports
        return release, False, error
    return release, Version(release).release[:2] > _numbers(NEWEST_TRANSFORMERS), None


release, is_untested, error = _load()
if is_untested:
    major, minor = _numbers(NEWEST_TRANSFORMERS)
    tested = f"{OLDEST_TRANSFORMERS} to {NEWEST_TRANSFORMERS}, which diffqkv was tested with"
    what_to_do = f"if a model fails, pip install 'transformers<{major}.{minor + 1}' and report it; the ops do without"
    warnings.warn(f"transformers: got {release}, want {tested}: {what_to_do}", stacklevel=2)


def why_not() -> str:
    """What `error` says, for a message."""
    return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
