"""What a kernel may write beside the asynchronous operations: scalars, masks, loops, functions, atomics."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pytransformer import triton_interpreter
from pytransformer.gluon_interpreter import launch
from pytransformer.triton_interpreter import RaceError

LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _masked(x, out, length):
    places = gl.arange(0, 128, layout=LINE)
    inside = places < length
    values = gl.load(x + places, mask=inside, other=2.0)
    gl.store(out + places, gl.exp2(values), mask=places < 100)


def test_masked_lanes_are_neither_read_nor_written() -> None:
    x, out = torch.randn(50), torch.full((100,), -1.0)
    launch(_masked, (1,), x, out, 50)
    torch.testing.assert_close(out[:50], x.exp2())
    assert (out[50:] == 4).all()


@gluon.jit
def _smaller(a, b=3):
    return min(a, b)


@gluon.jit
def _collatz(start, MOST: gl.constexpr = 100):
    steps = 0
    number = start
    while number != 1 and steps < MOST:
        number = number // 2 if number % 2 == 0 else 3 * number + 1
        steps += 1
    return steps, number


@gluon.jit
def _scalars(out, n, flag, none, weight: gl.constexpr):
    steps, number = _collatz(n)
    gl.store(out, steps)
    gl.store(out + 1, _smaller(steps) + _smaller(2, b=steps))
    gl.store(out + 2, gl.cdiv(n, 4) + (weight if none is None else 0))
    total = 0
    for i in range(gl.program_id(0), n, gl.num_programs(0)):
        if flag:
            total += i
    gl.store(out + 3, total)
    gl.store(out + 4, gl.maximum(n, 40) - gl.minimum(n, 5))
    for i in gl.static_range(2):
        gl.store(out + 5 + i, [n, number][i])


def test_scalars_loops_and_functions() -> None:
    out = torch.zeros(7, dtype=torch.int32)
    launch(_scalars, (1,), out, 27, True, None, 5)
    assert out.tolist() == [100, 3 + 2, 7 + 5, sum(range(27)), 40 - 5, 27, _collatz_after(27, 100)]


def _collatz_after(number: int, steps: int) -> int:
    for _ in range(steps):
        number = number // 2 if number % 2 == 0 else 3 * number + 1
    return number


@gluon.jit
def _count(counter, out, ATOMIC: gl.constexpr):
    if ATOMIC:
        gl.atomic_add(counter, 1)
    else:
        gl.store(counter, gl.load(counter) + 1)
    rows = gl.program_id(0) * 128 + gl.arange(0, 128, layout=LINE)
    gl.store(out + rows, rows.to(gl.float32))


def test_programs_are_held_against_each_other() -> None:
    counter, out = torch.zeros(1, dtype=torch.int32), torch.zeros(384)
    launch(_count, lambda arguments: (arguments["out"].numel() // 128,), counter, out, True)
    assert counter.item() == 3 and torch.equal(out, torch.arange(384.0))
    with pytest.raises(RaceError, match=r"race on 'counter'.* at test_language.py:\d+ in _count"):
        launch(_count, (3,), counter, out, False)


@gluon.jit
def _bfloat16(x, y, out):
    places = gl.arange(0, 128, layout=LINE)
    a, b = gl.load(x + places), gl.load(y + places)
    gl.store(out + places, a * b + a)
    gl.store(out + 128 + places, gl.fma(a.to(gl.float32), b.to(gl.float32), a.to(gl.float32)).to(gl.bfloat16))


def test_bfloat16_is_rounded_as_by_a_gpu() -> None:
    x, y = (torch.randn(128).to(torch.bfloat16) for _ in range(2))
    out = torch.zeros(256, dtype=torch.bfloat16)
    launch(_bfloat16, (1,), x, y, out)
    assert torch.equal(out[:128], x * y + x)
    assert torch.equal(out[128:], (x.double() * y.double() + x.double()).to(torch.bfloat16))


@gluon.jit
def _asserts(out, n, STATIC: gl.constexpr):
    gl.static_assert(STATIC > 0, "of a constant")
    gl.device_assert(n > 0, "of a value")
    gl.store(out, n)


def test_assertions_are_checked() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    launch(_asserts, (1,), out, 1, 1)
    with pytest.raises(AssertionError, match=r"static_assert at test_language.py:\d+ in _asserts: of a constant"):
        launch(_asserts, (1,), out, 1, 0)
    with pytest.raises(AssertionError, match="of a value"):
        launch(_asserts, (1,), out, 0, 1)


@gluon.jit
def _joined(x):
    places = gl.arange(0, 128, layout=LINE)
    gl.join(places, places)


@gluon.jit
def _condition(x):
    if gl.arange(0, 128, layout=LINE) > 3:
        gl.store(x, 1.0)


def test_what_has_no_meaning_here_raises() -> None:
    with pytest.raises(NotImplementedError, match=r"layout of this operation, at test_language.py:\d+ in _joined"):
        launch(_joined, (1,), torch.zeros(1))
    with pytest.raises(ValueError, match=r"shape \[128\] is no condition, at test_language.py:\d+ in _condition"):
        launch(_condition, (1,), torch.zeros(1))


@triton.jit
def _total(x, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N))))


def test_launches_of_the_stock_interpreter_leave_nothing_behind() -> None:
    # Triton's own interpreter leaves the functions of triton.language.core pointed at itself after a kernel with tl.sum.
    triton_interpreter.uninstall()
    try:
        _total[(1,)](torch.ones(8), torch.zeros(1), 8)
    finally:
        triton_interpreter.install()
    x, out = torch.randn(50), torch.zeros(100)
    launch(_masked, (1,), x, out, 50)
    torch.testing.assert_close(out[:50], x.exp2())


class _Traits(NamedTuple):
    FACTOR: Any
    base: Any


@gluon.jit
def _named(out, traits):
    FACTOR: gl.constexpr = traits.FACTOR
    gl.store(out, FACTOR * traits.base)


def test_a_named_tuple_keeps_its_names_and_constants() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    launch(_named, (1,), out, _Traits(gl.constexpr(3), 7))
    assert out.item() == 21
