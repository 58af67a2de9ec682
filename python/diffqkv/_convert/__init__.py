"""What `diffqkv.convert` is made of."""
