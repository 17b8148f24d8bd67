"""Every kernel and case that the gate's lists name is there: what was renamed would else be judged by nothing, in silence."""

from __future__ import annotations

import re

import pytest

from tests.support import compile_gate, limits
from tests.support.compile_gate import Case
from tests.support.listed import all_kernels_of, without_match
from tools import kernel_table


@pytest.fixture(scope="module")
def all_cases() -> list[Case]:
    return list(compile_gate.all_cases())


@pytest.fixture(scope="module")
def all_kernels() -> set[str]:
    return set().union(*map(all_kernels_of, compile_gate.ops()))


def test_every_op_that_launches_has_kernels() -> None:
    assert not [op for op in compile_gate.ops() if not all_kernels_of(op)]


def test_kernels_that_are_judged_are_there(all_cases: list[Case], all_kernels: set[str]) -> None:
    """Those that stream, and those that must use the matrix instructions."""
    assert all_kernels >= limits.STREAMING
    assert all_kernels >= {kernel for case in all_cases for kernel in case.wgmma_kernels}


def test_cases_of_the_exceptions_are_there(all_cases: list[Case]) -> None:
    names = [str(case) for case in all_cases]
    assert not without_match((rf"^(?:{pattern})" for pattern in limits.KNOWN_ISSUE_BOUND), names)
    assert not without_match((f"^{re.escape(case)}$" for _, case in limits.KNOWN_COMPLAINTS), names)


def test_a_name_that_matches_nothing_is_found() -> None:
    assert without_match(["decode_split_kernel", r"decode_kernel<\w+, 128"], ["decode_kernel<a, 128>"]) == [
        "decode_split_kernel"
    ]


def test_the_table_refuses_a_kernel_without_figures() -> None:
    with pytest.raises(LookupError, match=r"no figures of .*\['missing'\]"):
        kernel_table.table({"a row": "missing"}, {"present": {}})
