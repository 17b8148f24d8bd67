"""How many draws a comparison of rounding errors takes."""

from __future__ import annotations

from collections.abc import Callable

from pytransformer.verification import SEEDS, Contract


def pool(contract: Contract, add: Callable[[int], None], least: int | None = None, most: int = SEEDS) -> Contract:
    """Adds draws 0, 1, … by ``add(draw)`` until the contract holds: ``least`` of them, and in doubt ``most``; without a ``least``
    ``most`` in any case. Returns the contract.

    The errors of one backward pass hang together, as one early rounding goes through all that follows. So the largest of a few
    draws says little about a ratio, and what passes with one library of matrix products fails with another. A fault exceeds the
    contract with every draw.
    """
    for draw in range(most):
        if least is not None and draw >= least and not contract.failures():
            break
        add(draw)
    return contract
