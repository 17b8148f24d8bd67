"""No root in the machine code of a norm takes a subnormal for 0: Triton's ``tl.sqrt`` and ``tl.rsqrt`` are ``…approx.ftz``.

The interpreter cannot show it: numpy's roots keep subnormals. With eps = 0 the mean square of a row near 1e-20 is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
import triton
from triton.compiler import CompiledKernel

from tests.support.compile_gate import cases
from tests.support.launch_recorder import Launch, record

# A root, or a reciprocal, that flushes.
FLUSHES = re.compile(r"\b(?:r?sqrt|rcp|div)\.[\w.]*\bftz\b[\w.]*")
ROOT = re.compile(r"\bsqrt\.rn\.f32\b")
# The narrow and the wide kernel of each norm, and the norms of q and k in the append.
CHOSEN = {
    "norm": r"forward-layer-(4096|65536)-bfloat16-inference|forward-rms-(65536-bfloat16|4096-float16)",
    "kv_append": r"decode-rope-norm-sm|float32-d64-prefill-rope-norm",
}


def _launches(op: str) -> Iterator[tuple[str, Launch]]:
    for case in cases(op, (90,)):
        if re.search(CHOSEN[op], str(case)) and "backward" not in str(case):
            for launch in record(case.call, case.arch):
                yield str(case), launch


def decided_by() -> list[str]:
    return [launch.key for op in CHOSEN for _, launch in _launches(op)]


def _compiled(op: str) -> dict[str, CompiledKernel]:
    return {
        name: triton.compile(launch.source(), target=launch.target, options=launch.options.__dict__)
        for name, launch in _launches(op)
    }


@pytest.mark.compiles
@pytest.mark.parametrize("launcher", list(CHOSEN))
def test_no_root_of_a_norm_takes_a_subnormal_for_zero(launcher: str) -> None:
    compiled = _compiled(launcher)
    assert compiled
    flushing = {name: FLUSHES.findall(kernel.asm["ptx"]) for name, kernel in compiled.items()}
    assert not {name: found for name, found in flushing.items() if found}
    assert any(ROOT.search(kernel.asm["ptx"]) for kernel in compiled.values())


def test_the_mean_square_of_a_tiny_row_is_a_subnormal() -> None:
    # What the kernels would have to flush for their results to differ from those of plain float32 code.
    square = torch.full((8,), 1e-20).square().mean()
    assert 0 < square < torch.finfo(torch.float32).tiny
