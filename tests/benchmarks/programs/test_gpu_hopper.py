"""`make gpu-hopper` without a GPU: its kernels are right in every schedule, and a stage that hangs or fails is named and ended."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pytest
import torch

from pytransformer.benchmarks.harness.rows import Absent, relative_error
from pytransformer.benchmarks.programs import gpu_hopper, hopper_grid, hopper_stages
from pytransformer.gluon_interpreter import SCHEDULES, launch
from pytransformer.kernels.hopper import bringup
from pytransformer.verification import ContractError
from tests.conftest import INTERPRETING

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not INTERPRETING, reason="kernels are compiled for a GPU in this process")


def _steps(notes: list[dict[str, Any]]) -> list[str]:
    return [note["step"] for note in notes]


# The whole kernels have tests of their own: tests/kernels/test_hopper_forward.py and test_hopper_backward.py.
CASES = [
    (name, case)
    for name, stage in hopper_stages.STAGES.items()
    for case in list(stage.cases)[: 1 if name in ("whole", "backward") else None]
]


@interpreted
@pytest.mark.parametrize(("stage", "case"), CASES)
def test_each_stage_keeps_the_contract_in_the_interpreter(stage: str, case: str) -> None:
    notes: list[dict[str, Any]] = []
    draw = hopper_stages.STAGES[stage].cases[case]
    hopper_stages.check_case(case, draw, True, CPU, lambda step, **more: notes.append({"step": step, **more}))
    assert any(step.startswith(hopper_stages.WAITING) for step in _steps(notes))
    (ratios,) = (note["ratios"] for note in notes if "ratios" in note)
    assert ratios and max(ratios.values()) <= 1.0


def _run(kernel: Any, schedule: Any) -> list[torch.Tensor]:
    """The results of a stage's kernel on the same inputs each time."""
    size, generator = hopper_stages.TINY, torch.Generator().manual_seed(0)
    x, q, scores = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((size.programs * size.keys, size.head_dim), (size.rows, size.head_dim), (size.rows, size.keys))
    )
    given = {
        bringup.loads_kernel: ([(x, bringup.BLOCK.value)], [torch.empty_like(x)], [size.head_dim]),
        bringup.product_kernel: ([(q, 64), (x, bringup.BLOCK.value)], [torch.empty(size.rows, size.keys)], []),
        bringup.softmax_kernel: (
            [(scores, 64)],
            [torch.empty(size.rows), torch.empty(size.rows, bringup.BLOCK.value)],
            [],
        ),
    }
    boxes, results, constants = given[kernel]
    descriptors = [hopper_stages._tiles(tensor, rows).on(tensor) for tensor, rows in boxes]
    results = [result.fill_(float("nan")) for result in results]
    launch(kernel, (size.programs,), *descriptors, *results, size.tiles, *constants, schedule=schedule)
    return results


@interpreted
@pytest.mark.parametrize("name", ["loads_kernel", "product_kernel", "softmax_kernel"])
def test_the_stages_kernels_give_the_same_bits_in_every_schedule(name: str) -> None:
    kernel = getattr(bringup, name)
    first = _run(kernel, SCHEDULES[0])
    for schedule in SCHEDULES[1:]:
        for result, again in zip(first, _run(kernel, schedule)):
            assert not result.isnan().any() and torch.equal(result, again), schedule


@interpreted
def test_a_wrong_result_and_other_bits_fail_a_case() -> None:
    right = torch.ones(4)

    def draw(tiny: bool, device: torch.device) -> Any:
        return lambda: {"out": 2 * right}, lambda: {"out": right}, lambda: {"out": right.double()}

    with pytest.raises(ContractError):
        hopper_stages.check_case("wrong", draw, True, CPU, lambda step, **more: None)
    results = iter((right, right + 1))

    def changing(tiny: bool, device: torch.device) -> Any:
        return lambda: {"out": next(results)}, lambda: {"out": right}, lambda: {"out": right.double()}

    with pytest.raises(AssertionError, match="changing: launch 2 gives other bits of out"):
        hopper_stages.check_case("changing", changing, True, CPU, lambda step, **more: None)


NOTE = "import json, sys, time; out = open({path!r}, 'a', buffering=1)\nnote = lambda **n: print(json.dumps(n), file=out)\n"


def _watched(tmp_path, script: str, limits: tuple[float, float, float]) -> gpu_hopper.Ended:
    notes = tmp_path / "stage.jsonl"
    command = [sys.executable, "-c", NOTE.format(path=str(notes)) + script]
    code, seconds = gpu_hopper.watch(command, notes, {}, limits)
    return gpu_hopper.judge("product", "plain", code, seconds, gpu_hopper.read_notes(notes))


def test_a_kernel_that_hangs_is_ended_and_named(tmp_path) -> None:
    start = time.monotonic()
    script = "note(step='compiling and launching d64'); note(step='waiting for the kernel, d64'); time.sleep(60)"
    ended = _watched(tmp_path, script, (0.3, 30.0, 60.0))
    assert time.monotonic() - start < 20
    assert ended.status == "hung: waiting for the kernel, d64" and not ended.passed
    assert "wgmma" in ended.suspects


def test_a_compiler_that_hangs_is_not_taken_for_the_kernel(tmp_path) -> None:
    ended = _watched(tmp_path, "note(step='compiling and launching d64'); time.sleep(60)", (0.1, 0.5, 60.0))
    assert ended.status == "took too long: compiling and launching d64"


def test_a_stage_that_fails_says_why(tmp_path) -> None:
    script = "note(step='comparing d64'); note(step='failed', failure='ContractError: out'); print('said'); raise SystemExit(1)"
    ended = _watched(tmp_path, script, (30.0, 30.0, 60.0))
    assert ended.status == "failed: ContractError: out"
    assert (tmp_path / "stage.log").read_text() == "said\n"
    died = _watched(tmp_path, "note(step='waiting for the kernel, d64'); sys.exit(7)", (30.0, 30.0, 60.0))
    assert died.status == "failed: exit code 7, waiting for the kernel, d64"
    passed = _watched(tmp_path, "note(step='compared', ratios={'out': 0.5}); note(step='done')", (30.0, 30.0, 60.0))
    assert passed.passed and passed.ratios == {"out": 0.5} and passed.suspects == ""


def _bring_up(tmp_path, monkeypatch, **statuses: str) -> gpu_hopper.BringUp:
    bringup = gpu_hopper.BringUp(tmp_path, "cpu", 60.0, 1.0)

    def stage(name: str, mode: str) -> gpu_hopper.Ended:
        return gpu_hopper.Ended(
            name, mode, statuses.get(name, "passed"), 1.0, suspects=hopper_stages.STAGES[name].suspects
        )

    monkeypatch.setattr(bringup, "_stage", stage)
    return bringup


def test_a_stage_that_failed_does_not_stop_the_others_but_the_benchmark(tmp_path, monkeypatch) -> None:
    bringup = _bring_up(tmp_path, monkeypatch, product="hung: waiting for the kernel, d64")
    bringup.run(["stages", "benchmarks"])
    assert [stage.name for stage in bringup.ended] == list(hopper_stages.STAGES)
    assert bringup.benchmarks is not None and bringup.benchmarks.status == "not reached: a stage has not passed"
    assert not bringup.passed
    report = bringup.report()
    assert "hung: waiting for the kernel, d64" in report and "look at: layouts of wgmma's operands" in report
    written = json.loads((tmp_path / gpu_hopper.STAGES_FILE).read_text())
    assert [stage["status"] for stage in written["stages"]].count("passed") == len(hopper_stages.STAGES) - 1
    assert {"device", "triton", "revision"} <= written["environment"].keys()


def test_the_sanitizer_is_not_available_in_the_interpreter(tmp_path) -> None:
    bringup = gpu_hopper.BringUp(tmp_path, "cpu", 60.0, 1.0)
    bringup.run(["consan"])
    assert bringup.passed and all(stage.status.startswith("not available") for stage in bringup.ended)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses_in_one_sentence(tmp_path, capsys) -> None:
    assert gpu_hopper.main(["--out", str(tmp_path)]) == 2
    assert "torch sees no GPU on this machine; --device cpu walks through it" in capsys.readouterr().err


def test_the_rows_name_whoever_is_absent() -> None:
    rows = list(hopper_grid.rows(CPU, quick=True, peers=True))
    assert len(rows) == 20 and len({(row.op, row.shape) for row in rows}) == 20
    for row in rows:
        assert {"triton", *hopper_grid.PEERS} <= row.variants.keys()
        with pytest.raises(Absent, match=r"needs a GPU|not installed"):
            row.variants["sdpa_cudnn"]({})
    assert all("triton hopper" in row.variants for row in rows)


@interpreted
def test_the_rows_of_the_walk_are_right() -> None:
    row = next(hopper_grid.rows(CPU, tiny=True))
    inputs = row.inputs(CPU, 0)
    expected = row.golden(inputs)
    for name in ("triton hopper", "triton"):
        assert relative_error(row.pick(row.variants[name](inputs)), expected) < row.largest_error, name
