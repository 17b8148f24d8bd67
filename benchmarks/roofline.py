"""The limits a kernel is measured against, measured themselves in the same run."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from pytransformer.benchmarks.timing import time_interleaved


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches.

    Attributes:
        copy: bytes read plus written per second by a large device-to-device copy.
        read: bytes per second of a large reduction, which only reads.
        matmul: FLOP per second of a large bfloat16 matrix product of random data.
    """

    copy: float
    read: float
    matmul: float

    def floor(self, flop: float, moved_bytes: float) -> float:
        """Seconds below which no kernel with this work can go: the larger of arithmetic and memory time."""
        return max(flop / self.matmul, moved_bytes / self.copy)

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def measure_ceilings(device: torch.device, *, small: bool = False) -> Ceilings:
    """Measures the three ceilings; ``small`` for a rehearsal on a CPU."""
    size = 512 if small else 8192
    count = 2**20 if small else 2**30
    source, target = torch.randn(count // 4, device=device), torch.empty(count // 4, device=device)
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    timings = time_interleaved(
        {
            "copy": [lambda: target.copy_(source)],
            "read": [source.sum],
            "matmul": [lambda: left @ right],
        },
        device,
        rounds=5 if small else 21,
        target_seconds=5e-3,
    )
    return Ceilings(
        2 * count / timings["copy"].median, count / timings["read"].median, 2 * size**3 / timings["matmul"].median
    )
