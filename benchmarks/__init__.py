"""Speed against the limit of the hardware and against other implementations, in one run. See docs/benchmarks.md.

The folder lies beside the package and is imported as ``pytransformer.benchmarks``, so that an installed package can run it.
"""
