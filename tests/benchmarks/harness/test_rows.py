"""Rows: what they say, and what becomes of variants that are absent, wrong or failing."""

import math

import pytest
import torch

from pytransformer.benchmarks.harness import tables
from pytransformer.benchmarks.harness.roofline import Ceilings
from pytransformer.benchmarks.harness.rows import (
    Absent,
    Measurement,
    Options,
    Row,
    is_ours,
    relative_error,
    run_measurement,
    run_row,
    tensor_bytes,
)
from pytransformer.benchmarks.harness.timing import Sampling, side_stream
from pytransformer.benchmarks.harness.worker import faults
from tests.benchmarks.samples import doubling

CEILINGS = Ceilings(copy=1e11, read=1e11, matmul=1e12)
FEW = Options(Sampling(2, 2))


def run(row, device, options=FEW):
    with side_stream(device):
        return (
            run_row(row, device, CEILINGS, options) if isinstance(row, Row) else run_measurement(row, device, options)
        )


def test_a_row_says_everything(device):
    result = run(doubling(), device)
    figures = result["variants"]["torch"]
    assert figures["seconds_p10"] <= figures["seconds"] <= figures["seconds_p90"]
    assert figures["fraction_of_floor"] == pytest.approx(result["floor_seconds"] / figures["seconds"])
    assert figures["tflops"] == pytest.approx(8e-12 / figures["seconds"])
    assert len(figures["samples"]) == figures["rounds"] == 2
    assert figures["relative_error"] == 0
    assert ("peak_memory_bytes" in figures) == (device.type == "cuda")
    assert result["l2"] == ("cold" if device.type == "cuda" else "uncontrolled") or result["input_sets"] == 64


@pytest.mark.parametrize(
    ("error", "section", "reason"),
    [
        (RuntimeError("not so\nsecond line"), "failed", "RuntimeError: not so"),
        (torch.OutOfMemoryError("20 GiB"), "failed", "out of memory: 20 GiB"),
        (NotImplementedError("no window"), "absent", "NotImplementedError: no window"),
        (
            ModuleNotFoundError("No module named 'liger_kernel'"),
            "absent",
            "ModuleNotFoundError: No module named 'liger_kernel'",
        ),
        (Absent("flash-attn is not installed"), "absent", "flash-attn is not installed"),
    ],
)
def test_a_variant_that_raises_is_reported_and_the_others_go_on(device, error, section, reason):
    def refuses(inputs):
        raise error

    result = run(doubling(peer=refuses, triton=refuses), device)
    assert result[section] == {"peer": reason, "triton": reason}
    assert set(result["variants"]) == {"torch"}
    assert faults(result) == ([f"triton: {reason}"] if section == "failed" else []), "a peer's failure is not ours"


def test_a_wrong_variant_is_not_timed(device):
    result = run(doubling(peer=lambda inputs: inputs["x"] * 3), device)
    assert set(result["variants"]) == {"torch"}
    assert result["failed"]["peer"].startswith("wrong result: relative error 0.5 against float64")


def test_a_variant_that_took_a_process_down_is_not_run_again(device):
    def never(inputs):
        raise AssertionError("it must not run")

    result = run(doubling(peer=never), device, Options(Sampling(1, 1), skip={"peer": "the process died"}))
    assert result["failed"] == {"peer": "the process died"}


def test_a_measurement_has_its_own_unit(device):
    def absent(on):
        raise Absent("not here")

    def fails(on):
        raise ValueError("not so")

    variants = {"torch": lambda on: {"samples": [3.0, 1.0, 2.0], "mfu": 0.4}, "peer": absent, "other": fails}
    result = run(Measurement("training", "GPT-2", "tokens/s", variants, higher_is_better=True), device)
    assert result["variants"]["torch"] == {
        "value": 2.0,
        "p10": 1.0,
        "p90": 3.0,
        "samples": [3.0, 1.0, 2.0],
        "details": {"mfu": 0.4},
    }
    assert (result["absent"], result["failed"]) == ({"peer": "not here"}, {"other": "ValueError: not so"})


def test_relative_error():
    golden = torch.randn(100, dtype=torch.float64)
    assert relative_error(golden.clone(), golden) == 0
    assert relative_error(golden * 1.1, golden) == pytest.approx(0.1)
    assert relative_error(golden * float("nan"), golden) == math.inf


def test_bytes_of_inputs_count_each_storage_once():
    x = torch.zeros(10, dtype=torch.float32)
    assert tensor_bytes({"x": x, "view": x[2:], "more": [torch.zeros(4, dtype=torch.int64)], "name": "text"}) == 72


def test_names_say_what_is_ours():
    assert is_ours("cuda") and is_ours("triton deterministic")
    assert not is_ours("torch_compile") and not is_ours("sdpa_flash")


def test_the_best_peer_is_the_fastest():
    from tests.benchmarks.samples import row

    found = row("op", "shape", 1.0, 1.0, {"triton": [2.0], "slow": [3.0], "torch_compile": [4.0]})
    assert tables.best_peer(found) == ("slow", 3.0)
    assert tables.speedup(found, "triton") == 1.5
