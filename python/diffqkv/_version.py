__version__ = "0.1.0"
OLDEST_TRANSFORMERS = "5.13"  # that the models and the cache work with; as in pyproject.toml
