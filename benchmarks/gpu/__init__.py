"""What `device_check.py` runs on a GPU, or as a dry run on the CPU.

`calls` has the inputs of every op and `speed` its lines of the benchmark, one module per op. `checks` and `sanitizer`
say whether an op is right; `device` describes the GPU and its limits. `jobs` and `worker` run all of them in processes
of their own, each with a `context`; `report` writes down what they find.
"""
