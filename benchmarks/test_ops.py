"""Smoke run of every benchmark row with pytest-benchmark, at sizes for a CPU (`make bench`); on a GPU the same rows, eagerly timed."""

from __future__ import annotations

import pytest
import torch

from pytransformer.benchmarks.grid import SUITES, rows
from pytransformer.benchmarks.rows import relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    pytest.param(row, variant, id=f"{row.op}-{row.shape}-{variant}".replace(" ", "_"))
    for suite in SUITES
    for row in rows(DEVICE, tiny=True, suites=(suite,))
    for variant in row.variants
]


@pytest.mark.parametrize(("row", "variant"), CASES)
def test_row(benchmark, row, variant):
    inputs = row.inputs(DEVICE, 0)
    golden = row.golden(inputs)
    call = row.variants[variant]
    result = benchmark.pedantic(call, args=(inputs,), rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(op=row.op, shape=row.shape, variant=variant, bytes=row.moved_bytes, flop=row.flop)
    # A fast wrong kernel is not a result: bfloat16 keeps 8 bits, and each variant rounds at most a few times.
    assert relative_error(row.pick(result), golden) < 4 * torch.finfo(torch.bfloat16).eps
