"""The commands of `python -m diffqkv`, a module each."""
