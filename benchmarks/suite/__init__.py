"""The benchmarks behind `python -m diffqkv bench`; see `cli` for the options and `cases` for what is measured."""
