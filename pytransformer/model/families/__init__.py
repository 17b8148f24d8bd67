"""Public families of checkpoints (Hugging Face layout): one declarative, reversible mapping each."""
