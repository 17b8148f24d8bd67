"""Accesses outside of a tensor, and misaligned ones, are caught; their correct twins pass."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from pytransformer.triton_interpreter import KernelFault, MisalignedAccessError, OutOfBoundsError

BLOCK = 32


@triton.jit
def _copy_kernel(x_ptr, out_ptr, num_elements, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    if MASK_LOAD:
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    else:
        x = tl.load(x_ptr + offsets)
    if MASK_STORE:
        tl.store(out_ptr + offsets, x, mask=mask)
    else:
        tl.store(out_ptr + offsets, x)


@triton.jit
def _row_sum_kernel(x_ptr, stride_row, out_ptr, width, FIRST_ROW: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) + FIRST_ROW
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_row + columns, mask=columns < width, other=0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(x, axis=0))


@triton.jit
def _atomic_kernel(count_ptr, index_ptr, num_elements, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    index = tl.load(index_ptr + offsets, mask=mask, other=0)
    tl.atomic_add(count_ptr + index, 1.0, mask=mask)


@triton.jit
def _descriptor_kernel(x_ptr, out_ptr, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    descriptor = tl.make_tensor_descriptor(x_ptr, [num_rows, width], [width, 1], [ROWS, COLUMNS])
    x = descriptor.load([0, 0])
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + offsets, x)


@triton.jit
def _reinterpret_kernel(x_ptr, out_ptr, BYTES: tl.constexpr):
    x = tl.load((x_ptr.to(tl.pointer_type(tl.int8)) + BYTES).to(tl.pointer_type(tl.float32)))
    tl.store(out_ptr, x)


@triton.jit
def _through_integer_kernel(x_ptr, out_ptr, ELEMENTS: tl.constexpr):
    pointer = (x_ptr.to(tl.int64) & 0xFFFFFFFFFFFF).to(tl.pointer_type(tl.float32)) + ELEMENTS
    tl.store(out_ptr, tl.load(pointer))


@triton.jit
def _tuple_kernel(pointers, BLOCK: tl.constexpr, OFFSET: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(pointers[1] + offsets, tl.load(pointers[0] + OFFSET + offsets))


@triton.jit
def _load(x_ptr, offsets):
    return tl.load(x_ptr + offsets)


@triton.jit
def _calling_kernel(x_ptr, out_ptr):
    offsets = tl.arange(0, 8)
    tl.store(out_ptr + offsets, _load(x_ptr, offsets))


@triton.jit
def _descriptor_argument_kernel(descriptor, out_ptr):
    offsets = tl.arange(0, 8)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + offsets, descriptor.load([0, 0]))


def _copy(x, out, mask_load=True, mask_store=True):
    grid = (triton.cdiv(x.numel(), BLOCK),)
    _copy_kernel[grid](x, out, x.numel(), MASK_LOAD=mask_load, MASK_STORE=mask_store, BLOCK=BLOCK)


def test_missing_mask_on_a_store_is_caught():
    x, out = torch.randn(101), torch.empty(101)
    _copy(x, out)
    assert torch.equal(out, x)
    message = r"store out of bounds in program \(3,0,0\): 27 lanes, the first is 404 bytes from the start of 'out_ptr'"
    with pytest.raises(OutOfBoundsError, match=message + r" \(404 bytes\)"):
        _copy(x, out, mask_store=False)


def test_missing_mask_on_a_load_is_caught():
    x, out = torch.randn(101), torch.empty(101)
    with pytest.raises(OutOfBoundsError, match=r"load out of bounds in program \(3,0,0\): 27 lanes.*'x_ptr'"):
        _copy(x, out, mask_load=False)


def test_nothing_is_written_by_a_store_that_is_refused():
    buffer = torch.zeros(200)
    x, out = torch.ones(101), buffer[:101]
    with pytest.raises(OutOfBoundsError):
        _copy(x, out, mask_store=False)
    assert not buffer[101:].any()


def test_a_neighbour_in_memory_is_out_of_bounds_too():
    """The memory behind ``out`` belongs to ``x``: only the origin of the pointer tells that this is wrong."""
    buffer = torch.randn(2, 96)
    out, x = buffer[0, :70], buffer[1, :70]
    _copy(x, out)
    assert torch.equal(out, x)
    out, x = buffer.view(-1)[:80], buffer.view(-1)[80:160]
    with pytest.raises(OutOfBoundsError, match="'out_ptr'"):
        _copy(x, out, mask_store=False)


def test_wrong_stride_reads_the_hole_between_rows():
    x = torch.randn(4, 48)[:, :40]
    out = torch.empty(4)
    _row_sum_kernel[(4,)](x, x.stride(0), out, 40, FIRST_ROW=0, BLOCK=64)
    torch.testing.assert_close(out, x.sum(1))
    with pytest.raises(OutOfBoundsError, match=r"'x_ptr' \(736 bytes, in a hole of the view\)"):
        _row_sum_kernel[(4,)](x, 40, out, 40, FIRST_ROW=0, BLOCK=64)


def test_wrong_width_reads_the_hole_between_rows():
    x, out = torch.randn(4, 48)[:, :40], torch.empty(4)
    with pytest.raises(OutOfBoundsError, match="2 lanes"):
        _row_sum_kernel[(4,)](x, x.stride(0), out, 42, FIRST_ROW=0, BLOCK=64)


@pytest.mark.parametrize(("first_row", "program"), [(1, r"\(3,0,0\)"), (-1, r"\(0,0,0\)")])
def test_row_off_by_one_is_caught(first_row, program):
    x, out = torch.randn(6, 40)[1:5], torch.empty(4)
    _row_sum_kernel[(4,)](x, 40, out, 40, FIRST_ROW=0, BLOCK=64)
    with pytest.raises(OutOfBoundsError, match=f"load out of bounds in program {program}: 40 lanes"):
        _row_sum_kernel[(4,)](x, 40, out, 40, FIRST_ROW=first_row, BLOCK=64)


def test_broadcast_and_transposed_views_have_the_elements_they_have():
    row, out = torch.randn(40), torch.empty(4)
    x = row.expand(4, 40)
    _row_sum_kernel[(4,)](x, x.stride(0), out, 40, FIRST_ROW=0, BLOCK=64)
    torch.testing.assert_close(out, x.sum(1))
    with pytest.raises(OutOfBoundsError):
        _row_sum_kernel[(4,)](x, 40, out, 40, FIRST_ROW=0, BLOCK=64)
    broadcast = torch.randn(BLOCK).expand(2**20, 2**10, BLOCK)
    _copy_kernel[(1,)](broadcast, torch.empty(BLOCK), BLOCK, MASK_LOAD=True, MASK_STORE=True, BLOCK=BLOCK)
    transposed = torch.randn(64, 4).t()
    _copy(transposed, torch.empty(256))


def test_atomic_out_of_bounds_is_caught():
    index = torch.randint(0, 8, (40,), dtype=torch.int32)
    count = torch.zeros(8)
    _atomic_kernel[(2,)](count, index, 40, BLOCK=BLOCK)
    assert torch.equal(count, index.bincount(minlength=8).float())
    index[35] = 8
    with pytest.raises(OutOfBoundsError, match=r"atomic out of bounds in program \(1,0,0\): 1 lane, .* 32 bytes"):
        _atomic_kernel[(2,)](count, index, 40, BLOCK=BLOCK)


def test_descriptor_larger_than_its_tensor_is_caught():
    x, out = torch.randn(6, 16), torch.empty(8, 16)
    _descriptor_kernel[(1,)](x, out, 6, 16, ROWS=8, COLUMNS=16)
    assert torch.equal(out, torch.cat([x, torch.zeros(2, 16)]))
    with pytest.raises(OutOfBoundsError, match="32 lanes"):
        _descriptor_kernel[(1,)](x, out, 8, 16, ROWS=8, COLUMNS=16)


def test_host_descriptor_is_checked_against_its_base():
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, out = torch.randn(6, 16), torch.empty(8, 16)
    _descriptor_argument_kernel[(1,)](TensorDescriptor.from_tensor(x, [8, 16]), out)
    assert torch.equal(out[:6], x)
    with pytest.raises(OutOfBoundsError, match=r"32 lanes.*'descriptor'"):
        _descriptor_argument_kernel[(1,)](TensorDescriptor(x, [8, 16], [16, 1], [8, 16]), out)


def test_tensors_in_tuples_are_checked_by_their_place():
    x, out = torch.randn(BLOCK), torch.empty(BLOCK)
    _tuple_kernel[(1,)]((x, out), BLOCK=BLOCK, OFFSET=0)
    assert torch.equal(out, x)
    with pytest.raises(OutOfBoundsError, match=r"'pointers\[0\]'"):
        _tuple_kernel[(1,)]((x, out), BLOCK=BLOCK, OFFSET=1)


def test_pointer_made_of_an_integer_may_touch_any_argument_but_nothing_else():
    x, out = torch.randn(4), torch.zeros(1)
    _through_integer_kernel[(1,)](x, out, ELEMENTS=3)
    assert out.item() == x[3].item()
    with pytest.raises(OutOfBoundsError, match="16 bytes from the start of 'x_ptr'"):
        _through_integer_kernel[(1,)](x, out, ELEMENTS=4)


def test_misaligned_access_is_caught():
    x, out = torch.randn(4), torch.zeros(1)
    _reinterpret_kernel[(1,)](x, out, BYTES=4)
    assert out.item() == x[1].item()
    with pytest.raises(
        MisalignedAccessError, match="2 bytes from the start of 'x_ptr', and its elements are of 4 bytes"
    ):
        _reinterpret_kernel[(1,)](x, out, BYTES=2)


def test_empty_tensor_may_be_passed_but_not_read():
    out = torch.empty(BLOCK)
    _copy_kernel[(1,)](torch.empty(0), out, 0, MASK_LOAD=True, MASK_STORE=True, BLOCK=BLOCK)
    with pytest.raises(OutOfBoundsError):
        _copy_kernel[(1,)](torch.empty(0), out, 0, MASK_LOAD=False, MASK_STORE=True, BLOCK=BLOCK)


def test_fault_in_a_device_function_arrives_unwrapped():
    with pytest.raises(KernelFault, match="load out of bounds"):
        _calling_kernel[(1,)](torch.randn(7), torch.empty(8))


def test_bounds_can_be_turned_off(harden):
    harden(bounds=False)
    buffer = torch.arange(64.0)
    out = torch.empty(BLOCK)
    _copy(buffer[:20], out, mask_load=False, mask_store=False)
    assert torch.equal(out, buffer[:BLOCK])
