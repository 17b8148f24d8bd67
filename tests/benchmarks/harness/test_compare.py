"""Comparing runs: the statistics against their definitions, verdicts against what was put in."""

import itertools
import random
import statistics

import pytest

from pytransformer.benchmarks.harness.compare import (
    FASTER,
    SAME,
    SLOWER,
    bootstrap_interval,
    compare,
    holm,
    mann_whitney,
)
from tests.benchmarks.samples import attention_row, measurement, record_of, row


def brute_force(first, second):
    """The share of all ways to deal the pooled samples whose U is as far from its mean, or farther."""
    pooled = [*first, *second]

    def distance(chosen):
        rest = [value for index, value in enumerate(pooled) if index not in chosen]
        mine = [pooled[index] for index in chosen]
        u = sum((a > b) + 0.5 * (a == b) for a in mine for b in rest)
        return abs(u - len(mine) * len(rest) / 2)

    actual = distance(tuple(range(len(first))))
    deals = list(itertools.combinations(range(len(pooled)), len(first)))
    return sum(distance(deal) >= actual for deal in deals) / len(deals)


@pytest.mark.parametrize(("n", "m"), [(3, 3), (5, 5), (4, 7), (7, 4), (1, 6)])
def test_mann_whitney_is_exact_without_ties(n, m):
    draw = random.Random(n * 100 + m)
    for shift in (0.0, 0.5, 5.0):
        first = [draw.gauss(0, 1) for _ in range(n)]
        second = [draw.gauss(shift, 1) for _ in range(m)]
        assert mann_whitney(first, second) == pytest.approx(brute_force(first, second))


def test_mann_whitney_of_a_textbook_table():
    """n = m = 5 and no overlap: 2 of 252 orders. n = m = 10, U = 23: the tabled 5 % bound; U = 24 is beyond it."""
    assert mann_whitney([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)
    ordered = [float(value) for value in range(20)]

    def at(u):
        """Ten of twenty ranks with this U: the lowest ten, then the highest of them moved up."""
        ranks = list(range(10))
        for index in range(9, -1, -1):
            step = min(10, u - (sum(ranks) - 45))
            ranks[index] += step
        chosen = set(ranks)
        return [ordered[rank] for rank in ranks], [value for rank, value in enumerate(ordered) if rank not in chosen]

    assert mann_whitney(*at(23)) == pytest.approx(0.0433, abs=1e-4)
    assert mann_whitney(*at(24)) == pytest.approx(0.0524, abs=1e-4)


def test_with_ties_the_approximation_is_close_to_the_exact_distribution():
    first, second = [1, 1, 2, 3, 3, 4, 5, 2], [2, 3, 4, 4, 5, 6, 6, 3]
    assert mann_whitney(first, second) == pytest.approx(brute_force(first, second), abs=0.02)
    assert mann_whitney([1.0] * 8, [1.0] * 8) == 1.0


def test_the_false_alarm_rate_is_what_it_says():
    draw = random.Random(1)
    alarms = sum(
        mann_whitney([draw.gauss(0, 1) for _ in range(11)], [draw.gauss(0, 1) for _ in range(11)]) < 0.05
        for _ in range(2000)
    )
    assert 0.03 < alarms / 2000 < 0.06


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_interval_holds_the_true_ratio():
    draw = random.Random(2)
    inside = 0
    for trial in range(100):
        before = [draw.gauss(10, 0.5) for _ in range(21)]
        after = [draw.gauss(12, 0.5) for _ in range(21)]
        low, high = bootstrap_interval(before, after, str(trial))
        assert low <= statistics.median(after) / statistics.median(before) <= high
        inside += low <= 1.2 <= high
    assert inside >= 88
    assert bootstrap_interval(before, after, "x") == bootstrap_interval(before, after, "x"), "the seed is fixed"


def verdicts(before, after, **options):
    report = compare(before, after, **options)
    return {(found.shape.split()[2], found.variant): found.verdict for found in report.comparisons}


def test_faster_slower_and_no_difference():
    before = record_of([attention_row(length, {"cuda": 600.0, "sdpa_cudnn": 500.0}) for length in (1024, 2048, 4096)])
    after = record_of(
        [
            attention_row(1024, {"cuda": 660.0, "sdpa_cudnn": 500.0}),
            attention_row(2048, {"cuda": 540.0, "sdpa_cudnn": 500.0}),
            attention_row(4096, {"cuda": 603.0, "sdpa_cudnn": 500.0}),
        ]
    )
    assert verdicts(before, after) == {
        ("L1024", "cuda"): FASTER,
        ("L2048", "cuda"): SLOWER,
        ("L4096", "cuda"): SAME,
        ("L1024", "sdpa_cudnn"): SAME,
        ("L2048", "sdpa_cudnn"): SAME,
        ("L4096", "sdpa_cudnn"): SAME,
    }
    report = compare(before, after)
    assert [(found.shape.split()[2], round(100 * found.change)) for found in report.regressions(5)] == [("L2048", 11)]
    assert report.regressions(15) == []


def test_a_peer_that_became_slower_is_no_regression_of_ours():
    before, after = (record_of([attention_row(1024, {"cuda": 600.0, "flex": speed})]) for speed in (500.0, 250.0))
    report = compare(before, after)
    assert report.regressions(5) == []
    assert [found.verdict for found in report.comparisons] == [SAME, SLOWER]


def test_a_rate_that_grows_is_faster():
    rates = [[100.0 + step for step in range(9)], [150.0 + step for step in range(9)]]
    before, after = (
        record_of([], [measurement("training", "GPT-2", "tokens/s", {"pytransformer": rate}, True)]) for rate in rates
    )
    (found,) = compare(before, after).comparisons
    assert (found.verdict, found.unit) == (FASTER, "tokens/s")
    assert found.ratio == pytest.approx(154 / 104)
    assert compare(after, before).regressions(10)[0].change == pytest.approx(154 / 104 - 1)


def test_a_change_within_the_drift_of_the_ceilings_does_not_count():
    before, after = (record_of([attention_row(1024, {"cuda": speed}, noise=1e-4)]) for speed in (600.0, 582.0))
    assert verdicts(before, after) == {("L1024", "cuda"): SLOWER}
    after["ceilings_drift"] = 0.05
    assert verdicts(before, after) == {("L1024", "cuda"): SAME}
    assert verdicts(before, after, margin=0.01) == {("L1024", "cuda"): SLOWER}


def test_a_change_that_the_peers_share_is_the_machine():
    lengths = (512, 1024, 2048, 4096, 8192)
    before = record_of([attention_row(length, {"cuda": 600.0, "flex": 400.0}) for length in lengths])
    after = record_of([attention_row(length, {"cuda": 545.0, "flex": 360.0}) for length in lengths])
    report = compare(before, after)
    assert report.drift == pytest.approx(1 / 0.9 - 1, rel=1e-3)
    assert {found.verdict for found in report.comparisons if found.variant == "cuda"} == {SAME}
    worse = record_of([attention_row(length, {"cuda": 450.0, "flex": 360.0}) for length in lengths])
    assert {found.variant for found in compare(before, worse).regressions(5)} == {"cuda"}


def test_other_ceilings_are_another_machine():
    before, after = (record_of([attention_row(1024, {"cuda": speed})]) for speed in (600.0, 560.0))
    after["ceilings"] = {name: 0.9 * value for name, value in after["ceilings"].items()}
    assert compare(before, after).drift == pytest.approx(0.1)
    assert verdicts(before, after) == {("L1024", "cuda"): SAME}


def test_two_noisy_runs_do_not_differ():
    draw = random.Random(3)
    noisy = [
        record_of(
            [
                row("op", f"shape {index} x", 1e9, 1e6, {"cuda": [draw.gauss(1e-4, 1e-5) for _ in range(11)]})
                for index in range(60)
            ]
        )
        for _ in range(2)
    ]
    assert {found.verdict for found in compare(*noisy, margin=0.0).comparisons} == {SAME}


def test_rows_of_only_one_file_are_listed():
    before = record_of([attention_row(1024, {"cuda": 600.0, "flex": 300.0})])
    after = record_of([attention_row(1024, {"cuda": 600.0}), attention_row(2048, {"cuda": 600.0})])
    report = compare(before, after)
    assert report.only_before == ["attention_forward causal B16 L1024 H32/8 d128 bf16 flex"]
    assert report.only_after == ["attention_forward causal B8 L2048 H32/8 d128 bf16 cuda"]


def test_different_devices_and_grids_are_refused():
    before = record_of([attention_row(1024, {"cuda": 600.0})])
    other = record_of([attention_row(1024, {"cuda": 600.0})], device="Another GPU")
    with pytest.raises(ValueError, match="different device: Synthetic GPU and Another GPU; --force"):
        compare(before, other)
    assert len(compare(before, other, force=True).comparisons) == 1
    tiny = record_of([attention_row(1024, {"cuda": 600.0})])
    tiny["options"]["grid"] = "tiny"
    with pytest.raises(ValueError, match="different sizes: real and tiny"):
        compare(before, tiny)
    tiny["schema"] = 1
    with pytest.raises(ValueError, match="schemas 2 and 1"):
        compare(before, tiny, force=True)
