"""Small rows and synthetic records, which are never results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer.benchmarks.harness.record import new_content
from pytransformer.benchmarks.harness.rows import Row, Variant

ENVIRONMENT = {
    "time": "2026-01-02T03:04:05Z",
    "python": "3.11.7",
    "torch": "2.13.0",
    "triton": "3.9.0",
    "version": "0.1.0",
    "revision": "0123456789ab",
    "device": "Synthetic GPU",
    "device_type": "cuda",
    "threads": 1,
    "sms": 132,
    "l2_bytes": 60 * 2**20,
    "memory_bytes": 139 * 2**30,
    "compute_capability": "9.0",
    "cuda": "13.0",
    "driver": "580.0",
}
CEILINGS = {"copy": 4.3e12, "read": 4.4e12, "matmul": 7.8e14}
OPTIONS = {"grid": "quick", "ops": [], "peers": True, "seed": 0, "rounds": 11, "max_rounds": 41}


def doubling(**variants: Variant) -> Row:
    """A row that doubles eight numbers."""

    def inputs(device: torch.device, seed: int) -> dict[str, Any]:
        return {"x": torch.arange(1.0, 9.0, device=device) + seed}

    def double(drawn: dict[str, Any]) -> Tensor:
        return 2 * drawn["x"]

    return Row(
        "doubling",
        "8",
        8.0,
        64.0,
        inputs,
        {"torch": double, **variants},
        lambda drawn: 2 * drawn["x"].double(),
        lambda out: out,
    )


def figures(row: dict[str, Any], samples: list[float], error: float = 1e-3) -> dict[str, Any]:
    """A variant of a record, from its samples."""
    ordered = sorted(samples)
    middle = ordered[len(ordered) // 2]
    return {
        "seconds": middle,
        "seconds_p10": ordered[0],
        "seconds_p90": ordered[-1],
        "rounds": len(samples),
        "samples": samples,
        "method": "graph",
        "tflops": row["flop"] / middle * 1e-12,
        "gbytes_per_second": row["bytes"] / middle * 1e-9,
        "fraction_of_floor": row["floor_seconds"] / middle,
        "relative_error": error,
        "peak_memory_bytes": 1 << 20,
    }


def row(op: str, shape: str, flop: float, moved: float, samples: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    """A row of a record."""
    found: dict[str, Any] = {
        "op": op,
        "shape": shape,
        "priority": 0,
        "flop": flop,
        "bytes": moved,
        "memory_ceiling": "copy",
        "floor_seconds": max(flop / CEILINGS["matmul"], moved / CEILINGS["copy"]),
        "input_sets": 3,
        "l2": "cold",
        "absent": {},
        "failed": {},
        "notes": {},
        "clocks": {},
        "seconds": 1.0,
        **more,
    }
    found["variants"] = {name: figures(found, times) for name, times in samples.items()}
    return found


def record_of(
    rows: list[dict[str, Any]], measurements: list[dict[str, Any]] | None = None, **where: Any
) -> dict[str, Any]:
    """A complete record of these rows."""
    content = new_content({**ENVIRONMENT, **where}, dict(OPTIONS))
    content.update(
        complete=True,
        seconds=12.0,
        ceilings=dict(CEILINGS),
        ceilings_after=dict(CEILINGS),
        ceilings_drift=0.004,
        rows=rows,
        measurements=measurements or [],
    )
    return content


def measurement(op: str, shape: str, unit: str, samples: dict[str, list[float]], higher: bool) -> dict[str, Any]:
    """A measurement of a record."""
    variants = {}
    for name, values in samples.items():
        ordered = sorted(values)
        variants[name] = {
            "value": ordered[len(ordered) // 2],
            "p10": ordered[0],
            "p90": ordered[-1],
            "samples": values,
            "details": {},
        }
    return {
        "op": op,
        "shape": shape,
        "priority": 0,
        "unit": unit,
        "higher_is_better": higher,
        "variants": variants,
        "absent": {},
        "failed": {},
        "notes": {},
        "clocks": {},
        "seconds": 1.0,
    }


def attention_row(seqlen: int, speed: dict[str, float], noise: float = 0.002) -> dict[str, Any]:
    """Causal attention forward with 16k tokens, at given TFLOP/s."""
    batch, heads, dim = 16384 // seqlen, 32, 128
    flop = 2.0 * batch * heads * seqlen * seqlen * dim
    moved = 2.0 * 16384 * dim * (2 * heads + 2 * 8)
    samples = {
        name: [flop / (value * 1e12) * (1 + noise * (step - 5)) for step in range(11)] for name, value in speed.items()
    }
    return row("attention_forward", f"causal B{batch} L{seqlen} H32/8 d128 bf16", flop, moved, samples)
