"""What has passed before is not asked again, and is when anything that decides it has changed."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.compile import conftest
from tests.support import gate_figures, passed
from tests.support.launch_recorder import request

_modules = itertools.count()

KERNEL = """
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

FACTOR = tl.constexpr(2)

@triton.jit
def helper(x):
    return x * FACTOR

@triton.jit
def kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), helper(1.0))

@gluon.constexpr_function
def layout(warps):
    return gl.BlockedLayout([1], [32], [warps], [0])

@gluon.jit
def gluon_helper(places):
    return places + 1

@gluon.jit
def gluon_kernel(x_ptr, BLOCK: gl.constexpr):
    places = gl.arange(0, BLOCK, layout=layout(4))
    gl.store(x_ptr + places, gluon_helper(places))
"""


def _module(folder: Path, text: str) -> ModuleType:
    path = folder / f"module_{next(_modules)}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _item(module: ModuleType, name: str = "test_it") -> SimpleNamespace:
    return SimpleNamespace(module=module, name=name, get_closest_marker=lambda marker: marker == "compiles")


@pytest.fixture(autouse=True)
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(passed, "FILE", tmp_path / "passed.json")
    monkeypatch.setattr(conftest, "CHANGED_ALONE", True)
    yield passed.FILE
    passed.digest.cache_clear()


def _runs(item: SimpleNamespace) -> bool:
    """Whether the gate of what has changed runs a test."""
    passed.digest.cache_clear()
    try:
        conftest.pytest_runtest_setup(item)
    except pytest.skip.Exception:
        return False
    return True


def test_what_has_passed_is_not_run_again_but_in_the_whole_gate(tmp_path, monkeypatch) -> None:
    module = _module(tmp_path, "def decided_by(): return ['key']")
    assert _runs(_item(module))
    passed.write([_item(module)])
    assert not _runs(_item(module))
    assert _runs(_item(module, "test_that_has_not_passed"))
    monkeypatch.setattr(conftest, "CHANGED_ALONE", False)
    assert _runs(_item(module))


def _another_test(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(module.__file__)
    path.write_text(path.read_text() + "\nMOST = 1\n")


def _another_kernel(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    module.decided_by = lambda: ["another key"]


def _another_compiler(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_figures, "compiler", lambda kind: "another")


def _other_rules(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_figures, "rules", lambda: "others")


def _a_call_that_raises(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def decided_by() -> list[str]:
        raise ValueError("no such configuration")

    module.decided_by = decided_by


@pytest.mark.parametrize(
    "change", [_another_test, _another_kernel, _another_compiler, _other_rules, _a_call_that_raises]
)
def test_a_change_runs_it_again(change: Callable[..., None], tmp_path, monkeypatch) -> None:
    """And what runs can fail."""
    module = _module(tmp_path, "def decided_by(): return ['key']")
    passed.write([_item(module)])
    assert not _runs(_item(module))
    change(module, monkeypatch)
    assert _runs(_item(module))


def test_tests_that_passed_before_stay_known_with_the_same_alone(tmp_path) -> None:
    module = _module(tmp_path, "def decided_by(): return ['key']")
    passed.write([_item(module, "test_first")])
    passed.write([_item(module, "test_second")])
    assert not _runs(_item(module, "test_first")) and not _runs(_item(module, "test_second"))
    module.decided_by = lambda: ["another key"]
    passed.digest.cache_clear()
    passed.write([_item(module, "test_second")])
    assert _runs(_item(module, "test_first")) and not _runs(_item(module, "test_second"))


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("kernel", "helper(1.0)", "helper(3.0)"),
        ("kernel", "x * FACTOR", "x + FACTOR"),
        ("kernel", "constexpr(2)", "constexpr(4)"),
        ("gluon_kernel", "x_ptr + places, ", "x_ptr + places + 1, "),
        ("gluon_kernel", "places + 1\n", "places + 2\n"),
        ("gluon_kernel", "[1], [32]", "[2], [32]"),
    ],
)
def test_a_key_is_of_the_kernel_and_all_that_it_calls(name: str, before: str, after: str, tmp_path) -> None:
    def key(text: str, **options: int) -> str:
        signature = {"x_ptr": "*i32", "BLOCK": "constexpr"}
        return request(getattr(_module(tmp_path, text), name), 90, signature, {"BLOCK": 128}, **options).key

    assert KERNEL.count(before) == 1
    assert key(KERNEL) == key(KERNEL) != key(KERNEL.replace(before, after))
    assert key(KERNEL, num_warps=4) != key(KERNEL, num_warps=8)


def test_rules_are_the_limits_and_which_kernels_must_use_matrix_instructions(tmp_path, monkeypatch) -> None:
    """Not what only walks over cases and launches."""
    root = Path(gate_figures.ROOT)
    for folder in ("tests/support", "tests/compile/cases"):
        shutil.copytree(root / folder, tmp_path / folder)
    monkeypatch.setattr(gate_figures, "ROOT", tmp_path)
    before = gate_figures.rules()

    def after(path: str, old: str, new: str) -> str:
        text = (root / path).read_text()
        assert old in text
        (tmp_path / path).write_text(text.replace(old, new))
        found = gate_figures.rules()
        (tmp_path / path).write_text(text)
        return found

    assert after("tests/support/limits.py", "MAX_SPILL_BYTES = 16", "MAX_SPILL_BYTES = 8") != before
    assert after("tests/support/hot_loop.py", "LEAST_WORK = 0.25", "LEAST_WORK = 0.5") != before
    assert after("tests/compile/cases/attention.py", '("attention_forward_kernel",)', "()") != before
    assert after("tests/compile/cases/attention.py", "SEQLEN, NUM_HEADS", "SEQLEN , NUM_HEADS") == before
    assert after("tests/support/compile_gate.py", "def run_cases", "def run_all") == before
    assert gate_figures.rules() == before
