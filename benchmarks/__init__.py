"""Speed against the limit of the hardware and against other implementations, in one run. See docs/benchmarks.md."""
