"""The gate itself: it records what Triton would compile, and complains about what it should complain about."""

from __future__ import annotations

import functools
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from pytransformer.kernels.launch import COMMON_OPTIONS, device_limits
from tests.support import compile_gate, gate_figures, limits, sass
from tests.support.compile_gate import Case
from tests.support.launch_recorder import record, record_launches


@triton.jit
def _scale_kernel(x_ptr, out_ptr, num_elements, factor, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=mask, other=0.0) * factor, mask=mask)


@triton.jit
def _matmul_kernel(x_ptr, y_ptr, out_ptr, length, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, length, K):
        x = tl.load(x_ptr + rows[:, None] * length + (start + inner)[None, :])
        y = tl.load(y_ptr + (start + inner)[:, None] * N + columns[None, :])
        total = tl.dot(x, y, total)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], total)


@triton.jit
def _broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), this_name_does_not_exist)  # noqa: F821


def _scale(x: torch.Tensor, num_elements: int = 1000, factor: float = 2.0) -> torch.Tensor:
    out = torch.full((1024,), 7.0)
    _scale_kernel[(8,)](x, out, num_elements, factor, BLOCK=128, num_warps=1, **COMMON_OPTIONS)
    return out


def _matmul(rows: int, columns: int, inner: int, **options: int) -> None:
    x, y = torch.empty(rows, 1024, dtype=torch.bfloat16), torch.empty(1024, columns, dtype=torch.bfloat16)
    out = torch.empty(rows, columns)
    _matmul_kernel[(1,)](x, y, out, 1024, M=rows, N=columns, K=inner, **COMMON_OPTIONS, **options)


def _broken() -> None:
    _broken_kernel[(1,)](torch.empty(16), BLOCK=16, **COMMON_OPTIONS)


def _case(call, arch: int, *wgmma_kernels: str) -> Case:
    return Case("name", call, arch, frozenset(wgmma_kernels))


def _complaints(call, arch: int, *wgmma_kernels: str) -> list[str]:
    (report,) = compile_gate.run_cases([_case(call, arch, *wgmma_kernels)]).values()
    return report.complaints


def test_records_what_triton_specialises_on():
    x = torch.empty(1025)
    (launch,) = record(lambda: _scale(x, 1024), 90)
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "num_elements": "i32", "factor": "fp32", "BLOCK": "constexpr"}
    assert launch.name == "_scale_kernel"
    assert launch.signature == types
    assert launch.constexprs == {(4,): 128}
    divisible = {path for path, attributes in launch.attrs.items() if ["tt.divisibility", 16] in attributes}
    assert divisible == {(0,), (1,), (2,)}
    assert (launch.options.num_warps, launch.target.arch) == (1, 90)

    (launch,) = record(lambda: _scale(x[1:], 1000), 90)
    divisible = {path for path, attributes in launch.attrs.items() if ["tt.divisibility", 16] in attributes}
    assert divisible == {(1,)}

    (launch,) = record(lambda: _scale(x, 1), 90)
    assert launch.signature["num_elements"] == "constexpr"
    assert launch.constexprs == {(2,): 1, (4,): 128}


def test_nothing_runs_and_equal_launches_count_once():
    x = torch.zeros(1024)
    with record_launches(90) as launches:
        assert _scale(x).eq(7.0).all()
        _scale(torch.ones(1024), 999)
    assert len(launches) == 2
    assert launches[0].key == launches[1].key
    assert len(record(lambda: [_scale(x), _scale(x, 1024), _scale(x.half())], 90)) == 3
    assert record(lambda: _scale(x), 80)[0].key != launches[0].key


def test_of_what_is_known_to_pass_one_launch_of_each_kernel_is_compiled():
    x = torch.empty(1024)
    cases = [_case(lambda: [_scale(x), _scale(x.half()), _scale(x.bfloat16())], arch) for arch in (80, 90)]
    launches = [launch for case in cases for launch in record(case.call, case.arch)]
    known = frozenset(launch.key for launch in launches)
    (checked,) = compile_gate.spot_checks(launches)

    def compiled(known: frozenset[str]) -> set[str]:
        outcomes = [
            outcome for report in compile_gate.run_cases(cases, known=known).values() for outcome in report.outcomes
        ]
        assert len(outcomes) == 6
        return {outcome.launch.key for outcome in outcomes if outcome.statistics is not None}

    assert compiled(known) == {checked}
    assert compiled(known - {launches[1].key}) == {checked, launches[1].key}
    assert compiled(frozenset()) == known


def test_each_architecture_of_a_kernel_has_its_turn():
    def checked(source: int) -> set[str]:
        names = itertools.product(("first", "second"), compile_gate.ARCHITECTURES)
        launches = [SimpleNamespace(name=name, arch=arch, key=f"{name} {arch} {source}") for name, arch in names]
        return {key.rsplit(" ", 1)[0] for key in compile_gate.spot_checks(launches)}

    turns = [checked(source) for source in range(30)]
    assert all({found.split()[0] for found in turn} == {"first", "second"} for turn in turns)
    assert len(set().union(*turns)) == 6
    assert any(len({found.split()[1] for found in turn}) == 2 for turn in turns), "not all of one at a time"


def test_what_is_not_known_is_compiled_and_fails_beside_what_is():
    cases = [Case("passes", lambda: _scale(torch.empty(1024)), 90), Case("fails", _broken, 90)]
    known = frozenset(launch.key for launch in record(cases[0].call, 90))
    passing, failing = compile_gate.run_cases(cases, known=known).values()
    assert not passing.complaints
    assert failing.complaints[0].startswith("_broken_kernel: does not compile")


def test_figures_of_another_compiler_or_other_rules_are_not_known(monkeypatch, tmp_path):
    rules, compiler = gate_figures.rules(), gate_figures.compiler("triton")
    monkeypatch.setattr(gate_figures, "FOLDER", tmp_path)
    for given, expected in (((compiler, rules), {"a"}), ((compiler, "0"), set()), (("other", rules), set())):
        kept = dict(zip(("compiler", "rules"), given), kernels={"x": {"key": "a"}, "y": {"registers": 3}})
        (tmp_path / "triton.json").write_text(json.dumps(kept))
        assert gate_figures.known_keys() == expected


def test_launch_policy_answers_for_the_architecture():
    seen = []
    for arch in compile_gate.ARCHITECTURES:
        record(lambda: seen.append(device_limits(torch.device("cpu")).arch), arch)
    assert seen == list(compile_gate.ARCHITECTURES)


def test_recording_refuses_an_interpreting_process(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"), record_launches(90):
        pass


@pytest.mark.parametrize("arch", compile_gate.ARCHITECTURES)
def test_small_kernel_is_clean(arch):
    (report,) = compile_gate.run_cases([_case(lambda: _scale(torch.empty(1024), 1024), arch)]).values()
    assert report.complaints == []
    (outcome,) = report.outcomes
    assert 0 < outcome.statistics.registers < 64
    # 128 float32 by 32 threads are one access of 128 bits for each, if Triton was told that everything is aligned.
    assert outcome.statistics.count(r"LDG\.E\.128") == outcome.statistics.count(r"STG\.E\.128") == 1


def test_statistics_come_from_the_cache_the_second_time(monkeypatch):
    (launch,) = record(lambda: _scale(torch.empty(1024)), 90)
    first = sass.compile_launch(launch)
    monkeypatch.setattr(sass, "_compile", lambda launch: pytest.fail("compiled again"))
    assert sass.compile_launch(launch) == first


def test_kernel_that_does_not_compile_is_a_complaint_and_is_tried_again():
    for _ in range(2):
        (complaint,) = _complaints(_broken, 90)
        assert complaint.startswith("_broken_kernel: does not compile")
        assert "this_name_does_not_exist" in complaint


def test_launcher_that_raises_or_launches_nothing_is_a_complaint():
    def call() -> None:
        raise ValueError("no such configuration")

    assert _complaints(call, 90) == ["the launcher raised ValueError: no such configuration"]
    assert _complaints(lambda: None, 90) == ["launches nothing"]


def test_spills_are_a_complaint():
    call = functools.partial(_matmul, 128, 128, 32, num_warps=1, num_stages=1)
    complaints = _complaints(call, 80)
    assert any("bytes per thread, 16 are allowed" in complaint for complaint in complaints)
    assert any("local memory" in complaint and complaint.endswith("in a hot loop") for complaint in complaints)


def test_too_much_shared_memory_is_a_complaint():
    call = functools.partial(_matmul, 128, 128, 64, num_warps=8, num_stages=7)
    assert any("bytes of shared memory per block, sm_80 has 166912" in complaint for complaint in _complaints(call, 80))
    assert not any("shared memory" in complaint for complaint in _complaints(call, 90))


def test_missing_wgmma_is_a_complaint():
    name = "_matmul_kernel"
    big, small = (functools.partial(_matmul, rows, 64, 64, num_warps=4, num_stages=3) for rows in (64, 16))
    for arch in compile_gate.ARCHITECTURES:
        assert not _complaints(big, arch, name)
    assert _complaints(small, 90, name) == [f"{name}: does not use wgmma, as it should"]
    assert _complaints(small, 100, name) == [f"{name}: does not use tcgen05.mma, as it should"]
    assert not _complaints(small, 80, name)


def test_ptxas_log_is_read():
    log = """ptxas info    : 0 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register resources
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    24 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 24 bytes cumulative stack size
"""
    registers, spills, stack, warnings = sass.parse_ptxas_log(log)
    assert (registers, spills, stack) == (168, 28, 24)
    assert [warning.split(":")[1].strip()[:7] for warning in warnings] == ["(C7510)"]
    with pytest.raises(ValueError, match="did not report"):
        sass.parse_ptxas_log("")


def test_kernels_held_to_the_issue_ratio_exist():
    """A kernel that was renamed would be held to nothing."""
    sources = [path.read_text() for path in compile_gate.KERNELS.rglob("*.py")]
    assert all(any(f"def {name}(" in source for source in sources) for name in limits.STREAMING)


def test_launched_kernels_are_found_in_the_source(tmp_path):
    path = tmp_path / "kernels.py"
    path.write_text(
        "first[(1,)](x)\ndef launcher():\n    second[grid](x, BLOCK=1)\n    table[0]\n    third(x)\n    PreparedLaunch(fourth, grid, x)\n"
    )
    assert compile_gate.launched_kernels(path) == {"first", "second", "fourth"}
