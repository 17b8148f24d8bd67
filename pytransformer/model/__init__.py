"""The model: one configuration, one set of blocks, checkpoints."""
