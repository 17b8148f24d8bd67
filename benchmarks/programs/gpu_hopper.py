"""`make gpu-hopper`: the first minutes of Hopper's Gluon kernels on a GPU, in five at most.

Part after part of the attention kernel, each in a process of its own with a time limit: copies alone, the product q kᵀ alone, the softmax
alone, the whole; each held against float64, then repeated for the same bits. A kernel that hangs costs ten seconds and is named. Then the
whole against SDPA's cuDNN and flash backends, today's portable kernel and flash-attn-4, in one run; then, as time is left, the stages again
under Triton's concurrency sanitizer (consan), at small sizes. JSON goes to the folder named by the environment variable OUT (default
gpu-results/): hopper-bringup.json says how the stages ended, hopper.json is a record as `pytransformer bench` writes it.

``--device cpu`` walks through all of it in the Gluon interpreter, at tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pytransformer.benchmarks.harness import record
from pytransformer.benchmarks.harness.supervise import Limits, supervise
from pytransformer.benchmarks.programs.gpu import SHORTEST_GRID, Part, make_room, missing
from pytransformer.benchmarks.programs.hopper_stages import DONE, MODE_VARIABLE, STAGES, WAITING

MINUTES = 5.0
# Of one step of a stage in which a GPU is waited for, none of which takes it a second; the interpreter is slower.
STEP_SECONDS = {"cuda": 10.0, "cpu": 60.0}
# Of a step of the host's alone: the start of a process, a compiler that finds nothing in its cache.
HOST_SECONDS = 90.0
# What the benchmark's harness gives a variant: its compilation counts.
VARIANT_SECONDS = 60.0
PARTS = ("stages", "benchmarks", "consan")
MODES = {"stages": "plain", "consan": "consan"}
MODULE = "pytransformer.benchmarks.programs.hopper_stages"
GRID_MODULE = "pytransformer.benchmarks.programs.hopper_grid"
STAGES_FILE, RECORD = "hopper-bringup.json", "hopper.json"


@dataclass
class Ended:
    """How a stage ended.

    Attributes:
        name: of the stage.
        mode: "plain", or "consan".
        status: "passed", or what went wrong in a few words.
        seconds: of its process.
        step: what it did last: where a stage that hung did.
        ratios: by case and result, the error as a fraction of what the contract allows.
        suspects: where to look, if it did not pass.
    """

    name: str
    mode: str
    status: str
    seconds: float
    step: str = ""
    ratios: dict[str, float] = field(default_factory=dict)
    suspects: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all parts; 0 if nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m pytransformer.benchmarks.programs.gpu_hopper", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: in the interpreter, tiny")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")), help="folder for JSON and logs"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for everything together (default {MINUTES:g})")
    parser.add_argument("--step-seconds", type=float, help="that a GPU may be waited for (default 10)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which of {','.join(PARTS)} (default: all)")
    arguments = parser.parse_args(argv)
    parts = arguments.parts.split(",")
    if set(parts) - set(PARTS) or arguments.minutes <= 0:
        parser.error(f"--parts must be of {','.join(PARTS)}, and --minutes must be positive")
    problem = _problem() if arguments.device == "cuda" else None
    if problem:
        print(f"make gpu-hopper: {problem}", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    step_seconds = arguments.step_seconds or STEP_SECONDS[arguments.device]
    bringup = BringUp(arguments.out, arguments.device, arguments.minutes * 60, step_seconds)
    bringup.run([part for part in PARTS if part in parts])
    print(bringup.report())
    return 0 if bringup.passed else 1


def _problem() -> str | None:
    problem = missing()
    if problem:
        return problem.replace("--rehearse walks through the parts", "--device cpu walks through it")
    major, minor = torch.cuda.get_device_capability()
    return (
        None
        if (major, minor) == (9, 0)
        else f"these kernels are for compute capability 9.0, this GPU has {major}.{minor}"
    )


class BringUp:
    """One run of the parts.

    Args:
        out: folder for JSON and logs.
        device: "cuda", or "cpu" for the walk in the interpreter.
        total: seconds for everything.
        step_seconds: of one step of a stage in which a GPU is waited for.
    """

    def __init__(self, out: Path, device: str, total: float, step_seconds: float) -> None:
        self.out, self.device, self.step_seconds = out, device, step_seconds
        self.end = time.monotonic() + total
        self.ended: list[Ended] = []
        self.benchmarks: Part | None = None

    @property
    def passed(self) -> bool:
        """Nothing went wrong; what is not there, or was not reached, is no failure."""
        stages = all(stage.passed or stage.status.startswith("not ") for stage in self.ended)
        return stages and (self.benchmarks is None or self.benchmarks.passed)

    def run(self, parts: Sequence[str]) -> None:
        """One part after another. Stages go on after one that failed: each says something of its own."""
        for part in parts:
            if part == "benchmarks":
                self.benchmarks = self._benchmarks()
                continue
            for name in STAGES:
                self.ended.append(self._stage(name, MODES[part]))
                self._write()

    def _stage(self, name: str, mode: str) -> Ended:
        if mode == "consan" and self.device == "cpu":
            return Ended(name, mode, "not available: it is compiled into kernels for a GPU", 0.0)
        left = self.end - time.monotonic()
        if left < 1.0:
            return Ended(name, mode, "not reached", 0.0)
        notes = self.out / f"hopper-{name}-{mode}.jsonl"
        command = [sys.executable, "-m", MODULE, name, "--device", self.device, "--notes", str(notes)]
        variables = self._variables() | ({} if mode == "plain" else {MODE_VARIABLE: mode})
        host = (
            HOST_SECONDS if mode == "plain" else left
        )  # what the sanitizer makes of a large kernel is compiled for minutes
        print(f"\n== {name}, {mode}", flush=True)
        code, seconds = watch(command, notes, variables, (self.step_seconds, host, left))
        ended = judge(name, mode, code, seconds, read_notes(notes))
        if code is None and seconds >= left:
            ended = replace(ended, status=f"not finished in the time that was left: {ended.step}", suspects="")
        print(f"-- {ended.status} in {seconds:.0f} s; all of it in {notes.with_suffix('.log')}", flush=True)
        return ended

    def _variables(self) -> dict[str, str]:
        return {"PYTHONPATH": ".", **({"TRITON_INTERPRET": "1"} if self.device == "cpu" else {})}

    def _benchmarks(self) -> Part:
        """The whole kernel beside the others; the harness gives each variant a time limit of its own."""
        broken = any(stage.mode == "plain" and not stage.passed for stage in self.ended)
        left = self.end - time.monotonic()
        if broken or left < SHORTEST_GRID:
            return Part("benchmarks", f"not reached: {'a stage has not passed' if broken else 'no time is left'}", 0.0)
        start = time.monotonic()
        path = self.out / RECORD
        make_room(path)
        options = ["--grid", "quick" if self.device == "cuda" else "tiny", "--peers", "--grid-module", GRID_MODULE]
        limits = Limits(left, VARIANT_SECONDS)
        outcome = supervise(
            path, options, limits, environment=self._variables(), log=self.out / "hopper-benchmarks.log"
        )
        return Part("benchmarks", outcome.status, time.monotonic() - start)

    def _write(self) -> None:
        here = record.environment(torch.device(self.device))
        content = {
            "environment": here,
            "step_seconds": self.step_seconds,
            "stages": [asdict(stage) for stage in self.ended],
        }
        (self.out / STAGES_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def report(self) -> str:
        """The closing table."""
        lines = ["", "== Summary"]
        for stage in self.ended:
            worst = f"{max(stage.ratios.values()):.2f} of the allowed error" if stage.ratios else ""
            lines.append(f"{stage.name:<10}{stage.mode:<8}{stage.seconds:>5.0f} s  {stage.status}  {worst}".rstrip())
            if not stage.passed and stage.suspects:
                lines.append(f"{'':<26}look at: {stage.suspects}")
        if self.benchmarks is not None:
            lines.append(
                f"{'benchmarks':<18}{self.benchmarks.seconds:>5.0f} s  {self.benchmarks.status}; {self.out / RECORD}"
            )
        return "\n".join(lines)


def watch(
    command: Sequence[str], notes: Path, variables: Mapping[str, str], limits: tuple[float, float, float]
) -> tuple[int | None, float]:
    """(exit code, seconds) of a process that notes its steps; None = it was ended, because a step or all of it took too long.

    Args:
        notes: where it does; its output goes beside it.
        variables: of its environment, beside those here.
        limits: seconds of a step in which a GPU is waited for, of another one, of all.
    """
    notes.unlink(missing_ok=True)
    of_waiting, of_host, of_all = limits
    start = time.time()
    with notes.with_suffix(".log").open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **variables}, start_new_session=True
        )
        try:
            while process.poll() is None:
                time.sleep(0.05)
                found = read_notes(notes)
                since = notes.stat().st_mtime if found else start
                limit = of_waiting if found and found[-1]["step"].startswith(WAITING) else of_host
                if time.time() - since > limit or time.time() - start > of_all:
                    break
            code = process.poll()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the compiler that it may have started too
                process.wait()
    return code, time.time() - start


def read_notes(path: Path) -> list[dict[str, Any]]:
    """The steps that a process has noted so far."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # the last may be half there


def judge(name: str, mode: str, code: int | None, seconds: float, notes: Sequence[Mapping[str, Any]]) -> Ended:
    """How a stage ended, of how its process did (None: it had to be ended) and what that noted on its way."""
    step = str(notes[-1]["step"]) if notes else "starting"
    ratios = {key: float(value) for note in notes for key, value in note.get("ratios", {}).items()}
    failure = next((str(note["failure"]) for note in notes if "failure" in note), f"exit code {code}, {step}")
    if code is None:
        status = f"hung: {step}" if step.startswith(WAITING) else f"took too long: {step}"
    else:
        status = "passed" if code == 0 and step == DONE else f"failed: {failure}"
    return Ended(
        name, mode, status, round(seconds, 1), step, ratios, "" if status == "passed" else STAGES[name].suspects
    )


if __name__ == "__main__":
    sys.exit(main())
