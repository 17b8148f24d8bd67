"""The generator of covering arrays does what it says."""

from __future__ import annotations

import itertools

import pytest

from tests.combinations.pairwise import Impossible, all_pairs, covering_array, impossible_pairs, pairs_of

FACTORS = {name: tuple(levels) for name, levels in {"a": "01", "b": "012", "c": "0123", "d": "01", "e": "01"}.items()}


def executed(rows, factors=FACTORS):
    return set().union(*(pairs_of(row, factors) for row in rows))


def test_every_pair_is_in_some_row():
    rows = covering_array(FACTORS)
    assert executed(rows) == set(all_pairs(FACTORS))
    assert all(row.keys() == FACTORS.keys() for row in rows)
    assert 12 <= len(rows) <= 16  # at least 3 × 4; all combinations would be 96


def test_the_number_of_pairs():
    sizes = [len(levels) for levels in FACTORS.values()]
    assert len(all_pairs(FACTORS)) == sum(one * other for one, other in itertools.combinations(sizes, 2))


def test_the_same_rows_each_time_and_others_for_another_seed():
    assert covering_array(FACTORS, seed=3) == covering_array(FACTORS, seed=3)
    assert covering_array(FACTORS, seed=3) != covering_array(FACTORS, seed=4)


def test_a_rule_of_two_factors_excludes_its_pairs_and_no_others():
    rule = Impossible({"a": ("1",), "c": ("2", "3")}, "for the test")
    rows = covering_array(FACTORS, [rule])
    excluded = {(("a", "1"), ("c", "2")), (("a", "1"), ("c", "3"))}
    assert impossible_pairs(FACTORS, [rule]) == dict.fromkeys(excluded, "for the test")
    assert executed(rows) == set(all_pairs(FACTORS)) - excluded


def test_a_rule_of_three_factors_excludes_rows_and_no_pair():
    rule = Impossible({"a": ("1",), "b": ("2",), "c": ("1", "2", "3")}, "for the test")
    rows = covering_array(FACTORS, [rule])
    assert not any(rule.matches(row) for row in rows)
    assert impossible_pairs(FACTORS, [rule]) == {}
    assert executed(rows) == set(all_pairs(FACTORS))


def test_a_pair_that_only_larger_rules_exclude_is_not_dropped_silently():
    rule = Impossible({"a": ("1",), "b": ("2",), "c": ("0", "1", "2", "3")}, "for the test")
    with pytest.raises(ValueError, match="no possible row has the pair"):
        covering_array(FACTORS, [rule])
