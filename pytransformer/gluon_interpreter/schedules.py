"""In which order tasks run and when asynchronous work happens: each schedule is one that a GPU may take."""

from __future__ import annotations

import dataclasses
import random
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One way to run a program; the same schedule runs it the same way again.

    Attributes:
        order: who runs after each step: the ``next`` task, always the ``first`` or the ``last`` of those that can run (partitions are
            numbered as in ``warp_specialize``), the one that runs already (``same``) until it waits, or a ``random`` one.
        copies: a copy is done when it is issued (``early``), as late as anybody can tell (``late``, oldest first; ``latest``, newest
            first), or at a ``random`` moment.
        products: a product reads its operands and writes its accumulator when it is issued (``early``), when its wait returns
            (``late``), or at a ``random`` one of these.
        seed: of what is random.
    """

    order: Literal["next", "first", "last", "same", "random"] = "next"
    copies: Literal["early", "late", "latest", "random"] = "early"
    products: Literal["early", "late", "random"] = "early"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("order", ("next", "first", "last", "same", "random")),
            ("copies", ("early", "late", "latest", "random")),
            ("products", ("early", "late", "random")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def generator(self, program: tuple[int, int, int]) -> random.Random:
        """The source of this schedule's random choices in one program."""
        return random.Random(f"{self.seed} {program}")


EARLY = Schedule()
LATE = Schedule(order="next", copies="late", products="late")
SCHEDULES = (
    EARLY,
    LATE,
    Schedule(order="first", copies="late", products="early"),
    Schedule(order="last", copies="early", products="late"),
    Schedule(order="same", copies="latest", products="late"),
    Schedule(order="random", copies="random", products="random", seed=1),
)
