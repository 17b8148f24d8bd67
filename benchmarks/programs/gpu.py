"""`make gpu`: everything that needs a GPU, in one command: the CUDA extension built, tests on the device, benchmarks, sanitizers, a table.

Works from a clean checkout, offline, with whatever torch >= 2.10 and triton >= 3.6 are installed. Each part is a process of its own: a
part that fails, hangs or brings the CUDA context down does not stop the others. The most important comes first: tests, the quick grid, the
sanitizers, then as much of the full grid as the time allows. Logs and JSON go to the folder named by the environment variable OUT (default
gpu-results/); benchmarks that were cut off there are continued. ``--rehearse`` walks through the same parts on a machine without a GPU, and
through a cut-off and failing rows.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# All parts together: under the eight minutes that one run may take.
MINUTES = 7.75
PARTS = ("build", "tests", "quick", "sanitizers", "full")
SANITIZERS = [(tool, backend) for backend in ("triton", "cuda") for tool in ("memcheck", "racecheck")]
TESTS = [
    *("tests/cuda", "tests/kernels", "tests/ops", "tests/nn", "tests/model", "tests/generation"),
    *("tests/benchmarks/harness/test_timing.py", "tests/benchmarks/harness/test_rows.py"),
]
REHEARSED_TESTS = ["tests/ops/test_norm.py"]
RECORD = "benchmarks.json"
# Less than this is not worth starting the benchmarks for.
SHORTEST_GRID = 20.0


@dataclass(frozen=True)
class Part:
    """One command: its name, and how it ended."""

    name: str
    status: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Nothing went wrong; what is not there, or was not reached, is no failure."""
        return self.status.startswith(("passed", "not "))


@dataclass(frozen=True)
class Budget:
    """Seconds that each part may take at most; what one leaves over goes to the benchmarks."""

    build: float
    tests: float
    quick: float
    sanitizer: float

    @staticmethod
    def of(total: float) -> Budget:
        """Shares of the whole. The quick grid is made for four minutes."""
        return Budget(min(300.0, 0.22 * total), min(480.0, 0.36 * total), 240.0, min(60.0, 0.035 * total))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all parts; 0 if none of them failed."""
    parser = argparse.ArgumentParser(prog="python -m pytransformer.benchmarks.programs.gpu", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="walk through on a machine without a GPU")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")), help="folder for logs and JSON"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=float(os.environ.get("MINUTES") or MINUTES),
        help=f"for everything together (default: the environment variable MINUTES, or {MINUTES})",
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which of {','.join(PARTS)} (default: all)")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.parts.split(",")) - set(PARTS)
    if unknown or arguments.minutes <= 0:
        parser.error(f"--parts must be of {','.join(PARTS)}, and --minutes must be positive")
    problem = None if arguments.rehearse else missing()
    if problem:
        print(f"make gpu: {problem}", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _interrupt)
    run = Run(arguments.out, arguments.minutes * 60, arguments.rehearse)
    with contextlib.suppress(KeyboardInterrupt):
        run.all(arguments.parts.split(","))
    print(report(run.parts, arguments.out))
    return 0 if all(part.passed for part in run.parts) else 1


def _interrupt(*_: object) -> None:
    """`timeout` and job schedulers end a process with SIGTERM: the table is still printed."""
    raise KeyboardInterrupt


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


class Run:
    """The parts of one run.

    Args:
        out: folder for logs and JSON.
        total: seconds for everything.
        rehearse: without a GPU.
    """

    def __init__(self, out: Path, total: float, rehearse: bool) -> None:
        self.out = out
        self.rehearse = rehearse
        self.end = time.monotonic() + total
        self.budget = Budget.of(total)
        self.parts: list[Part] = []

    def all(self, names: Sequence[str]) -> None:
        """One part after another; what a part raises is its failure."""
        makers: dict[str, Callable[[], None]] = {
            "build": self.build,
            "tests": self.tests,
            "quick": self.quick,
            "sanitizers": self.sanitizers,
            "full": self.full,
        }
        for name in PARTS:
            if name in names:
                makers[name]()

    def left(self) -> float:
        """Seconds until the end of the run."""
        return self.end - time.monotonic()

    def within(self, limit: float) -> float:
        """A part's limit, or what is left."""
        return max(1.0, min(limit, self.left()))

    def add(self, name: str, make: Callable[..., Part], *arguments: Any) -> None:
        """Runs a part and keeps how it ended."""
        start = time.monotonic()
        try:
            self.parts.append(make(*arguments))
        except KeyboardInterrupt:
            self.parts.append(Part(name, "failed (interrupted)", time.monotonic() - start))
            raise
        except Exception as error:
            self.parts.append(Part(name, f"failed ({type(error).__name__}: {error})"[:200], time.monotonic() - start))

    def build(self) -> None:
        """The CUDA extension, which the others use."""
        self.add("extension", build_extension, self.out, self.within(self.budget.build), self.rehearse)

    def tests(self) -> None:
        """On the device."""
        self.add("tests", run_tests, self.out, self.within(self.budget.tests), self.rehearse)

    def quick(self) -> None:
        """The quick grid; the sanitizers' time is kept back."""
        if self.rehearse:
            self.add("faults", rehearse_faults, self.out)
            self.add("cut-off", rehearse_cut, self.out)
        keep = len(SANITIZERS) * self.budget.sanitizer
        self.add("quick grid", run_grid, self.out, "quick", min(self.budget.quick, self.left() - keep), self.rehearse)

    def sanitizers(self) -> None:
        """Each tool over each backend."""
        for tool, backend in SANITIZERS:
            limit = self.within(self.budget.sanitizer)
            self.add(f"{tool} {backend}", run_sanitizer, self.out, tool, backend, limit, self.rehearse)

    def full(self) -> None:
        """Whatever of the full grid there is time for."""
        self.add("full grid", run_grid, self.out, "full", self.left(), self.rehearse)


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
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    status = "passed" if code == 0 else ("ran past its limit" if code is None else f"failed (exit {code})")
    return _ended(name, status, time.monotonic() - start, log)


def _ended(name: str, status: str, seconds: float, log: Path) -> Part:
    """Prints the last lines of a part's log and how it ended."""
    if log.exists():
        print("\n".join(log.read_text(errors="replace").splitlines()[-25:]))
    print(f"-- {name}: {status} in {seconds:.0f} s; all of it in {log}", flush=True)
    return Part(name, status, seconds)


def _absent(name: str, why: str) -> Part:
    print(f"\n== {name}: {why}")
    return Part(name, "not available", 0.0)


def build_extension(out: Path, limit: float, rehearse: bool) -> Part:
    """The CUDA extension for the GPUs that are here; without nvcc the rest goes on with Triton."""
    if rehearse or (shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists()):
        return _absent("extension", "not rehearsed" if rehearse else "nvcc is not on this machine")
    return _run("extension", [sys.executable, "csrc/build.py"], out / "extension.log", limit)


def run_tests(out: Path, limit: float, rehearse: bool) -> Part:
    """The test suite on the device; kernels are compiled, not interpreted."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow"]
    command += [f"--junitxml={out / 'tests.xml'}", "--maxfail=60"]
    if importlib.util.find_spec("xdist") is not None and not rehearse:
        command += ["-n", str(max(1, min(12, (os.cpu_count() or 2) - 2)))]
    command += REHEARSED_TESTS if rehearse else TESTS
    return _run("tests", command, out / "tests.log", limit, {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"})


def run_sanitizer(out: Path, tool: str, backend: str, limit: float, rehearse: bool) -> Part:
    """compute-sanitizer over the small cases of `verify`; where it is absent or refuses the device, that is what the table says."""
    name = f"{tool} {backend}"
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists() or rehearse:
        return _absent(name, "not rehearsed" if rehearse else "compute-sanitizer is not on this machine")
    verify = [sys.executable, "-m", "pytransformer.cli.verify", "verify"]
    verify += ["--backend", backend, "--dtype", "bfloat16", "--seeds", "1"]
    command = [program, "--tool", tool, "--error-exitcode", "9", *verify]
    # Without torch's caching allocator each tensor is an allocation of its own, so an overrun is seen.
    environment = {"PYTHONPATH": ".", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return _run(name, command, out / f"{tool}-{backend}.log", limit, environment)


def run_grid(out: Path, grid: str, limit: float, rehearse: bool) -> Part:
    """The benchmarks with peers, most important rows first; the full grid goes on where the quick one ended."""
    from pytransformer.benchmarks.harness.supervise import Limits, supervise

    name = f"{grid} grid"
    if limit < SHORTEST_GRID:
        print(f"\n== {name}: no time is left for it")
        return Part(name, "not reached", 0.0)
    path = out / RECORD
    make_room(path)
    log = out / f"{grid}.log"
    print(f"\n== {name}: at most {limit:.0f} s; each row is in {path} as soon as it is done", flush=True)
    start = time.monotonic()
    options = ["--grid", "tiny" if rehearse else grid, "--peers"]
    outcome = supervise(path, options, Limits(limit), environment={"PYTHONPATH": "."}, log=log)
    return _ended(name, outcome.status, time.monotonic() - start, log)


def make_room(path: Path) -> None:
    """Moves a record aside that cannot be continued: a complete full grid, or one of another device, version or revision."""
    from pytransformer.benchmarks.harness import record
    from pytransformer.benchmarks.harness.timing import device_here

    if not path.exists():
        return
    try:
        content = record.load(path)
        here = record.environment(device_here())
        same = all(content["environment"].get(name) == here[name] for name in record.SAME_RUN)
        if same and not (content["complete"] and content["options"]["grid"] == "full"):
            record.reopen(path)
            return
    except ValueError:
        pass
    path.rename(path.with_name(f"{path.stem}-before-{time.strftime('%Y%m%d-%H%M%S')}{path.suffix}"))


def rehearse_faults(out: Path) -> Part:
    """Rows that raise, hang, exit and are wrong: the others must all be there."""
    from pytransformer.benchmarks.programs import rehearsal

    path = out / "rehearsal-faults.json"
    path.unlink(missing_ok=True)
    return _rehearsed("faults", path, lambda: rehearsal.rehearse_faults(path, out / "rehearsal.log")[1])


def rehearse_cut(out: Path) -> Part:
    """Everything killed in the middle, then continued: no row is lost and none is run twice."""
    from pytransformer.benchmarks.programs import rehearsal

    path = out / "rehearsal-cut.json"
    path.unlink(missing_ok=True)

    def walk() -> list[str]:
        cut, found = rehearsal.rehearse_cut(path, log=out / "rehearsal.log")
        half = out / "rehearsal-cut-half.json"
        half.write_text(json.dumps(cut))
        print("\n".join(_benchmark_lines(half)))
        return found

    return _rehearsed("cut-off", path, walk)


def _rehearsed(name: str, path: Path, walk: Callable[[], list[str]]) -> Part:
    print(f"\n== {name}: rehearsed with rows that go wrong on purpose, in {path}", flush=True)
    start = time.monotonic()
    found = walk()
    for line in (*_benchmark_lines(path), *found):
        print(line)
    return Part(name, f"failed ({len(found)} differences)" if found else "passed", time.monotonic() - start)


def report(parts: Sequence[Part], out: Path) -> str:
    """The closing table: parts, tests by file, fraction of floor by benchmark row."""
    lines = ["", "== Summary"]
    lines.extend(f"{part.name:<22} {part.status:<34} {part.seconds:>6.0f} s" for part in parts)
    lines.extend(["", f"{'tests':<52} passed failed skipped", *_test_lines(out / "tests.xml")])
    lines.extend(["", f"{'benchmark':<64} fraction of floor", *_benchmark_lines(out / RECORD)])
    return "\n".join(lines)


def _test_lines(path: Path) -> list[str]:
    if not path.exists():
        return ["no test report was written"]
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except ElementTree.ParseError as error:
        return [f"the test report was cut off: {error}"]
    counts: dict[str, Counter[str]] = {}
    for case in cases:
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else ("skipped" if "skipped" in kinds else "passed")
        counts.setdefault((case.get("classname") or "?").replace("tests.", "", 1), Counter())[outcome] += 1
    return [f"{name:<52} {c['passed']:>6} {c['failed']:>6} {c['skipped']:>7}" for name, c in sorted(counts.items())]


def _benchmark_lines(path: Path) -> list[str]:
    if not path.exists():
        return ["no benchmark was written"]
    from pytransformer.benchmarks.harness import record, tables

    content = json.loads(path.read_text())
    lines = []
    for row in record.entries(content):
        figures = [_short(row, name, variant) for name, variant in row["variants"].items()]
        figures += [f"{name} FAILED" for name in row["failed"]] + [f"{name} absent" for name in row["absent"]]
        figures += [f"FAILED: {row['failure']}"] if "failure" in row else []
        lines.append(f"{row['op'] + ' ' + row['shape']:<64} {'  '.join(figures)}")
    return [*lines, *tables.missing(content)]


def _short(row: dict[str, Any], name: str, figures: dict[str, Any]) -> str:
    from pytransformer.benchmarks.harness import tables

    if "value" in figures:
        return f"{name} {tables.number(figures['value'])} {row['unit']}"
    return f"{name} {100 * figures['fraction_of_floor']:.0f} %"


if __name__ == "__main__":
    sys.exit(main())
