"""Random calls of every op, each made by one number, against an oracle in float64 with code of its own.

`python -m fuzz --op decode_attention --seed 7` repeats one call; `make fuzz` runs new ones until its time is over.
"""
