"""What an eager call costs the host: the public functions with the launch stubbed, beside torch's own layer_norm, in one run.

    python -m pytransformer.benchmarks.programs.host_cost [--repeats N] [--output FILE]

CPU tensors of one element (heads of 8, the smallest), backend="cuda" served by the extension built for the host emulator, whose launches
return at once, and backend="triton" by Triton's own launcher on a CUDA driver that does nothing (tests/support/triton_stub.py): what is
left is the checks, the choice of the backend, the dispatcher, the allocation of the results and Triton's launch, as on a GPU. It builds
both libraries itself and starts itself again with the environment in which the extension loads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from pytransformer.benchmarks.harness.paths import RESULTS, ROOT

RESULT = RESULTS / "cpu/host_cost.json"
BASE, BASE_WITH_BACKWARD = "F.layer_norm", "F.layer_norm, forward and backward"
BACKENDS = ("cuda", "triton")
# The most that a call may cost, in calls of what it is compared with, by backend.
SMALL = {"cuda": 2.0, "triton": 4.0}
ARCH = 90
# Untimed: the row before left the caches of the processor full of other code.
WARM_CALLS = 20
# A tenth of a time slice of a busy machine, so that the best repeat is one that was not interrupted.
CALLS = 100


class Row(NamedTuple):
    """One call.

    Attributes:
        name: of the call.
        backend: "cuda", "triton", or "torch" where it is what others are compared with.
        call: the call.
        base: name of the row it is compared with.
        limits: the most that it may cost by backend; one without a limit is for information.
    """

    name: str
    backend: str
    call: Callable[[], object]
    base: str = BASE
    limits: dict[str, float] = SMALL

    @property
    def limit(self) -> float | None:
        """For its own backend."""
        return self.limits.get(self.backend)


def rows() -> list[Row]:
    """All rows; what they are compared with comes first."""
    x, weight, bias = torch.randn(1, 1), torch.randn(1), torch.randn(1)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    found = [
        Row(BASE, "torch", lambda: F.layer_norm(x, (1,), weight, bias), limits={}),
        Row(
            BASE_WITH_BACKWARD,
            "torch",
            _with_backward(lambda: F.layer_norm(inputs[0], (1,), inputs[1], inputs[2]), inputs),
        ),
    ]
    for backend in BACKENDS:
        found += [*_norm_rows(backend), *_rope_rows(backend), *_cache_rows(backend)]
    return [*found, *_descriptor_rows()]


def _with_backward(forward: Callable[[], Any], inputs: Sequence[torch.Tensor]) -> Callable[[], object]:
    with torch.enable_grad():
        gradient = torch.ones_like(forward())

    def call() -> object:
        with torch.enable_grad():
            return torch.autograd.grad(forward(), inputs, gradient)

    return call


def _norm_rows(backend: str) -> list[Row]:
    from pytransformer import layer_norm, rms_norm

    x, residual, weight, bias = torch.randn(1, 1), torch.randn(1, 1), torch.randn(1), torch.randn(1)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    both = _with_backward(lambda: layer_norm(*inputs, backend=backend), inputs)
    return [
        Row("layer_norm", backend, lambda: layer_norm(x, weight, bias, backend=backend)),
        Row("layer_norm, residual", backend, lambda: layer_norm(x, weight, bias, residual=residual, backend=backend)),
        Row("rms_norm", backend, lambda: rms_norm(x, weight, backend=backend)),
        Row("rms_norm, residual", backend, lambda: rms_norm(x, weight, residual=residual, backend=backend)),
        Row("layer_norm, forward and backward", backend, both, BASE_WITH_BACKWARD, {"triton": 3.0}),
    ]


def _rope_rows(backend: str) -> list[Row]:
    from pytransformer import rope

    q, k, cos, sin = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8), torch.randn(4, 4), torch.randn(4, 4)
    input_q = q.clone().requires_grad_()
    both = _with_backward(lambda: rope(input_q, None, cos, sin, backend=backend)[0], [input_q])
    return [
        Row("rope", backend, lambda: rope(q, k, cos, sin, backend=backend)),
        Row("rope, in place", backend, lambda: rope(q, k, cos, sin, inplace=True, backend=backend)),
        Row("rope, forward and backward", backend, both, BASE_WITH_BACKWARD, {}),
    ]


def _cache_rows(backend: str) -> list[Row]:
    from pytransformer import attention, decode_attention, kv_append

    q, k, v, cos, sin = *(torch.randn(1, 1, 1, 8) for _ in range(3)), torch.randn(4, 4), torch.randn(4, 4)
    k_cache, v_cache = torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8)
    lengths, q_weight, k_weight = torch.zeros(1, dtype=torch.int32), torch.randn(8), torch.randn(8)
    k_codes, v_codes = (torch.zeros(1, 4, 1, 8, dtype=torch.int8) for _ in range(2))
    k_scale, v_scale = torch.zeros(1, 4, 1), torch.zeros(1, 4, 1)

    def rotating() -> object:
        return kv_append(k, v, k_cache, v_cache, cache_seqlens=lengths, q=q, cos=cos, sin=sin, backend=backend)

    def norming() -> object:
        return kv_append(
            k, v, k_cache, v_cache, cache_seqlens=lengths, q=q, cos=cos, sin=sin, q_norm_weight=q_weight, k_norm_weight=k_weight,
            backend=backend,
        )  # fmt: skip

    def quantising() -> object:
        return kv_append(
            k, v, k_codes, v_codes, cache_seqlens=lengths, q=q, cos=cos, sin=sin, k_scale=k_scale, v_scale=v_scale, backend=backend
        )  # fmt: skip

    # The extension's attention takes 16 bits.
    query, keys, values = (tensor.bfloat16() for tensor in (q, k_cache, v_cache))

    def decoding() -> object:
        return decode_attention(query, keys, values, lengths, backend=backend)

    # What these ask for goes through the extension's op with all arguments.
    rare = {"triton": SMALL["triton"]}
    inputs = [tensor.clone().requires_grad_() for tensor in (query, keys, values)]
    both = _with_backward(lambda: attention(*inputs, backend=backend), inputs)
    return [
        Row("kv_append", backend, lambda: kv_append(k, v, k_cache, v_cache, cache_seqlens=lengths, backend=backend)),
        Row("kv_append, q and RoPE", backend, rotating),
        Row("kv_append, q, RoPE and QK-norm", backend, norming, BASE, rare),
        Row("kv_append, q and RoPE, int8", backend, quantising, BASE, rare),
        Row("attention", backend, lambda: attention(query, keys, values, backend=backend), BASE, {"triton": 6.0}),
        Row("attention, forward and backward", backend, both, BASE_WITH_BACKWARD, {}),
        Row("decode_attention", backend, decoding, BASE, {"triton": 5.0}),
    ]


def _descriptor_rows() -> list[Row]:
    """A launch of a Gluon kernel alone, with four TMA descriptors: at addresses that it knows, at others, and as Triton launches it."""
    from pytransformer.kernels.hopper.descriptors import MOST_MAPS
    from tests.support import copy_kernel

    given = copy_kernel.tensors()
    kept, anew = copy_kernel.prepare(given), copy_kernel.prepare(copy_kernel.tensors(128))
    # More than are kept, all in one tensor: each is new when its turn comes again.
    memory = torch.zeros(MOST_MAPS + 256, 64, dtype=torch.bfloat16)
    addresses = itertools.cycle([memory[first : first + 128] for first in range(MOST_MAPS + 4)])

    def elsewhere() -> None:
        anew((next(addresses), next(addresses), given[2], next(addresses), next(addresses)), (0,))

    return [
        Row("launch, 4 descriptors", "triton", lambda: kept(given, (0,)), BASE, {"triton": 6.0}),
        Row("launch, 4 descriptors at new addresses", "triton", elsewhere, BASE, {}),
        Row("launch, 4 descriptors, by Triton", "triton", lambda: kept._launch_by_triton(given, (0,), -1), BASE, {}),
    ]


def measure(repeats: int, *, limited_only: bool = False) -> list[tuple[Row, float]]:
    """Microseconds per call of each row, or of those with a limit: the best of the repeats, in which the rows take turns."""
    from tests.support.emulator import configure
    from tests.support.triton_stub import stubbed_driver

    configure(stub_launches=True)
    with stubbed_driver(ARCH), torch.no_grad():
        every = rows()
        # Rows for information take turns among themselves: they are long, and would slow the row that comes after them.
        limited = [row for row in every if row.limit is not None or row.backend == "torch"]
        others = [] if limited_only else [row for row in every if row not in limited]
        return [*_best(limited, repeats), *_best(others, repeats)]


def _best(turns: Sequence[Row], repeats: int) -> list[tuple[Row, float]]:
    best = [float("inf")] * len(turns)
    for _ in range(repeats):
        for index, row in enumerate(turns):
            call = row.call
            for _ in range(WARM_CALLS):
                call()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            best[index] = min(best[index], (time.perf_counter() - start) / CALLS * 1e6)
    return list(zip(turns, best))


def report(measured: Sequence[tuple[Row, float]], repeats: int) -> dict[str, Any]:
    """The result file's content."""
    import triton

    from tests.support.triton_stub import STUBBED

    base = {row.name: value for row, value in measured if row.backend == "torch"}
    return {
        "what": "host time of one eager call, launch stubbed, CPU tensors of one element (heads of 8), no gradients unless said",
        "stubbed": {
            "cuda": ["launches, which return at once: the extension is built for the host emulator"],
            "triton": STUBBED,
        },
        "machine": {
            "processor": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "repeats": repeats,
        "calls_per_repeat": CALLS,
        "rows": [
            {
                "name": row.name,
                "backend": row.backend,
                "microseconds": round(value, 3),
                "of_base": round(value / base[row.name if row.backend == "torch" else row.base], 2),
                "limit": row.limit,
            }
            for row, value in measured
        ],
    }


def run_in_emulator(arguments: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
    """This module in a process that loads the emulated extension, built if need be."""
    from tests.support.emulator import builder, environment

    library = builder().build("emulated", quiet=True)
    variables = os.environ | environment("emulated", library) | {"PYTHONPATH": str(ROOT)}
    # A sanitizer of the caller would be measured too, and so would Triton's interpreter.
    variables = {name: value for name, value in variables.items() if name not in ("LD_PRELOAD", "TRITON_INTERPRET")}
    command = [sys.executable, "-m", "pytransformer.benchmarks.programs.host_cost", *arguments]
    return subprocess.run(command, env=variables, cwd=ROOT, text=True, check=False, **options)  # type: ignore[call-overload]


def first_launch() -> float:
    """Seconds of the first launch of this process, which compiles or finds its kernel on the disk."""
    from pytransformer import layer_norm
    from tests.support.triton_stub import stubbed_driver

    x, weight, bias = torch.randn(1, 1), torch.randn(1), torch.randn(1)
    with stubbed_driver(ARCH), torch.no_grad():
        layer_norm(x, weight, bias, backend="torch")
        start = time.perf_counter()
        layer_norm(x, weight, bias, backend="triton")
        return time.perf_counter() - start


def first_launches(processes: int = 3) -> dict[str, object]:
    """Seconds of a process's first launch with an empty cache on disk, and the best of those that find it filled."""
    with tempfile.TemporaryDirectory() as folder:
        variables = os.environ | {"TRITON_CACHE_DIR": folder}
        command = [sys.executable, "-m", "pytransformer.benchmarks.programs.host_cost", "--first-launch"]
        outputs = [
            subprocess.run(command, env=variables, cwd=ROOT, text=True, check=True, capture_output=True).stdout
            for _ in range(1 + processes)
        ]
    cold, *warm = (float(output) for output in outputs)
    what = "layer_norm's first call by Triton in a process: its disk cache empty, and filled by another process"
    return {"what": what, "cold": round(cold, 3), "warm": round(min(warm), 3)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the result file and prints its table."""
    parser = argparse.ArgumentParser(prog="python -m pytransformer.benchmarks.programs.host_cost", description=__doc__)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--limited-only", action="store_true", help="only the rows that have a limit")
    parser.add_argument("--first-launch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if "PYTRANSFORMER_CUDA_LIBRARY" not in os.environ:
        return run_in_emulator(sys.argv[1:] if argv is None else argv).returncode
    if arguments.first_launch:
        print(first_launch())
        return 0
    found = report(measure(arguments.repeats, limited_only=arguments.limited_only), arguments.repeats)
    if not arguments.limited_only:
        found["first_launch_seconds"] = first_launches()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'call':<40}{'backend':<8}{'µs':>8}{'of ' + BASE:>20}")
    for row in found["rows"]:
        print(f"{row['name']:<40}{row['backend']:<8}{row['microseconds']:>8.2f}{row['of_base']:>19.2f}×")
    return 0


if __name__ == "__main__":
    sys.exit(main())
