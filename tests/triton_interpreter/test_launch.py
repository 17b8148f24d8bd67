"""Poison, asserts, grids, program order, and putting the stock interpreter back."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from pytransformer import triton_interpreter
from pytransformer.triton_interpreter import UnsupportedTritonError


@triton.jit
def _row_sum_kernel(x_ptr, out_ptr, width, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    if OTHER:
        x = tl.load(x_ptr + columns, mask=columns < width, other=0.0)
    else:
        x = tl.load(x_ptr + columns, mask=columns < width)
    tl.store(out_ptr, tl.sum(x.to(tl.float32), axis=0))


@triton.jit
def _masked_index_kernel(index_ptr, out_ptr, width, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(index_ptr + offsets, mask=offsets < width))


@triton.jit
def _descriptor_kernel(x, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, x.load([0]).to(tl.float32))


@triton.jit
def _assert_kernel(x_ptr, limit):
    tl.device_assert(tl.load(x_ptr) < limit, "x is too large")


@triton.jit
def _overflow_kernel(out_ptr, factor):
    program = tl.program_id(0)
    tl.store(out_ptr + program, program * factor)


@triton.jit
def _strided_kernel(x_ptr, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    tl.store(x_ptr + program * stride + tl.arange(0, BLOCK), program.to(tl.int8))


@triton.jit
def _grid_kernel(out_ptr, num_y, num_z):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tl.store(out_ptr + (x * num_y + y) * num_z + z, x * 100 + y * 10 + z)


@triton.jit
def _ticket_kernel(counter_ptr, ticket_ptr):
    tl.store(ticket_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1))


@triton.jit
def _loop_kernel(out_ptr, start_ptr, stop):
    total = 0
    for step in range(tl.load(start_ptr), stop):
        total += step
    tl.store(out_ptr, total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_masked_off_lane_without_other_poisons_the_result(dtype):
    x, out = torch.ones(40, dtype=dtype), torch.empty(1)
    _row_sum_kernel[(1,)](x, out, 40, OTHER=True, BLOCK=64)
    assert out.item() == 40
    _row_sum_kernel[(1,)](x, out, 40, OTHER=False, BLOCK=64)
    assert out.isnan().item()
    full = torch.ones(64, dtype=dtype)
    _row_sum_kernel[(1,)](full, out, 64, OTHER=False, BLOCK=64)
    assert out.item() == 64


def test_masked_off_lanes_of_integers_are_no_valid_index():
    out = torch.empty(8, dtype=torch.int32)
    _masked_index_kernel[(1,)](torch.arange(8, dtype=torch.int32), out, 6, BLOCK=8)
    assert out.tolist() == [0, 1, 2, 3, 4, 5, -1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_descriptor_pads_with_nan_in_every_format(dtype):
    out = torch.empty(32)
    _descriptor_kernel[(1,)](TensorDescriptor(torch.ones(20).to(dtype), [20], [1], [32], padding="nan"), out, BLOCK=32)
    assert out[:20].eq(1).all() and out[20:].isnan().all()


def test_poison_can_be_turned_off(harden):
    harden(poison=False)
    out = torch.empty(1)
    _row_sum_kernel[(1,)](torch.ones(40), out, 40, OTHER=False, BLOCK=64)
    assert out.item() == 40


def test_device_assert_is_on(harden):
    x = torch.tensor([3.0])
    _assert_kernel[(1,)](x, 4)
    with pytest.raises(InterpreterError, match="x is too large"):
        _assert_kernel[(1,)](x, 3)
    harden(debug=False)
    _assert_kernel[(1,)](x, 3)


def test_integer_overflow_is_caught():
    out = torch.empty(3, dtype=torch.int32)
    _overflow_kernel[(3,)](out, 2**30 - 1)
    assert out.tolist() == [0, 2**30 - 1, 2**31 - 2]
    with pytest.raises(InterpreterError, match="int32 overflow"):
        _overflow_kernel[(3,)](out, 2**30)


def test_offsets_past_32_bits_are_caught_or_right(harden):
    """In a tensor of 2^31 + 64 elements, of which only the pages that are touched take memory."""
    harden(races=False)
    x = torch.empty(2**31 + 64, dtype=torch.int8)
    _strided_kernel[(3,)](x, 2**30, WIDE=True, BLOCK=32)
    assert x[2**31 : 2**31 + 32].eq(2).all()
    with pytest.raises(InterpreterError, match="int32 overflow"):
        _strided_kernel[(3,)](x, 2**30, WIDE=False, BLOCK=32)


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 65536)])
def test_grid_that_cuda_refuses_is_refused(grid):
    with pytest.raises(
        (ValueError, InterpreterError), match=r"the grid has 65536 programs along [yz], and a GPU allows 65535"
    ):
        _grid_kernel[grid](torch.empty(1, dtype=torch.int32), 1, 1)


def test_programs_of_three_dimensions_run_once_each_in_any_order():
    expected = torch.tensor([x * 100 + y * 10 + z for x in range(2) for y in range(3) for z in range(4)])
    for seed in [None, 0, 7]:
        out = torch.full((24,), -1, dtype=torch.int32)
        with triton_interpreter.program_order(seed):
            _grid_kernel[(2, 3, 4)](out, 3, 4)
        assert torch.equal(out.long(), expected)


def _tickets(number=16) -> list[int]:
    counter, tickets = torch.zeros(1, dtype=torch.int32), torch.empty(number, dtype=torch.int32)
    _ticket_kernel[(number,)](counter, tickets)
    return tickets.tolist()


def test_program_order_is_shuffled_reproducibly_and_restored(harden):
    natural = list(range(16))
    assert _tickets() == natural
    with triton_interpreter.program_order(1):
        first = _tickets()
        with triton_interpreter.program_order(2):
            second = _tickets()
        assert _tickets() == first
    assert first != natural and second != natural and first != second
    assert sorted(first) == natural
    assert _tickets() == natural
    harden(program_order=1)
    assert _tickets() == first


def test_two_programs_are_never_left_in_natural_order():
    for seed in range(8):
        with triton_interpreter.program_order(seed):
            assert _tickets(2) == [1, 0]


def test_loop_bounds_may_be_loaded_from_memory():
    out = torch.empty(1, dtype=torch.int32)
    _loop_kernel[(1,)](out, torch.tensor([3], dtype=torch.int32), 6)
    assert out.item() == 12


def _snapshot() -> dict[tuple[str, str], object]:
    owners = {
        "module": interpreter,
        "InterpreterBuilder": interpreter.InterpreterBuilder,
        "builder": interpreter.interpreter_builder,
        "ReduceOps": interpreter.ReduceOps,
        "ScanOps": interpreter.ScanOps,
        "GridExecutor": interpreter.GridExecutor,
    }
    changing = {"grid_idx", "grid_dim"}
    return {
        (where, name): value
        for where, owner in owners.items()
        for name, value in vars(owner).items()
        if name not in changing
    }


def test_the_language_is_itself_again_after_a_kernel_that_sums():
    # Triton 3.9's interpreter leaves triton.language.core patched for good after a call of tl.sum, whose module is not the kernel's;
    # Gluon's tensors, whose operators are found there, were then taken for Triton's.
    def patched() -> list[str]:
        owners = (tl, tl.core, tl.math, tl.core.tensor, tl.core.tensor_descriptor_base)
        return [f"{owner}.{name}" for owner in owners for name, value in vars(owner).items() if _is_patched(value)]

    assert patched() == []
    out = torch.zeros(1)
    _row_sum_kernel[(1,)](torch.ones(8), out, 8, True, 8)
    assert out.item() == 8
    assert patched() == []


def _is_patched(value: object) -> bool:
    return "_patch" in getattr(value, "__qualname__", "")


def test_uninstall_restores_the_stock_interpreter():
    try:
        triton_interpreter.uninstall()
        assert not triton_interpreter.installed()
        stock = _snapshot()
        ours = [key for key, value in stock.items() if getattr(value, "__module__", "").startswith("pytransformer")]
        assert not ours
        out = torch.empty(1)
        _row_sum_kernel[(1,)](torch.ones(40), out, 40, OTHER=False, BLOCK=64)
        assert out.item() == 40, "the stock interpreter has zeros in masked-off lanes"
        triton_interpreter.install()
        assert triton_interpreter.installed()
        hardened = _snapshot()
        assert any(hardened[key] is not value for key, value in stock.items())
        triton_interpreter.uninstall()
        restored = _snapshot()
        assert restored.keys() == stock.keys()
        assert all(restored[key] is value for key, value in stock.items())
        triton_interpreter.uninstall()
        with pytest.raises(RuntimeError, match="call install"), triton_interpreter.program_order(1):
            pass
    finally:
        triton_interpreter.install()


def test_an_unknown_interpreter_is_refused_by_name(monkeypatch):
    triton_interpreter.uninstall()
    try:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", lambda self, pointers, mask: None)
        monkeypatch.delattr(interpreter.InterpreterBuilder, "create_erf")
        with pytest.raises(UnsupportedTritonError, match=r"create_erf is missing; .*create_masked_load"):
            triton_interpreter.install()
        assert not triton_interpreter.installed()
    finally:
        monkeypatch.undo()
        triton_interpreter.install()
