"""The limits a kernel is measured against, measured themselves in the same run."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from pytransformer.benchmarks.harness.timing import Sampling, time_interleaved


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

    def memory_rate(self, kind: str) -> float:
        """Bytes per second for "copy", or for "read": a stream that only reads is not slower than one that writes as well."""
        return max(self.read, self.copy) if kind == "read" else self.copy

    def floor(self, flop: float, moved_bytes: float, kind: str = "copy") -> float:
        """Seconds below which no kernel with this work can go: the larger of arithmetic and memory time."""
        return max(flop / self.matmul, moved_bytes / self.memory_rate(kind))

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def measure_ceilings(device: torch.device, *, small: bool = False) -> Ceilings:
    """Measures the three ceilings; ``small`` for a CPU.

    Raises:
        RuntimeError: one of the three could not be timed.
    """
    size = 512 if small else 8192
    bytes_each = 2**22 if small else 2**30
    source, target = torch.randn(bytes_each // 4, device=device), torch.empty(bytes_each // 4, device=device)
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    sampling = Sampling(rounds=5, max_rounds=9) if small else Sampling(rounds=21, sample_seconds=5e-3)
    timings = time_interleaved(
        {
            "copy": [lambda: target.copy_(source)],
            "sum": [source.sum],
            "max": [source.amax],
            "matmul": [lambda: left @ right],
        },
        device,
        sampling,
    )
    if timings.failed:
        raise RuntimeError(f"the limits of this device could not be measured: {timings.failed}")
    seconds = {name: timing.median for name, timing in timings.found.items()}
    return Ceilings(
        copy=2 * bytes_each / seconds["copy"],
        read=bytes_each / min(seconds["sum"], seconds["max"]),
        matmul=2 * size**3 / seconds["matmul"],
    )
