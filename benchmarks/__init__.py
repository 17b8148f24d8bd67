"""Speed against the limit of the hardware and against other implementations, in one run. See docs/benchmarks.md.

The folder lies beside the package and is imported as ``pytransformer.benchmarks``, so that an installed package can run it.

``programs/`` is what a person starts; ``suites/`` has the rows, ``end_to_end/`` whole models, ``peers/`` other implementations,
``definitions/`` what these have in common; ``harness/`` runs, watches, records and shows them; ``results/`` has what was measured.
"""
