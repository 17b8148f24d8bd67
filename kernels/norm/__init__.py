"""LayerNorm and RMSNorm over rows, forward and backward."""
