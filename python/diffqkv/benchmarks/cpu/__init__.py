"""The benchmarks of a CPU: `cases` has the lines of `python -m diffqkv bench`, one module each.

What they share stands beside them: `layer` has their inputs, `limits` what the machine does at best, `targets` what
they should reach; `report` writes the run down.
"""
