"""`diffqkv.Cache`, its layers, and what the models ask of the caches of transformers."""

from .cache import Cache, check_cache
from .layers import CacheLayer
from .shapes import CacheShape, cache_shapes
from .stock import reserve_static_cache

__all__ = ["Cache", "CacheLayer", "CacheShape", "cache_shapes", "check_cache", "reserve_static_cache"]
