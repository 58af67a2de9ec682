__version__ = "0.1.0"
# The minor releases that the models and the cache are tested with; as in pyproject.toml.
OLDEST_TRANSFORMERS = "5.13"
NEWEST_TRANSFORMERS = "5.24"
