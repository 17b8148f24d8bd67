"""Every row of every suite, at tiny sizes, all variants that a CPU has: each right, none failing."""

import warnings

import pytest
import torch

from pytransformer.benchmarks.harness import schema
from pytransformer.benchmarks.harness.roofline import Ceilings
from pytransformer.benchmarks.harness.rows import Options, Row, run_measurement, run_row
from pytransformer.benchmarks.harness.timing import Sampling, side_stream
from pytransformer.benchmarks.suites.grid import SUITES, rows
from tests.benchmarks.samples import record_of

CEILINGS = Ceilings(copy=1e11, read=1e11, matmul=1e12)
ONCE = Options(Sampling(1, 1))


# Two wheels and an installation; tests/test_cuda_build.py makes and installs them as well.
SLOW = {"install": pytest.mark.slow}


@pytest.mark.parametrize("suite", [pytest.param(suite, marks=SLOW.get(suite, ())) for suite in SUITES])
def test_every_row_runs_and_is_right(suite, device):
    results, measurements = [], []
    with side_stream(device), warnings.catch_warnings():
        # Options that no fused backend of a CPU serves fall to the reference, which says so.
        warnings.filterwarnings("ignore", message=".*no fused backend serves this call", category=RuntimeWarning)
        for row in rows(device, tiny=True, suites=(suite,), peers=True):
            if isinstance(row, Row):
                results.append(run_row(row, device, CEILINGS, ONCE))
            else:
                measurements.append(run_measurement(row, device, ONCE))
    found = [*results, *measurements]
    assert found
    assert len({(result["op"], result["shape"]) for result in found}) == len(found), "two rows of one name"
    assert {f"{result['op']} {result['shape']}": result["failed"] for result in found if result["failed"]} == {}
    assert all(result["variants"] or result["absent"] for result in found)
    schema.validate(record_of(results, measurements))


def test_quick_rows_are_rows_of_the_full_grid():
    """So that a full run goes on where a quick one ended."""
    device = torch.device("cpu")
    quick = [(row.op, row.shape) for row in rows(device, quick=True)]
    full = [(row.op, row.shape) for row in rows(device)]
    assert len(set(full)) == len(full)
    assert quick
    assert set(quick) <= set(full)
    assert full[: len(quick)] == quick, "the quick grid comes first"
    assert all(row.priority == 0 for row in rows(device, quick=True))
