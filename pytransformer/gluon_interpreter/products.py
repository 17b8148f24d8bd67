"""``warpgroup_mma``: asynchronous products of a warpgroup (wgmma).

Triton makes each a group of its own (``wgmma.mma_async`` … ``wgmma.commit_group``), and ``warpgroup_mma_wait(n)`` a
``wgmma.wait_group n``: all but the latest ``n`` of this task are then through. Until then a product may read its
operands, in shared memory (through the async proxy) or in registers, and its accumulator holds nothing; a later
product may use it all the same, as those of one warpgroup run in order.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import triton.experimental.gluon.language as gl

from pytransformer.triton_interpreter import formats

from .faults import LayoutError, OperandReuseError
from .machine import Machine
from .shared import Access, Array, View
from .source import line

# PTX, wgmma.mma_async: rows of a warpgroup's instruction, multiples of its columns, and bytes of an operand's row (k) in one instruction.
_ROWS, _COLUMNS, _DEPTH_BYTES, _MOST_COLUMNS = 64, 8, 32, 256


class Product:
    """One product that was issued.

    Attributes:
        where: the line that issued it.
        what: its operands.
        operations: floating-point ones.
        number: that of its first access to shared memory, which is no other product's.
        done: whether a wait has found it through.
        result: the accumulator after it, once it is computed.
    """

    def __init__(self, machine: Machine, a: Any, b: Any, before: Product | Array, use_accumulator: bool) -> None:
        self.where = line()
        self.done = False
        self.result: Array | None = None
        self._machine = machine
        self._views = [operand.handle for operand in (a, b) if isinstance(operand.handle, View)]
        self._a, self._b = (_Operand(operand) for operand in (a, b))
        self._registers = None if isinstance(a.handle, View) else weakref.ref(a)
        self._accumulator = before if use_accumulator else None
        task = machine.task
        self._accesses: list[Access] = [
            machine.shared.read(
                view, task.knowledge, "the product", asynchronous=True, task=task.name, where=self.where
            )
            for view in self._views
        ]
        self.what = " × ".join(x.handle.label if isinstance(x.handle, View) else "registers" for x in (a, b))
        self.operations = 2 * int(a.shape[0]) * int(a.shape[1]) * int(b.shape[1])
        self.number = self._accesses[0].number

    def compute(self) -> None:
        """Reads the operands and makes the result."""
        if self.result is not None:
            return
        previous = self._accumulator
        total = self._a.values() @ self._b.values()
        if previous is not None:
            before = previous.result if isinstance(previous, Product) else previous
            assert before is not None  # products of a task are computed in order
            total += before
        self.result = total
        self._accumulator = None

    def finish(self) -> None:
        """A wait has found it through.

        Raises:
            OperandReuseError: the operand in registers is held by nobody.
        """
        if self._registers is not None and self._registers() is None:
            raise OperandReuseError(
                f"the product at {self.where} may read its operand in registers until the wait at {line()}, and nothing has held it since: "
                "keep the tensor, or name it in the wait's deps"
            )
        self.compute()
        self.done = True
        for access in self._accesses:
            self._machine.task.knowledge.add(access.number)


class _Operand:
    """An operand that can be read later."""

    def __init__(self, operand: Any) -> None:
        self._array = operand.handle.array if isinstance(operand.handle, View) else operand.handle.data
        self._bfloat16 = operand.dtype == gl.bfloat16

    def values(self) -> Array:
        """Its numbers now, as float32; float16 and bfloat16 products are exact in it."""
        if self._bfloat16:
            return formats.bfloat16_to_float32(self._array)
        return self._array.astype(np.float32)


def check(a: Any, b: Any, accumulator_type: Any, num_warps: int) -> None:
    """What the instruction takes.

    Raises:
        LayoutError: naming what it does not.
    """
    layout = accumulator_type.layout
    if not isinstance(layout, gl.NVMMADistributedLayout) or list(layout.version) != [3, 0]:
        raise _refused(f"the accumulator's layout must be an NVMMADistributedLayout of version [3, 0], got {layout}")
    if int(np.prod(layout.warps_per_cta)) != num_warps:
        raise _refused(f"the accumulator's layout has warps {layout.warps_per_cta}, and the task has {num_warps}")
    if num_warps % 4:
        raise _refused(f"a product is made by whole warpgroups of 4 warps, and the task has {num_warps}")
    (rows, depth), (other, columns) = a.shape, b.shape
    if depth != other or [rows, columns] != list(accumulator_type.shape):
        raise _refused(
            f"operands {list(a.shape)} and {list(b.shape)} do not give an accumulator {accumulator_type.shape}"
        )
    if a.dtype != b.dtype or a.dtype not in (gl.bfloat16, gl.float16) or accumulator_type.scalar != gl.float32:
        raise _refused(
            f"operands must both be bf16 or fp16 and the accumulator fp32, got {a.dtype}, {b.dtype} and {accumulator_type.scalar}"
        )
    _check_instruction(layout, rows, columns, depth, a.dtype.primitive_bitwidth // 8)
    _check_memory("second", b)
    if isinstance(a.handle, View):
        _check_memory("first", a)
    elif not isinstance(a.type.layout, gl.DotOperandLayout) or a.type.layout.parent != layout:
        raise _refused(
            f"a first operand in registers must have a DotOperandLayout(0, …) over the accumulator's layout, got {a.type.layout}"
        )
    elif a.type.layout.operand_index != 0 or a.type.layout.k_width != 4 // (a.dtype.primitive_bitwidth // 8):
        raise _refused(f"a first operand in registers has operand_index 0 and k_width of 4 bytes, got {a.type.layout}")


def _refused(message: str) -> LayoutError:
    return LayoutError(f"{message}, at {line()}")


def _check_instruction(layout: Any, rows: int, columns: int, depth: int, size: int) -> None:
    instruction = list(layout.instr_shape)
    if instruction[0] != 16 or instruction[1] % _COLUMNS or not 0 < instruction[1] <= _MOST_COLUMNS:
        raise _refused(
            f"instr_shape must be [16, a multiple of 8 up to 256, {_DEPTH_BYTES // size}], got {instruction}"
        )
    if instruction[2] * size != _DEPTH_BYTES or depth % instruction[2]:
        raise _refused(
            f"an instruction multiplies {_DEPTH_BYTES // size} columns with rows, got {instruction} for depth {depth}"
        )
    if rows % _ROWS or columns % instruction[1]:
        raise _refused(
            f"an accumulator of {rows} × {columns} is not made of instructions of {_ROWS} × {instruction[1]}"
        )


def _check_memory(which: str, operand: Any) -> None:
    if not isinstance(operand.handle, View):
        raise _refused(f"the {which} operand must be in shared memory")
    if not isinstance(operand.layout, gl.NVMMASharedLayout):
        raise _refused(f"the {which} operand must have an NVMMASharedLayout, got {operand.layout}")
