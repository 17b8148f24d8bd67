"""Where the checkout and its committed results are."""

from __future__ import annotations

from pathlib import Path

# Of an installed package: the folder of the package, which has neither sources to install nor results.
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
