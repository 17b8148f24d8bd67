"""The rows as pytest-benchmark suites: `pytest benchmarks/pytest_suites [--grid tiny|quick|full] [--suite NAME] [--peers]`.

One test for each row and variant, so that a person can choose with -k and keep histories with --benchmark-autosave. Calls are timed one by
one from the host; the figures that count come from `pytransformer bench`, which interleaves, captures and rotates. On a CPU the rows are
tiny: a smoke run.
"""

from __future__ import annotations

from typing import Any

import pytest

from pytransformer.benchmarks.harness.rows import UNAVAILABLE, Measurement, Row, relative_error
from pytransformer.benchmarks.harness.timing import device_here, side_stream, wait
from pytransformer.benchmarks.suites.grid import SUITES, rows

DEVICE = device_here()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    grid = config.getoption("--grid") or ("quick" if DEVICE.type == "cuda" else "tiny")
    if grid != "tiny" and DEVICE.type == "cpu":
        raise pytest.UsageError("--grid quick and full need a GPU")
    suites = config.getoption("--suite") or list(SUITES)
    unknown = [name for name in suites if name not in SUITES]
    if unknown:
        raise pytest.UsageError(f"--suite must be one of {', '.join(SUITES)}, got {unknown[0]!r}")
    wanted = Row if metafunc.function is test_row else Measurement
    cases = [
        pytest.param(row, variant, id=f"{suite}-{row.op}-{row.shape}-{variant}".replace(" ", "_"))
        for suite in suites
        for row in rows(
            DEVICE, tiny=grid == "tiny", suites=(suite,), peers=config.getoption("--peers"), quick=grid == "quick"
        )
        if isinstance(row, wanted)
        for variant in row.variants
    ]
    metafunc.parametrize(("row", "variant"), cases)


def test_row(benchmark: Any, row: Row, variant: str) -> None:
    call = row.variants[variant]

    def once() -> Any:
        result = call(inputs)
        wait(DEVICE)
        return result

    with side_stream(DEVICE):
        inputs = row.inputs(DEVICE, 0)
        golden = row.golden(inputs)
        try:
            # A fast wrong kernel is not a result.
            assert relative_error(row.pick(once()), golden) <= row.largest_error
        except UNAVAILABLE as reason:
            pytest.skip(str(reason))
        benchmark.pedantic(once, rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(op=row.op, shape=row.shape, variant=variant, bytes=row.moved_bytes, flop=row.flop)


def test_measurement(benchmark: Any, row: Measurement, variant: str) -> None:
    try:
        with side_stream(DEVICE):
            found = benchmark.pedantic(row.variants[variant], args=(DEVICE,), rounds=1)
    except UNAVAILABLE as reason:
        pytest.skip(str(reason))
    assert found["samples"]
    benchmark.extra_info.update(op=row.op, shape=row.shape, variant=variant, unit=row.unit, samples=found["samples"])
