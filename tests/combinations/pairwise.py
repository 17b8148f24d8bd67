"""Covering arrays: few rows, each one level of every factor, such that each possible pair of levels of two factors is in some row.

A fault of one option, or of two that meet, shows in some row; all combinations would be too many to run (Cohen et al. 1997).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Factors = Mapping[str, Sequence[str]]
Row = dict[str, str]
# Two (factor, level), in the order of the factors.
Pair = tuple[tuple[str, str], tuple[str, str]]

# Rows that are tried before the best is taken: more of them save a row or two and cost time in every test process.
CANDIDATES = 8


@dataclass(frozen=True)
class Impossible:
    """Levels that cannot meet in one call: a row is impossible if for each factor named here it has one of the levels."""

    levels: Mapping[str, Sequence[str]]
    reason: str

    def matches(self, row: Mapping[str, str]) -> bool:
        """Whether the row, which need not be complete, has them all."""
        return all(row.get(factor) in levels for factor, levels in self.levels.items())


def all_pairs(factors: Factors) -> list[Pair]:
    """Every pair of levels of two factors, possible or not."""
    return [
        ((first, level), (second, other))
        for first, second in itertools.combinations(factors, 2)
        for level in factors[first]
        for other in factors[second]
    ]


def pairs_of(row: Mapping[str, str], factors: Factors) -> set[Pair]:
    """The pairs that a row, which need not be complete, executes."""
    return set(itertools.combinations([(factor, row[factor]) for factor in factors if factor in row], 2))


def impossible_pairs(factors: Factors, rules: Iterable[Impossible]) -> dict[Pair, str]:
    """The pairs that a rule of two factors excludes, with its reason."""
    rules = list(rules)
    found = {}
    for pair in all_pairs(factors):
        for rule in rules:
            if rule.matches(dict(pair)):
                found[pair] = rule.reason
    return found


def plain(factors: Factors) -> Row:
    """The first level of every factor: a call in which nothing else is said."""
    return {factor: levels[0] for factor, levels in factors.items()}


def one_at_a_time(factors: Factors) -> list[Row]:
    """The plain row, and one for each other level of each factor, alone."""
    return [plain(factors)] + [
        {**plain(factors), factor: level} for factor, levels in factors.items() for level in levels[1:]
    ]


def label(row: Row, factors: Factors) -> str:
    """The one level in which a row of :func:`one_at_a_time` is not plain."""
    return next((f"{name}: {level}" for name, level in row.items() if level != factors[name][0]), "nothing else")


def covering_array(factors: Factors, rules: Iterable[Impossible] = (), seed: int = 0) -> list[Row]:
    """Rows that execute every pair not excluded by a rule; always the same for the same arguments.

    Args:
        factors: levels of each factor, by name.
        rules: what cannot meet. A rule of three factors excludes no pair, only rows.
        seed: of the order in which levels are tried.

    Raises:
        ValueError: a pair is in no possible row though no rule of two factors excludes it.
    """
    rules = list(rules)
    generator = random.Random(seed)
    excluded = impossible_pairs(factors, rules)
    missing = dict.fromkeys(pair for pair in all_pairs(factors) if pair not in excluded)
    rows = []
    while missing:
        first = next(iter(missing))
        candidates = [_candidate(first, factors, rules, missing, generator) for _ in range(CANDIDATES)]
        found = [row for row in candidates if row is not None]
        if not found:
            raise ValueError(f"no possible row has the pair {first}: exclude it by a rule of these two factors")
        best = max(found, key=lambda row: len(pairs_of(row, factors) & missing.keys()))
        for pair in pairs_of(best, factors):
            missing.pop(pair, None)
        rows.append({factor: best[factor] for factor in factors})
    return rows


def _candidate(
    pair: Pair, factors: Factors, rules: Sequence[Impossible], missing: Mapping[Pair, None], generator: random.Random
) -> Row | None:
    """A row with ``pair``; the other factors, in random order, take the level that adds most missing pairs. None: a dead end."""
    row = dict(pair)
    position = {factor: place for place, factor in enumerate(factors)}
    for factor in sorted((name for name in factors if name not in row), key=lambda name: generator.random()):
        best, best_gain = None, -1.0
        for level in factors[factor]:
            if any(rule.matches({**row, factor: level}) for rule in rules if factor in rule.levels):
                continue
            here = (factor, level)
            gain = generator.random() / 2  # decides between equals
            for other in row.items():
                gain += ((other, here) if position[other[0]] < position[factor] else (here, other)) in missing
            if gain > best_gain:
                best, best_gain = level, gain
        if best is None:
            return None
        row[factor] = best
    return row
