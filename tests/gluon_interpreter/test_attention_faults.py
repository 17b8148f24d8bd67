"""The forward pass with one statement of its protocol removed or made wrong: each is reported by any schedule, none hangs."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pytransformer.gluon_interpreter import Schedule
from pytransformer.triton_interpreter import KernelFault
from tests.gluon_interpreter import attention_forward

SOURCE = Path(attention_forward.__file__).read_text()
SCHEDULES = (Schedule(order="first"), Schedule(order="last", copies="late", products="late"))

# What is searched, and what is put in its place; the statement's indentation is kept.
_REMOVED = r"mbarrier\.(?:wait|arrive|expect|init)\(.*\)|tma\.(?:async_load|store_wait)\(.*\)|fence_async_shared\(\)"
_CHANGED = (
    (r"warpgroup_mma_wait\(0,", "warpgroup_mma_wait(1,", "one product too many under way"),
    (r"warpgroup_mma_wait\(1,", "warpgroup_mma_wait(2,", "one product too many under way"),
    (r"count=2\)", "count=1)", "one arrival too few"),
    (r"count=1\)(?=\n +mbarrier\.init)", "count=2)", "one arrival too many"),
    (r"\(\(i // 2\) & 1\) \^ 1", "(i // 2) & 1", "other parity"),
    (r"\(i // 2\) & 1\)", "((i // 2) & 1) ^ 1)", "other parity"),
    (r"\(\(i - 1\) // 2\) & 1\)", "(((i - 1) // 2) & 1) ^ 1)", "other parity"),
    (r"2 \* q_desc\.nbytes_per_cta", "q_desc.nbytes_per_cta", "half of the bytes"),
    (r"v_full\.index\(stage\), v\.index\(stage\)\)", "v_full.index(stage), v.index(1 - stage))", "other stage"),
    (
        r"stage = i % 2\n        mbarrier\.wait\(k_full",
        "stage = (i + 1) % 2\n        mbarrier.wait(k_full",
        "other stage",
    ),
)


def _faults() -> Iterator[tuple[str, str]]:
    """(name, source) of every broken kernel."""
    for found in re.finditer(rf"^ +(?P<statement>{_REMOVED})$", SOURCE, re.MULTILINE):
        begin, end = found.span("statement")
        yield _name("without", found.group("statement"), begin), f"{SOURCE[:begin]}pass{SOURCE[end:]}"
    for pattern, replacement, what in _CHANGED:
        for found in re.finditer(pattern, SOURCE):
            broken = SOURCE[: found.start()] + replacement + SOURCE[found.end() :]
            yield _name(what, found.group().split("\n")[0], found.start()), broken


def _name(what: str, statement: str, position: int) -> str:
    return f"line {SOURCE.count(chr(10), 0, position) + 1}: {what} {statement}"


FAULTS = dict(_faults())


def test_there_are_enough_of_them() -> None:
    assert len(FAULTS) >= 25


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_protocol_is_reported(name: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(FAULTS[name])
    spec = importlib.util.spec_from_file_location("broken", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    q, k, v = (torch.randn(1, 640, 64).to(torch.bfloat16) for _ in range(3))
    for schedule in SCHEDULES:
        with pytest.raises(KernelFault, match=r"broken\.py:\d+ in "):
            attention_forward.run(q[:, -128:], k, v, False, 128, schedule, module.attention)
