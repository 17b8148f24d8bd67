"""A benchmark row: one op at one shape, its work, its inputs, and the variants that compute it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pytransformer.benchmarks.roofline import Ceilings
from pytransformer.benchmarks.timing import time_interleaved

Inputs = dict[str, Any]
Variant = Callable[[Inputs], Any]

# Rotating input sets together exceed the L2 cache of the largest part by a good margin.
COLD_BYTES = 256 * 2**20
MAX_INPUT_SETS = 12


class Absent(Exception):
    """Raised by a variant that cannot run here, such as a peer that is not installed or does not serve this row; its message says why."""


@dataclass(frozen=True)
class Row:
    """One line of a benchmark table.

    Attributes:
        op, shape: what is computed.
        flop, moved_bytes: minimum work; the floor follows from them.
        inputs: draws one input set on a device.
        variants: name → call; "triton" and "cuda" are ours, the others are peers.
        golden: float64 result to compare a variant's result with, and how to pick the compared part out of the variant's result.
        memory_ceiling: "copy", or "read" for work that writes almost nothing.
        notes: variant → a sentence to print beside its figures.
        priority: 0 for the quick grid, 1 for the full one.
    """

    op: str
    shape: str
    flop: float
    moved_bytes: float
    inputs: Callable[[torch.device, int], Inputs]
    variants: dict[str, Variant]
    golden: Callable[[Inputs], Tensor]
    pick: Callable[[Any], Tensor]
    memory_ceiling: str = "copy"
    notes: dict[str, str] = field(default_factory=dict)
    priority: int = 1


@dataclass(frozen=True)
class Measurement:
    """A row that measures itself, in a unit of its own: tokens/s of a training, time of a first call, of an installation.

    Attributes:
        op, shape, notes, priority: as in a Row.
        unit: of the samples, such as "tokens/s" or "µs".
        variants: name → call that measures on a device and returns {"samples": [float, …]} and whatever else belongs into the record
            ("peak_memory_bytes", "mfu", …). It may raise Absent. "triton", "cuda", "torch" and "pytransformer" are ours.
        higher_is_better: True for rates.
    """

    op: str
    shape: str
    unit: str
    variants: dict[str, Callable[[torch.device], dict[str, Any]]]
    higher_is_better: bool = False
    notes: dict[str, str] = field(default_factory=dict)
    priority: int = 1


def relative_error(actual: Tensor, golden: Tensor) -> float:
    """‖actual − golden‖ / ‖golden‖ in float64; infinite if a value is not finite."""
    difference = actual.double() - golden
    error = float(difference.norm() / golden.norm().clamp_min(1e-300))
    return error if math.isfinite(error) else math.inf


def run_row(row: Row, device: torch.device, ceilings: Ceilings, *, rounds: int = 15) -> dict[str, Any]:
    """Checks, times and reports one row as a JSON-ready dictionary. A variant that raises is reported, and the others go on."""
    sets = _input_sets(row, device)
    golden = row.golden(sets[0])
    errors: dict[str, float] = {}
    absent: dict[str, str] = {}
    calls: dict[str, Sequence[Callable[[], object]]] = {}
    for name, variant in row.variants.items():
        try:
            errors[name] = relative_error(row.pick(variant(sets[0])), golden)
            calls[name] = [_bind(variant, inputs) for inputs in sets]
        except Exception as error:  # an absent or refusing peer must not end the run
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    timings = time_interleaved(calls, device, rounds=rounds) if calls else {}
    memory_rate = ceilings.read if row.memory_ceiling == "read" else ceilings.copy
    floor = max(row.flop / ceilings.matmul, row.moved_bytes / memory_rate)
    variants = {}
    for name, timing in timings.items():
        variants[name] = {
            "seconds": timing.median,
            "seconds_p10": timing.low,
            "seconds_p90": timing.high,
            "rounds": timing.rounds,
            "method": timing.method,
            "tflops": row.flop / timing.median * 1e-12,
            "gbytes_per_second": row.moved_bytes / timing.median * 1e-9,
            "fraction_of_floor": floor / timing.median,
            "relative_error": errors[name],
        }
    return {
        "op": row.op,
        "shape": row.shape,
        "flop": row.flop,
        "bytes": row.moved_bytes,
        "floor_seconds": floor,
        "input_sets": len(sets),
        "cold": len(sets) * row.moved_bytes >= COLD_BYTES,
        "variants": variants,
        "absent": absent,
        "notes": row.notes,
    }


def _input_sets(row: Row, device: torch.device) -> list[Inputs]:
    wanted = math.ceil(COLD_BYTES / max(row.moved_bytes, 1.0)) if device.type == "cuda" else 1
    return [row.inputs(device, seed) for seed in range(max(1, min(MAX_INPUT_SETS, wanted)))]


def _bind(variant: Variant, inputs: Inputs) -> Callable[[], object]:
    return lambda: variant(inputs)
