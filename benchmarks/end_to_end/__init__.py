"""Whole models: a training step and decoding, ours and others', in tokens per second."""
