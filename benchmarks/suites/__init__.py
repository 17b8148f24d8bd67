"""One module for each op: its shapes, work, inputs, variants and float64 check."""
