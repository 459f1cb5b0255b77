"""What a training step will need on accelerators that need not be there: memory, network, time."""
