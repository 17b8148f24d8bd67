"""Two runs side by side: by how much each variant's time changed, and whether that is more than chance.

For each row and variant the ratio of medians, with a 95 % confidence interval (percentile bootstrap, fixed seed), and a two-sided
Mann–Whitney test of the raw samples: exact where no samples tie, else the normal approximation with corrections for ties and continuity.
The p-values of all comparisons are corrected by Holm's step-down method, so the chance of even one false alarm stays below 5 %.

The samples of a run know nothing of what differs from run to run (clocks, temperature, neighbours), so a change also has to exceed a
margin: 1 %, or more where the machine itself moved by more. That is seen in what we did not write: the ceilings, which are measured twice
in each run, and the peers, whose median change is common to all.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pytransformer.benchmarks.harness.record import Result, entries, key_of
from pytransformer.benchmarks.harness.rows import is_ours

ALPHA = 0.05
MARGIN = 0.01
BOOTSTRAPS = 1000
# Rows with peers that it takes to say that the machine changed.
FEWEST_PEERS = 5
# Beyond this many samples on a side the normal approximation is as good as the exact distribution.
MOST_EXACT = 60
FASTER, SLOWER, SAME = "faster", "slower", "no difference"


@dataclass(frozen=True)
class Comparison:
    """One variant of one row in two runs.

    Attributes:
        before, after: medians, in ``unit``.
        ratio, low, high: of after to before, with its 95 % confidence interval.
        p: corrected for the number of comparisons.
        verdict: "faster", "slower" or "no difference".
        change: by how much the time (of a rate: its inverse) grew, 0.05 = 5 % slower.
    """

    op: str
    shape: str
    variant: str
    unit: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    p: float
    verdict: str
    change: float


@dataclass(frozen=True)
class Report:
    """All comparisons, and the rows or variants that only one of the runs has.

    Attributes:
        margin: smallest change that counts.
        drift: by how much the machine moved, as far as ceilings and peers tell.
        too_few_samples: even runs that do not overlap at all would not differ significantly.
    """

    comparisons: list[Comparison]
    only_before: list[str]
    only_after: list[str]
    margin: float
    drift: float = 0.0
    too_few_samples: bool = False

    def regressions(self, percent: float) -> list[Comparison]:
        """Variants of ours that became slower, beyond chance, by more than this."""
        return [
            found
            for found in self.comparisons
            if found.verdict == SLOWER and is_ours(found.variant) and 100 * found.change > percent
        ]


def compare(before: Result, after: Result, *, force: bool = False, margin: float | None = None) -> Report:
    """Compares two records.

    Args:
        force: also records of different devices or grids.
        margin: smallest relative change that counts (default: 1 %, or what the ceilings and the peers changed by).

    Raises:
        ValueError: the records are of different schemas, or, without ``force``, of different devices or tiny and real grids.
    """
    _check_comparable(before, after, force)
    first, second = dict(_series(before)), dict(_series(after))
    shared = [key for key in first if key in second]
    peers = [_ratio(first[key], second[key]) for key in shared if not is_ours(key[2])]
    drift = max(_ceilings_change(before, after), _common_change(peers))
    margin = max(MARGIN, drift) if margin is None else margin
    p_values = holm([mann_whitney(first[key].samples, second[key].samples) for key in shared])
    return Report(
        [_comparison(first[key], second[key], p, margin) for key, p in zip(shared, p_values)],
        [" ".join(key) for key in first if key not in second],
        [" ".join(key) for key in second if key not in first],
        margin,
        drift,
        bool(shared) and all(_least_p(first[key], second[key]) * len(shared) >= ALPHA for key in shared),
    )


def _ceilings_change(before: Result, after: Result) -> float:
    """Largest relative change of a ceiling within either run, or from one to the other."""
    changes = [float(content.get("ceilings_drift", 0.0)) for content in (before, after)]
    if "ceilings" in before and "ceilings" in after:
        changes += [abs(after["ceilings"][name] / value - 1) for name, value in before["ceilings"].items()]
    return max(changes)


def _common_change(ratios: Sequence[float]) -> float:
    """By how much the peers changed together; a few of them are no evidence."""
    return abs(statistics.median(ratios) - 1) if len(ratios) >= FEWEST_PEERS else 0.0


def _ratio(before: _Series, after: _Series) -> float:
    """Of medians, as a time: above 1 is slower."""
    ratio = statistics.median(after.samples) / statistics.median(before.samples)
    return 1 / ratio if before.higher_is_better else ratio


def _least_p(before: _Series, after: _Series) -> float:
    """The p-value of samples that do not overlap."""
    return 2 / math.comb(len(before.samples) + len(after.samples), len(before.samples))


def _check_comparable(before: Result, after: Result, force: bool) -> None:
    if before.get("schema") != after.get("schema"):
        raise ValueError(f"the files have schemas {before.get('schema')} and {after.get('schema')}")
    pairs: list[tuple[str, str, str]] = [("device", before["environment"]["device"], after["environment"]["device"])]
    one, other = ("tiny" if content["options"]["grid"] == "tiny" else "real" for content in (before, after))
    pairs.append(("sizes", one, other))
    for name, one, other in pairs:
        if one != other and not force:
            raise ValueError(
                f"the files are of different {name}: {one} and {other}; --force compares them all the same"
            )


@dataclass(frozen=True)
class _Series:
    op: str
    shape: str
    variant: str
    unit: str
    higher_is_better: bool
    samples: list[float]


def _series(content: Result) -> Iterator[tuple[tuple[str, str, str], _Series]]:
    for row in entries(content):
        for variant, figures in row["variants"].items():
            series = _Series(
                row["op"],
                row["shape"],
                variant,
                row.get("unit", "s"),
                bool(row.get("higher_is_better")),
                [float(sample) for sample in figures["samples"]],
            )
            yield (row["op"], row["shape"], variant), series


def _comparison(before: _Series, after: _Series, p: float, margin: float) -> Comparison:
    ratio = statistics.median(after.samples) / statistics.median(before.samples)
    low, high = bootstrap_interval(before.samples, after.samples, key_of(before.op, before.shape) + before.variant)
    change = _ratio(before, after) - 1
    differs = p < ALPHA and abs(change) > margin
    verdict = SAME if not differs else (SLOWER if change > 0 else FASTER)
    return Comparison(
        before.op,
        before.shape,
        before.variant,
        before.unit,
        statistics.median(before.samples),
        statistics.median(after.samples),
        ratio,
        low,
        high,
        p,
        verdict,
        change,
    )


def bootstrap_interval(before: Sequence[float], after: Sequence[float], seed: str) -> tuple[float, float]:
    """95 % percentile interval of the ratio of medians, after to before."""
    draw = random.Random(seed)
    ratios = sorted(
        statistics.median(draw.choices(after, k=len(after))) / statistics.median(draw.choices(before, k=len(before)))
        for _ in range(BOOTSTRAPS)
    )
    return ratios[round(0.025 * (BOOTSTRAPS - 1))], ratios[round(0.975 * (BOOTSTRAPS - 1))]


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value of the Mann–Whitney U test.

    Mann and Whitney, "On a test of whether one of two random variables is stochastically larger than the other", 1947; the exact
    distribution by their recurrence, the corrections for ties and continuity as in Hollander and Wolfe.
    """
    n, m = len(first), len(second)
    pooled = sorted([*first, *second])
    counts = Counter(pooled)
    ranks: dict[float, float] = {}
    place = 0
    for value in sorted(counts):
        ranks[value] = place + (counts[value] + 1) / 2
        place += counts[value]
    u = sum(ranks[value] for value in first) - n * (n + 1) / 2
    u = min(u, n * m - u)
    if len(counts) == n + m and max(n, m) <= MOST_EXACT:
        ways = _ways(min(n, m), max(n, m))
        return min(1.0, 2 * sum(ways[: int(u) + 1]) / sum(ways))
    ties = sum(count**3 - count for count in counts.values())
    variance = n * m / 12 * ((n + m + 1) - ties / ((n + m) * (n + m - 1)))
    if variance <= 0:
        return 1.0
    z = max(0.0, n * m / 2 - u - 0.5) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))


@functools.lru_cache(maxsize=64)
def _ways(n: int, m: int) -> list[int]:
    """How many of the orders of n and m samples have each value of U: the coefficients of the Gaussian binomial (n + m over n)."""
    ways = [1]
    for k in range(1, n + 1):
        # times (1 − x^(m+k)), divided by (1 − x^k)
        grown = ways + [0] * m
        product = [
            value - (grown[index - m - k] if index >= m + k else 0) for index, value in enumerate(grown + [0] * k)
        ]
        quotient = [0] * len(grown)
        for index in range(len(grown)):
            quotient[index] = product[index] + (quotient[index - k] if index >= k else 0)
        ways = quotient
    return ways


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction ("A simple sequentially rejective multiple test procedure", 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
