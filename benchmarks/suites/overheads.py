"""What a user waits for besides the kernels: the host's time for a call, the first call of a process, the installation."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import pytransformer
from pytransformer.benchmarks import peers
from pytransformer.benchmarks.definitions.cases import (
    ActivationCase,
    AppendCase,
    AttentionCase,
    DecodeCase,
    NormCase,
    RopeCase,
)
from pytransformer.benchmarks.harness.paths import ROOT
from pytransformer.benchmarks.harness.rows import Absent, Inputs, Measurement, Variant
from pytransformer.benchmarks.harness.timing import wait
from pytransformer.benchmarks.suites import activation, attention, decode_attention, kv_append, norm, rope
from pytransformer.benchmarks.suites.common import Wanted, our_backends

Measure = Callable[[torch.device], dict[str, Any]]

# --- launch: eager calls on tensors so small that only the host counts --------------------------------------------------------------------

# Beyond about a thousand launches in flight the driver makes the host wait for the device.
LAUNCH_CALLS = 200
LAUNCH_SAMPLES = 21


def launch(wanted: Wanted) -> Iterator[Measurement]:
    """Microseconds of the host for one eager call without gradients, ours and every peer that serves the op."""
    calls: list[tuple[Any, Callable[..., Inputs], Callable[[str | None, Inputs], Callable[[], object]]]] = [
        (NormCase("rms_norm", 4, 256), norm.draw, _rms_norm),
        (NormCase("layer_norm", 4, 256), norm.draw, _layer_norm),
        (RopeCase(4, 4, 2, 64), rope.draw, _rope),
        (AppendCase(2, 1, 4, 2, 64, fused=True), kv_append.draw, _append),
        (DecodeCase(2, 128, 4, 2, 64), decode_attention.draw, _decode),
        (AttentionCase(1, 128, 2, 2, 64), attention.draw, _attention),
        (ActivationCase("swiglu", 4, 256), activation.draw, _swiglu),
    ]
    for index, (case, draw, ours) in enumerate(calls):
        variants: dict[str, Measure] = {
            name: functools.partial(_host_time, case, draw, functools.partial(ours, backend))
            for name, backend in our_backends(wanted.device).items()
        }
        for name, variant in peers.variants(
            case.op, case, wanted.device, peers=wanted.peers, quick=wanted.quick
        ).items():
            variants[name] = functools.partial(_host_time, case, draw, functools.partial(_peer, variant))
        yield Measurement(
            f"launch {case.op}",
            f"{case.shape}, eager",
            "µs",
            variants,
            notes=peers.notes(case.op, variants),
            priority=0 if wanted.tiny or index == 0 else 1,
        )


def _peer(variant: Variant, inputs: Inputs) -> Callable[[], object]:
    return functools.partial(variant, inputs)


def _rms_norm(backend: str | None, inputs: Inputs) -> Callable[[], object]:
    x, weight = inputs["x"], inputs["weight"]
    return lambda: pytransformer.rms_norm(x, weight, backend=backend)


def _layer_norm(backend: str | None, inputs: Inputs) -> Callable[[], object]:
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    return lambda: pytransformer.layer_norm(x, weight, bias, backend=backend)


def _rope(backend: str | None, inputs: Inputs) -> Callable[[], object]:
    return functools.partial(pytransformer.rope, **inputs, backend=backend)


def _append(backend: str | None, inputs: Inputs) -> Callable[[], object]:
    return functools.partial(pytransformer.kv_append, **inputs, backend=backend)


def _decode(backend: str | None, inputs: Inputs) -> Callable[[], object]:
    return functools.partial(pytransformer.decode_attention, **inputs, backend=backend)


def _attention(backend: str | None, inputs: Inputs) -> Callable[[], object]:
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    return lambda: pytransformer.attention(q, k, v, causal=True, backend=backend)


def _swiglu(backend: str | None, inputs: Inputs) -> Callable[[], object]:
    gate, up = inputs["gate"], inputs["up"]
    return lambda: pytransformer.swiglu(gate, up, backend=backend)


def _host_time(
    case: Any, draw: Callable[..., Inputs], bind: Callable[[Inputs], Callable[[], object]], device: torch.device
) -> dict[str, Any]:
    """The clock is read when the last call has returned to the host, before the device is waited for."""
    with torch.no_grad():
        call = bind(draw(case, device, 0))
        for _ in range(3):
            call()
        samples = []
        repeats = LAUNCH_CALLS if device.type == "cuda" else 20
        for _ in range(LAUNCH_SAMPLES):
            wait(device)
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            samples.append((time.perf_counter() - start) / repeats * 1e6)
        wait(device)
    return {"samples": samples, "calls_per_sample": repeats}


# --- first call: a fresh process with an empty cache of kernels, and again with a full one ------------------------------------------------

FIRST_CALL = """
import sys
sys.path[:] = {path!r}
from pytransformer.benchmarks.suites import overheads
overheads.first_call({name!r}, {variant!r}, {device!r})
"""
# op → a call of a size that models use; each compiles kernels of its own.
FIRST_CALLS: dict[str, Any] = {
    "rms_norm forward": NormCase("rms_norm", 64, 4096),
    "attention forward": AttentionCase(1, 1024, 8, 2, 128),
    "attention backward": AttentionCase(1, 1024, 8, 2, 128, backward=True),
    "decode_attention": DecodeCase(1, 1024, 32, 8, 128),
}
TINY_FIRST_CALLS: dict[str, Any] = {"rms_norm tiny": NormCase("rms_norm", 4, 256)}
PROCESS_SECONDS = 240


def compile_time(wanted: Wanted) -> Iterator[Measurement]:
    """Seconds of the first call in a fresh process, with an empty cache on disk ("cold") and with what that call left there ("warm")."""
    for name, case in (TINY_FIRST_CALLS if wanted.tiny else FIRST_CALLS).items():
        names = [label for label in our_backends(wanted.device) if label != "cuda"]
        if not wanted.tiny:
            names += [
                peer
                for peer in peers.variants(case.op, case, wanted.device, peers=wanted.peers)
                if peer in ("torch_compile", "flex", "liger", "quack", "flash_attn_4")
            ]
        yield Measurement(
            "first call",
            name,
            "s",
            {
                f"{variant} {state}": functools.partial(_first_calls, name, variant, state)
                for variant in names
                for state in (("cold",) if wanted.tiny else ("cold", "warm"))
            },
            priority=0 if wanted.tiny else 1,
        )


def _first_calls(name: str, variant: str, state: str, device: torch.device) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        if state == "warm":
            _run_first_call(name, variant, device, folder)
        seconds, process = _run_first_call(name, variant, device, folder)
    return {"samples": [seconds], "process_seconds": process}


def _run_first_call(name: str, variant: str, device: torch.device, folder: str) -> tuple[float, float]:
    """Seconds of the first call, and of the whole process."""
    caches = {
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "CUDA_CACHE_PATH": "cuda",
        "CUTE_DSL_CACHE_DIR": "cute",
        "QUACK_CACHE_DIR": "quack",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "flash_attn",
        "PYTRANSFORMER_CACHE_DIR": "pytransformer",
    }
    environment = {**os.environ, **{key: f"{folder}/{value}" for key, value in caches.items()}}
    # FlashAttention keeps nothing on disk unless it is asked to.
    environment["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "1"
    program = FIRST_CALL.format(path=sys.path, name=name, variant=variant, device=str(device))
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PROCESS_SECONDS,
        check=False,
    )
    process = time.perf_counter() - start
    if result.returncode:
        raise RuntimeError((result.stderr.strip().splitlines() or ["the process failed"])[-1])
    return float(result.stdout.split()[-1]), process


def first_call(name: str, variant: str, device_name: str) -> None:
    """In the fresh process: draws the inputs, waits for the device, then prints the seconds of the first call until its result is there."""
    device = torch.device(device_name)
    case = {**FIRST_CALLS, **TINY_FIRST_CALLS}[name]
    suite: Any = {"attention": attention, "decode_attention": decode_attention}.get(case.op, norm)
    row = suite._row(Wanted(device, peers=True), case, 0)
    inputs = row.inputs(device, 0)
    wait(device)
    start = time.perf_counter()
    row.variants[variant](inputs)
    wait(device)
    print(time.perf_counter() - start)


# --- install ------------------------------------------------------------------------------------------------------------------------------


def install(wanted: Wanted) -> Iterator[Measurement]:
    """Seconds to make a wheel without the CUDA extension, and to install it into a fresh environment, offline."""
    # An installed package has no sources to install.
    if (ROOT / "setup.py").is_file():
        yield Measurement(
            "install",
            "wheel without the CUDA extension",
            "s",
            {"pytransformer wheel": _wheel_seconds, "pytransformer install": _install_seconds},
            priority=0 if wanted.tiny else 1,
        )


def _wheel(folder: Path) -> float:
    """Without isolation, which would download setuptools; torch and ninja are not needed for it."""
    if importlib.util.find_spec("setuptools") is None:
        raise Absent("setuptools is needed to make a wheel offline")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    return _timed([*command, "--wheel-dir", str(folder), str(ROOT)])


def _wheel_seconds(device: torch.device) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return {"samples": [_wheel(Path(folder))]}


def _install_seconds(device: torch.device) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        _wheel(Path(folder))
        venv.create(Path(folder) / "environment", with_pip=False)
        (wheel,) = Path(folder).glob("*.whl")
        python = Path(folder) / "environment/bin/python"
        command = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
        ]
        return {"samples": [_timed([*command, str(wheel)])], "wheel_bytes": wheel.stat().st_size}


def _timed(command: list[str]) -> float:
    environment = {**os.environ, "PYTRANSFORMER_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    start = time.perf_counter()
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PROCESS_SECONDS, check=False
    )
    if result.returncode:
        raise RuntimeError((result.stderr.strip().splitlines() or ["pip failed"])[-1])
    return time.perf_counter() - start
