"""Inline assembly in the interpreter: the few PTX instructions that kernels here use, on the bits of all elements at once.

As compiled, an instance of the text serves ``pack`` elements: those of one input lie in one 32-bit register, those of an output in as many
as they fill, lowest first. What is not known here raises, so that no kernel runs on a guess.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from triton.runtime import interpreter

from . import formats
from .errors import UnsupportedTritonError
from .formats import Array

_REGISTERS = {".b32": 32, ".b16": 16}


def _float16(operation: Callable[..., Array]) -> Callable[..., Array]:
    """An operation of float32 values on both halves of registers, rounded once. Of NaN it makes 0x7fff."""

    def on_bits(*bits: Array) -> Array:
        with np.errstate(all="ignore"):
            result = operation(*(np.ascontiguousarray(part).view(np.float16).astype(np.float64) for part in bits))
            halves = result.astype(np.float16)
        return np.where(np.isnan(halves), np.uint16(0x7FFF), halves.view(np.uint16)).view(np.uint32)

    return on_bits


def _permute(low: Array, high: Array, selector: Array) -> Array:
    """prmt.b32: each byte is the one of the eight bytes of (high, low) that a nibble of the selector names."""
    chosen = int(selector.flat[0])
    if (selector != chosen).any() or chosen & 0x8888:
        raise UnsupportedTritonError(
            "prmt is known here with one selector for all elements and without replicated signs"
        )
    both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    picked = [(both >> np.uint64(8 * (chosen >> 4 * place & 7))) & np.uint64(0xFF) for place in range(4)]
    joined: Array = sum(byte << np.uint64(8 * place) for place, byte in enumerate(picked))  # type: ignore[assignment]
    return joined.astype(np.uint32)


def _float16_of_e4m3(codes: Array) -> Array:
    """cvt.rn.f16x2.e4m3x2: two codes of 16 bits as two float16; NaN is 0x7fff."""
    values = formats.float8_to_float32(np.ascontiguousarray(codes.astype(np.uint16)).view(np.uint8), "fp8e4nv")
    halves = np.where(np.isnan(values), np.uint16(0x7FFF), values.astype(np.float16).view(np.uint16))
    return np.ascontiguousarray(halves).view(np.uint32)


_INSTRUCTIONS: dict[str, Callable[..., Array]] = {
    "mov.b32": lambda a: a,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "xor.b32": np.bitwise_xor,
    "shr.b32": lambda a, by: np.where(by < 32, a >> np.minimum(by, 31), 0).astype(np.uint32),
    "prmt.b32": _permute,
    "mul.f16x2": _float16(np.multiply),
    "sub.f16x2": _float16(np.subtract),
    # The product of two float16 is exact in float64.
    "fma.rn.f16x2": _float16(lambda a, b, c: formats.odd_sum(a * b, c)),
    "cvt.rn.f16x2.e4m3x2": _float16_of_e4m3,
}


@functools.cache
def _parse(assembly: str) -> tuple[dict[str, int], tuple[tuple[str, tuple[str, ...]], ...]]:
    """(bits of each register that the text declares, its instructions with their operands)."""
    registers: dict[str, int] = {}
    instructions = []
    for statement in filter(None, (part.strip() for part in assembly.strip().strip("{}").split(";"))):
        name, _, rest = statement.partition(" ")
        if name == ".reg":
            kind, _, names = rest.partition(" ")
            if kind not in _REGISTERS:
                raise UnsupportedTritonError(
                    f"inline assembly here has registers of {', '.join(_REGISTERS)}, got {kind}"
                )
            registers |= dict.fromkeys(re.split(r",\s*", names.strip()), _REGISTERS[kind])
            continue
        if name not in _INSTRUCTIONS:
            raise UnsupportedTritonError(f"inline assembly here knows {', '.join(_INSTRUCTIONS)}, got {statement!r}")
        operands = re.findall(r"\{[^}]*\}|[^,\s][^,]*", rest)
        instructions.append((name, tuple(operand.strip() for operand in operands)))
    return registers, tuple(instructions)


def run(assembly: str, inputs: Sequence[Array], outputs: int) -> list[Array]:
    """What the text leaves in its first ``outputs`` registers, each of 32 bits.

    Args:
        assembly: PTX between braces, whose registers are ``$0`` … for outputs and then inputs, and those that it declares.
        inputs: arrays of ``uint32``, an element for each instance of the text.

    Raises:
        UnsupportedTritonError: an instruction, a register or a type that is not known here.
    """
    registers, instructions = _parse(assembly)
    shape = inputs[0].shape
    values: dict[str, Array] = {f"${outputs + place}": bits for place, bits in enumerate(inputs)}

    def read(operand: str) -> Array:
        if operand in values:
            return values[operand]
        try:
            return np.full(shape, int(operand, 0), np.uint32)
        except ValueError:
            raise UnsupportedTritonError(f"inline assembly reads {operand}, which holds nothing yet") from None

    for name, (target, *sources) in instructions:
        result = _INSTRUCTIONS[name](*map(read, sources))
        if target.startswith("{"):
            parts = [part.strip() for part in target.strip("{}").split(",")]
            if len(parts) != 2 or any(registers.get(part) != 16 for part in parts):
                raise UnsupportedTritonError(
                    f"inline assembly here takes a register apart into two of 16 bits, got {target}"
                )
            values |= {parts[0]: result & np.uint32(0xFFFF), parts[1]: result >> np.uint32(16)}
            continue
        values[target] = result
    return [read(f"${place}") for place in range(outputs)]


class _Results:
    """What Triton's frontend asks for the results of an operation that may have several."""

    def __init__(self, results: Sequence[Any]) -> None:
        self._results = results

    def get_result(self, place: int) -> Any:
        return self._results[place]


def create_inline_asm(original: Callable[..., Any]) -> Callable[..., Any]:
    """``InterpreterBuilder.create_inline_asm``, which the stock interpreter has not."""

    @functools.wraps(original)
    def method(
        builder: Any, inlineAsm: str, constraints: str, values: Any, type: Any, isPure: bool, pack: int
    ) -> _Results:
        kinds = [part.strip() for part in constraints.split(",")]
        outputs = kinds.count("=r")
        (target,) = type
        dtype = interpreter._get_np_dtype(target.scalar)
        packed = all(value.data.itemsize * pack == 4 for value in values)
        if kinds != ["=r"] * outputs + ["r"] * len(values) or not packed or dtype.itemsize * pack != 4 * outputs:
            raise UnsupportedTritonError(
                f"inline assembly here has inputs of one 32-bit register each and outputs that fill theirs, got {constraints!r} "
                f"for {pack} elements of {[str(value.dtype) for value in values]} and {target}"
            )
        shape = np.broadcast_shapes(*(value.data.shape for value in values))
        padding = -int(np.prod(shape)) % pack
        words = [
            np.pad(np.ascontiguousarray(np.broadcast_to(value.data, shape)).ravel(), (0, padding)).view(np.uint32)
            for value in values
        ]
        results = np.stack(run(inlineAsm, words, outputs), axis=-1).ravel().view(dtype)
        return _Results([interpreter.TensorHandle(results[: results.size - padding].reshape(shape), target.scalar)])

    return method
