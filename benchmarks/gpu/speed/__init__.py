"""How fast each op is beside its peers, one module per op: its lines, their TARGETS, and what measures them.

That is a function called as the op, which takes the context and what the probes reached. The targets are for an H200;
records of others are those published for these shapes.
"""
