"""Training of a model: ranks, optimizer, steps, metrics, checkpoints."""
