"""What torch is told of the compiled ops: shapes, gradients, autocast, vmap and FLOPs."""
