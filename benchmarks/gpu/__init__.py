"""What `device_check.py` runs on a GPU, or as a dry run on the CPU.

`calls` has the inputs of every op; `checks` and `sanitizer` say whether it is right, `speed` how fast it is; `device`
describes the GPU and its limits. `jobs` and `worker` run all of them in processes of their own, each with a `context`;
`report` writes down what they find.
"""
