"""Benchmarks: `common`, what every measurement shares, and `cpu`, the cases of `python -m diffqkv bench`.

They are a part of the package because that command must run from an installed wheel. The check on a GPU,
`benchmarks/gpu` in the repository, and the tests take their accuracy rule and inputs from `common`, too.
"""
