"""A benchmark row: one op at one shape, its work, its inputs, and the variants that compute it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pytransformer.benchmarks.harness.record import clocks
from pytransformer.benchmarks.harness.roofline import Ceilings
from pytransformer.benchmarks.harness.timing import (
    ContextLost,
    Sampling,
    Timing,
    context_is_lost,
    reason_of,
    time_interleaved,
)

Inputs = dict[str, Any]
Variant = Callable[[Inputs], Any]
Progress = Callable[[str], None]

# Variants with these names, or whose names begin with one of them and a space, are ours; all others are peers.
OURS = ("cuda", "triton", "torch", "pytransformer")
# Rotating input sets together move this many times what the L2 cache holds: nothing survives from one turn to the next.
COLD_FACTOR = 3
MAX_INPUT_SETS = 64
# Share of the memory that was free before the row which its input sets may take; results and saved tensors need the rest.
INPUT_MEMORY_SHARE = 0.4
# bfloat16 keeps 8 bits, and each variant rounds at most a few times.
LARGEST_ERROR = 4 * torch.finfo(torch.bfloat16).eps


def is_ours(variant: str) -> bool:
    """Whether a variant is a backend of ours rather than a peer."""
    return variant.split(" ", 1)[0] in OURS


class Absent(Exception):
    """Raised by a variant that cannot run here, such as a peer that is not installed or does not serve this row; its message says why."""


# What a variant raises that cannot run here: it is absent, and has not failed.
UNAVAILABLE = (Absent, NotImplementedError, ModuleNotFoundError)


@dataclass(frozen=True)
class Row:
    """One line of a benchmark table.

    Attributes:
        op, shape: what is computed.
        flop, moved_bytes: minimum work; the floor follows from them.
        inputs: draws one input set on a device.
        variants: name → call; `OURS` says which names are ours, the others are peers.
        golden: float64 result to compare a variant's result with, and how to pick the compared part out of the variant's result.
        memory_ceiling: "copy", or "read" for work that writes almost nothing.
        notes: variant → a sentence to print beside its figures.
        priority: 0 for the quick grid, 1 for the full one.
        largest_error: a result farther than this from the golden one (relative, in the 2-norm) is wrong, and is not timed.
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
    largest_error: float = LARGEST_ERROR


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


@dataclass(frozen=True)
class Options:
    """How rows are run.

    Attributes:
        sampling: samples of each variant.
        seed: of the first input set; the others follow it.
        skip: variant → why it is not to be run again (it took a process down before).
        progress: called with the name of the variant that is about to run, with "" where all or none of them do.
    """

    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    skip: Mapping[str, str] = field(default_factory=dict)
    progress: Progress = lambda _: None


@dataclass
class _Checked:
    """Variants of a row after their first call."""

    errors: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def run_row(row: Row, device: torch.device, ceilings: Ceilings, options: Options | None = None) -> dict[str, Any]:
    """Checks, times and reports one row as a JSON-ready dictionary. A variant that raises is reported, and the others go on.

    Raises:
        ContextLost: the process can do nothing more on its GPU.
        Exception: whatever drawing the inputs or the golden result raises.
    """
    options = options or Options()
    start = time.monotonic()
    options.progress("")
    sets = _input_sets(row, device, options.seed)
    checked = _check(row, sets[0], device, options)
    calls = {name: [_bind(row.variants[name], inputs) for inputs in sets] for name in checked.errors}
    before = clocks(device)
    timings = time_interleaved(calls, device, options.sampling, options.progress)
    after = clocks(device)
    floor = ceilings.floor(row.flop, row.moved_bytes, row.memory_ceiling)
    variants = {name: _figures(row, floor, timing) for name, timing in timings.found.items()}
    for name, figures in variants.items():
        figures["relative_error"] = checked.errors[name]
        if name in checked.memory:
            figures["peak_memory_bytes"] = checked.memory[name]
    return {
        "op": row.op,
        "shape": row.shape,
        "priority": row.priority,
        "flop": row.flop,
        "bytes": row.moved_bytes,
        "memory_ceiling": row.memory_ceiling,
        "floor_seconds": floor,
        "input_sets": len(sets),
        "l2": _l2_state(row, len(sets), device),
        "variants": variants,
        "absent": checked.absent,
        "failed": {**checked.failed, **timings.failed},
        "notes": row.notes,
        "clocks": {"before": before, "after": after},
        "seconds": time.monotonic() - start,
    }


def _check(row: Row, inputs: Inputs, device: torch.device, options: Options) -> _Checked:
    """Each variant once, compared with float64; on a GPU a second time, for the memory that it needs beyond its inputs."""
    golden = row.golden(inputs)
    checked = _Checked()
    for name, variant in row.variants.items():
        if name in options.skip:
            checked.failed[name] = options.skip[name]
            continue
        options.progress(name)
        with _survived(name, device, checked.absent, checked.failed):
            error = relative_error(row.pick(variant(inputs)), golden)
            if error > row.largest_error:
                checked.failed[name] = (
                    f"wrong result: relative error {error:.2g} against float64, allowed {row.largest_error:.2g}"
                )
                continue
            if device.type == "cuda":
                checked.memory[name] = _peak_memory(variant, inputs, device)
            checked.errors[name] = error
        if checked.failed.get(name, "").startswith("out of memory"):
            # What it had taken is of no use to the others in pieces.
            torch.cuda.empty_cache()
    return checked


@contextlib.contextmanager
def _survived(name: str, device: torch.device, absent: dict[str, str], failed: dict[str, str]) -> Iterator[None]:
    """What a variant raises becomes the reason why it has no figures: it must not end the run.

    Raises:
        ContextLost: the process can do nothing more on its GPU.
    """
    try:
        yield
    except UNAVAILABLE as error:
        absent[name] = reason_of(error).removeprefix("Absent: ")
    except ContextLost:
        raise
    except Exception as error:
        failed[name] = reason_of(error)
        if context_is_lost(device):
            raise ContextLost(name, failed[name]) from error


def _peak_memory(variant: Variant, inputs: Inputs, device: torch.device) -> int:
    """Bytes allocated at most during a call, beyond what was allocated before it; the result counts."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = variant(inputs)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def _figures(row: Row, floor: float, timing: Timing) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "seconds": timing.median,
        "seconds_p10": timing.low,
        "seconds_p90": timing.high,
        "rounds": timing.rounds,
        "samples": list(timing.samples),
        "method": timing.method,
        "tflops": row.flop / timing.median * 1e-12,
        "gbytes_per_second": row.moved_bytes / timing.median * 1e-9,
        "fraction_of_floor": floor / timing.median,
    }
    if timing.note:
        figures["method_note"] = timing.note
    return figures


def run_measurement(row: Measurement, device: torch.device, options: Options | None = None) -> dict[str, Any]:
    """Runs and reports a row that measures itself, as a JSON-ready dictionary."""
    options = options or Options()
    start = time.monotonic()
    variants: dict[str, Any] = {}
    absent: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name, variant in row.variants.items():
        if name in options.skip:
            failed[name] = options.skip[name]
            continue
        options.progress(name)
        with _survived(name, device, absent, failed):
            found = variant(device)
            timing = Timing.of(found["samples"], "own")
            details = {key: value for key, value in found.items() if key != "samples"}
            variants[name] = {
                "value": timing.median,
                "p10": timing.low,
                "p90": timing.high,
                "samples": list(timing.samples),
                "details": details,
            }
    return {
        "op": row.op,
        "shape": row.shape,
        "priority": row.priority,
        "unit": row.unit,
        "higher_is_better": row.higher_is_better,
        "variants": variants,
        "absent": absent,
        "failed": failed,
        "notes": row.notes,
        "clocks": {"after": clocks(device)},
        "seconds": time.monotonic() - start,
    }


def _input_sets(row: Row, device: torch.device, seed: int) -> list[Inputs]:
    """One input set on a CPU; on a GPU as many as make the L2 cache cold, and as memory has room for."""
    if device.type != "cuda":
        return [row.inputs(device, seed)]
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    sets = [row.inputs(device, seed)]
    set_bytes = tensor_bytes(sets[0])
    if any(isinstance(value, Tensor) and value.requires_grad for value in sets[0].values()):
        # Each variant keeps what its forward pass saves for each set.
        set_bytes += len(row.variants) * int(row.moved_bytes)
    room = int(INPUT_MEMORY_SHARE * free / max(set_bytes, 1))
    for index in range(1, min(_sets_for_cold(row, device), room, MAX_INPUT_SETS)):
        try:
            sets.append(row.inputs(device, seed + index))
        except torch.OutOfMemoryError:
            break
    return sets


def _sets_for_cold(row: Row, device: torch.device) -> int:
    """Two at least: what a set touched last is still in the cache when the same set comes again at once."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.ceil(COLD_FACTOR * cache / max(row.moved_bytes, 1.0)))


def _l2_state(row: Row, sets: int, device: torch.device) -> str:
    if device.type != "cuda":
        return "uncontrolled"
    return "cold" if sets >= _sets_for_cold(row, device) else "warm"


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dictionaries and sequences; views of one storage count once."""
    storages: dict[int, int] = {}

    def visit(item: Any) -> None:
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, Mapping):
            for part in item.values():
                visit(part)
        elif isinstance(item, Sequence) and not isinstance(item, str):
            for part in item:
                visit(part)

    visit(value)
    return sum(storages.values())


def _bind(variant: Variant, inputs: Inputs) -> Callable[[], object]:
    return lambda: variant(inputs)
