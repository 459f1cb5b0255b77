"""Data: numpy in, numpy out. Nothing here imports jax."""
