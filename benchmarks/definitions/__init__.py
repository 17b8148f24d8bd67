"""What suites and peers have in common: the cases of each op with their work, and the plain formulas."""
