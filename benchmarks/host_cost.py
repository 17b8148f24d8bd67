"""What an eager call costs the host: the public functions with the launch stubbed, beside torch's own layer_norm, in one run.

    python -m pytransformer.benchmarks.host_cost [--repeats N] [--output FILE]

CPU tensors of one element, no gradients, backend="cuda" served by the extension built for the host emulator, whose launches return at
once: what is left is the checks, the choice of the backend, the dispatcher and the allocation of the results, as on a GPU. It builds that
library itself and starts itself again with the environment in which it loads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/cpu/host_cost.json"
BASE = "F.layer_norm"
CALLS = 100  # a tenth of a time slice of a busy machine, so that the best repeat is one that was not interrupted


def rows() -> list[tuple[str, Callable[[], object]]]:
    """Name and call of each row; the first is what the others are compared with."""
    from pytransformer import kv_append, layer_norm, rms_norm, rope

    x, weight, bias = torch.randn(1, 1), torch.randn(1), torch.randn(1)
    q, table = torch.randn(1, 1, 1, 8), torch.randn(4, 4)
    cache = {"k_cache": torch.zeros(1, 4, 1, 8), "v_cache": torch.zeros(1, 4, 1, 8), "backend": "cuda"}
    where = {"cache_seqlens": torch.zeros(1, dtype=torch.int32), **cache}
    return [
        (BASE, lambda: F.layer_norm(x, (1,), weight, bias)),
        ("layer_norm", lambda: layer_norm(x, weight, bias, backend="cuda")),
        ("layer_norm, residual", lambda: layer_norm(x, weight, bias, residual=x, backend="cuda")),
        ("rms_norm", lambda: rms_norm(x, weight, backend="cuda")),
        ("rms_norm, residual", lambda: rms_norm(x, weight, residual=x, backend="cuda")),
        ("rope", lambda: rope(q, q, table, table, backend="cuda")),
        ("rope, in place", lambda: rope(q, q, table, table, inplace=True, backend="cuda")),
        ("kv_append", lambda: kv_append(q, q, **where)),
        ("kv_append, q and RoPE", lambda: kv_append(q, q, q=q, cos=table, sin=table, **where)),
    ]


def measure(repeats: int) -> dict[str, float]:
    """Microseconds per call of each row: the best of the repeats, in which the rows take turns."""
    from tests.support.emulator import configure

    configure(stub_launches=True)
    calls = rows()
    best = dict.fromkeys((name for name, _ in calls), float("inf"))
    with torch.no_grad():
        for _ in range(repeats):
            for name, call in calls:
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                best[name] = min(best[name], (time.perf_counter() - start) / CALLS * 1e6)
    return best


def report(microseconds: dict[str, float], repeats: int) -> dict[str, object]:
    base = microseconds[BASE]
    return {
        "what": "host time of one eager call, launch stubbed, CPU tensors of one element, no gradients",
        "machine": {"processor": platform.machine(), "python": platform.python_version(), "torch": torch.__version__},
        "repeats": repeats,
        "calls_per_repeat": CALLS,
        "rows": [
            {"name": name, "microseconds": round(value, 3), "of_base": round(value / base, 2)}
            for name, value in microseconds.items()
        ],
    }


def run_in_emulator(arguments: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
    """This module in a process that loads the emulated extension, built if need be."""
    from tests.support.emulator import builder, environment

    library = builder().build("emulated", quiet=True)
    variables = os.environ | environment("emulated", library) | {"PYTHONPATH": str(ROOT)}
    variables.pop("LD_PRELOAD", None)  # a sanitizer of the caller would be measured too
    command = [sys.executable, "-m", "pytransformer.benchmarks.host_cost", *arguments]
    return subprocess.run(command, env=variables, cwd=ROOT, text=True, check=False, **options)  # type: ignore[call-overload]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pytransformer.benchmarks.host_cost", description=__doc__)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    if "PYTRANSFORMER_CUDA_LIBRARY" not in os.environ:
        return run_in_emulator(["--repeats", str(arguments.repeats), "--output", str(arguments.output)]).returncode
    found = report(measure(arguments.repeats), arguments.repeats)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'call':<24}{'µs':>8}{'of ' + BASE:>20}")
    for row in found["rows"]:  # type: ignore[attr-defined]
        print(f"{row['name']:<24}{row['microseconds']:>8.2f}{row['of_base']:>19.2f}×")
    return 0


if __name__ == "__main__":
    sys.exit(main())
