"""`make gpu`: everything that needs a GPU, in one command: the CUDA extension built, tests on the device, sanitizers, benchmarks, a table.

Works from a clean checkout, offline, with whatever torch >= 2.10 and triton >= 3.6 are installed. Each part is a process of its own: a
part that fails, hangs or brings the CUDA context down does not stop the others. Logs and JSON go to the folder named by the environment
variable OUT (default gpu-results/). ``--rehearse`` walks through the same parts on a machine without a GPU, at tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Seconds, together under the eight minutes that one run may take.
BUILD_SECONDS = 100
TEST_SECONDS = 200
SANITIZER_SECONDS = 20
BENCHMARK_SECONDS = 100


@dataclass(frozen=True)
class Part:
    """One command: its name, and how it ended."""

    name: str
    status: str
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all parts; 0 if each of them passed."""
    parser = argparse.ArgumentParser(prog="python -m pytransformer.benchmarks.gpu", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="walk through on a machine without a GPU")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")), help="folder for logs and JSON"
    )
    arguments = parser.parse_args(argv)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    problem = None if arguments.rehearse else missing()
    if problem:
        print(f"make gpu: {problem}", file=sys.stderr)
        return 2
    parts = [build_extension(out, arguments.rehearse), run_tests(out, arguments.rehearse)]
    for backend in ("triton", "cuda"):
        parts.extend(run_sanitizer(out, tool, backend, arguments.rehearse) for tool in ("memcheck", "racecheck"))
    parts.append(run_benchmarks(out, arguments.rehearse))
    print(report(parts, out))
    return 0 if all(part.status in ("passed", "not available") for part in parts) else 1


def missing() -> str | None:
    """What keeps this machine from running the parts, in one sentence, or ``None``."""
    for package, floor in (("torch", (2, 10)), ("triton", (3, 6))):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed for {sys.executable}"
        version = __import__(package).__version__
        if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < floor:
            return f"{package} {version} is too old: at least {floor[0]}.{floor[1]} is needed"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no GPU on this machine; --rehearse walks through the parts without one"
    return None


def _run(name: str, command: Sequence[str], log: Path, limit: float, environment: dict[str, str] | None = None) -> Part:
    """Runs a command with a time limit, its output going to a log and its last lines to the terminal."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            code = None
    seconds = time.monotonic() - start
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(lines[-25:]))
    status = "passed" if code == 0 else ("ran past its limit" if code is None else f"failed (exit {code})")
    print(f"-- {name}: {status} in {seconds:.0f} s; all of it in {log}", flush=True)
    return Part(name, status, seconds)


def build_extension(out: Path, rehearse: bool) -> Part:
    """The CUDA extension for the GPUs that are here; without nvcc the rest goes on with Triton."""
    if rehearse or (shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists()):
        print("\n== extension: " + ("not rehearsed" if rehearse else "nvcc is not on this machine"))
        return Part("extension", "not available", 0.0)
    return _run("extension", [sys.executable, "csrc/build.py"], out / "extension.log", BUILD_SECONDS)


def run_tests(out: Path, rehearse: bool) -> Part:
    """The test suite on the device; kernels are compiled, not interpreted."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not slow",
        f"--junitxml={out / 'tests.xml'}",
        "--maxfail=60",
    ]
    if importlib.util.find_spec("xdist") is not None and not rehearse:
        command += ["-n", str(max(1, min(12, (os.cpu_count() or 2) - 2)))]
    command += (
        ["tests/ops/test_norm.py"]
        if rehearse
        else ["tests/cuda", "tests/kernels", "tests/ops", "tests/nn", "tests/model", "tests/generation"]
    )
    return _run("tests", command, out / "tests.log", TEST_SECONDS, {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"})


def run_sanitizer(out: Path, tool: str, backend: str, rehearse: bool) -> Part:
    """compute-sanitizer over the small cases of `verify`; where it is absent or refuses the device, that is what the table says."""
    name = f"{tool} {backend}"
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists() or rehearse:
        print(
            f"\n== {name}: compute-sanitizer is not on this machine" if not rehearse else f"\n== {name}: not rehearsed"
        )
        return Part(name, "not available", 0.0)
    verify = [sys.executable, "-m", "pytransformer.cli.verify", "verify"]
    verify += ["--backend", backend, "--dtype", "bfloat16", "--seeds", "1"]
    command = [program, "--tool", tool, "--error-exitcode", "9", *verify]
    # Without torch's caching allocator each tensor is an allocation of its own, so an overrun is seen.
    environment = {"PYTHONPATH": ".", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return _run(name, command, out / f"{tool}-{backend}.log", SANITIZER_SECONDS, environment)


def run_benchmarks(out: Path, rehearse: bool) -> Part:
    """The benchmark grid, most important rows first."""
    command = [sys.executable, "-m", "pytransformer.benchmarks.run", "--out", str(out / "benchmarks.json")]
    command += ["--tiny"] if rehearse else ["--limit-seconds", str(BENCHMARK_SECONDS - 30)]
    return _run("benchmarks", command, out / "benchmarks.log", BENCHMARK_SECONDS, {"PYTHONPATH": "."})


def report(parts: Sequence[Part], out: Path) -> str:
    """The closing table: parts, tests by file, fraction of floor by benchmark row."""
    lines = ["", "== Summary"]
    lines.extend(f"{part.name:<22} {part.status:<24} {part.seconds:>6.0f} s" for part in parts)
    lines.extend(["", f"{'tests':<52} passed failed skipped", *_test_lines(out / "tests.xml")])
    lines.extend(["", f"{'benchmark':<64} fraction of floor", *_benchmark_lines(out / "benchmarks.json")])
    return "\n".join(lines)


def _test_lines(path: Path) -> list[str]:
    if not path.exists():
        return ["no test report was written"]
    counts: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else ("skipped" if "skipped" in kinds else "passed")
        counts.setdefault((case.get("classname") or "?").replace("tests.", "", 1), Counter())[outcome] += 1
    return [f"{name:<52} {c['passed']:>6} {c['failed']:>6} {c['skipped']:>7}" for name, c in sorted(counts.items())]


def _benchmark_lines(path: Path) -> list[str]:
    if not path.exists():
        return ["no benchmark was written"]
    lines = []
    for row in json.loads(path.read_text())["rows"]:
        variants: dict[str, Any] = row["variants"]
        figures = "  ".join(f"{name} {100 * variant['fraction_of_floor']:.0f} %" for name, variant in variants.items())
        missing_ones = "  ".join(f"{name} absent" for name in row["absent"])
        lines.append(f"{row['op'] + ' ' + row['shape']:<64} {figures}  {missing_ones}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
