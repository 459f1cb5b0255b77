"""Training: the step, its optimiser, the mesh, checkpoints."""
