"""Everything around the model: ranks, optimizer, steps, metrics, checkpoints."""
