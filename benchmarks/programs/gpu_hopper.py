"""`make gpu-hopper`: the first minutes of Hopper's Gluon kernels on a GPU, in five at most.

Part after part of the attention kernel, each in a process of its own with a time limit: copies alone, the product q kᵀ alone, the softmax
alone, the whole; each held against float64, then repeated for the same bits. A kernel that hangs costs its limit and is named. Then the
same under Triton's concurrency sanitizer (consan), at small sizes; then the whole against SDPA's cuDNN and flash backends, today's portable
kernel and flash-attn-4, in one run. JSON goes to the folder named by the environment variable OUT (default gpu-results/):
hopper-bringup.json says how the stages ended, hopper.json is a record as `pytransformer bench` writes it.

``--device cpu`` walks through all of it in the Gluon interpreter, at tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pytransformer.benchmarks.harness import record
from pytransformer.benchmarks.programs.gpu import Part, missing, run_command

MINUTES = 5.0
# Of one stage: the start of a process and a compiler that finds nothing in its cache take half of it.
STAGE_SECONDS = 30.0
PARTS = ("stages", "consan", "benchmarks")
MODE_VARIABLE = "TRITON_INSTRUMENTATION_MODE"  # of Triton: it compiles its sanitizers into every kernel of a process
GRID_MODULE = "pytransformer.benchmarks.programs.hopper_grid"
STAGES_FILE, RECORD = "hopper-bringup.json", "hopper.json"
# Launches that must give the same bits.
REPEATS = 50


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
    parser.add_argument(
        "--stage-seconds", type=float, default=STAGE_SECONDS, help=f"of a stage (default {STAGE_SECONDS:g})"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which of {','.join(PARTS)} (default: all)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # what a process of ours is started with
    arguments = parser.parse_args(argv)
    if arguments.stage:
        return run_stage(arguments.stage, torch.device(arguments.device), arguments.out)
    parts = arguments.parts.split(",")
    if set(parts) - set(PARTS) or arguments.minutes <= 0:
        parser.error(f"--parts must be of {','.join(PARTS)}, and --minutes must be positive")
    problem = _problem() if arguments.device == "cuda" else None
    if problem:
        print(f"make gpu-hopper: {problem}", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    bringup = BringUp(arguments.out, arguments.device, arguments.minutes * 60, arguments.stage_seconds)
    bringup.run(parts)
    print(bringup.report())
    return 0 if bringup.passed else 1


def _problem() -> str | None:
    problem = missing()
    if problem:
        return problem.replace("--rehearse walks through the parts", "--device cpu walks through it")
    capability = torch.cuda.get_device_capability()
    return (
        None
        if capability == (9, 0)
        else f"these kernels are for compute capability 9.0, this GPU has {capability[0]}.{capability[1]}"
    )


class BringUp:
    """One run of the parts.

    Args:
        out: folder for JSON and logs.
        device: "cuda", or "cpu" for the walk in the interpreter.
        total: seconds for everything.
        stage_seconds: of one stage.
    """

    def __init__(self, out: Path, device: str, total: float, stage_seconds: float) -> None:
        self.out, self.device, self.stage_seconds = out, device, stage_seconds
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
        for part, mode in (("stages", "plain"), ("consan", "consan")):
            for name in stage_names() if part in parts else ():
                self.ended.append(self._stage(name, mode))
                self._write()
        if "benchmarks" in parts:
            self.benchmarks = self._benchmarks()

    def _stage(self, name: str, mode: str) -> Ended:
        if mode == "consan" and self.device == "cpu":
            return Ended(name, mode, "not available: it is compiled into kernels for a GPU", 0.0)
        limit = min(self.stage_seconds, self.end - time.monotonic())
        if limit < 1.0:
            return Ended(name, mode, "not reached", 0.0)
        notes = _notes(self.out, name, mode)
        notes.unlink(missing_ok=True)
        command = [
            sys.executable,
            "-m",
            __spec__.name,
            "--stage",
            name,
            "--device",
            self.device,
            "--out",
            str(self.out),
        ]
        variables = {"PYTHONPATH": ".", **({"TRITON_INTERPRET": "1"} if self.device == "cpu" else {})}
        if mode != "plain":
            variables[MODE_VARIABLE] = mode
        part = run_command(f"{name}, {mode}", command, notes.with_suffix(".log"), limit, variables)
        return judge(name, mode, part, _read(notes), suspects_of(name))

    def _benchmarks(self) -> Part:
        """The whole kernel beside the others; the harness gives each variant a time limit of its own."""
        from pytransformer.benchmarks.harness.supervise import Limits, supervise
        from pytransformer.benchmarks.programs.gpu import SHORTEST_GRID, make_room

        broken = [
            stage.name for stage in self.ended if stage.name == WHOLE and stage.mode == "plain" and not stage.passed
        ]
        left = self.end - time.monotonic()
        if broken or left < SHORTEST_GRID:
            why = f"stage {broken[0]} has not passed" if broken else "no time is left for them"
            return Part("benchmarks", f"not reached: {why}", 0.0)
        start = time.monotonic()
        path = self.out / RECORD
        make_room(path)
        variables = {"PYTHONPATH": ".", **({"TRITON_INTERPRET": "1"} if self.device == "cpu" else {})}
        options = ["--grid", "quick" if self.device == "cuda" else "tiny", "--peers", "--grid-module", GRID_MODULE]
        limits = Limits(left, self.stage_seconds)
        outcome = supervise(path, options, limits, environment=variables, log=self.out / "hopper-benchmarks.log")
        return Part("benchmarks", outcome.status, time.monotonic() - start)

    def _write(self) -> None:
        here = record.environment(torch.device(self.device))
        content = {
            "environment": here,
            "stage_seconds": self.stage_seconds,
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


def judge(name: str, mode: str, part: Part, notes: Sequence[Mapping[str, Any]], suspects: str) -> Ended:
    """How a stage ended, of how its process did and what that noted on its way."""
    step = str(notes[-1]["step"]) if notes else "starting"
    ratios = {key: float(value) for note in notes for key, value in note.get("ratios", {}).items()}
    failure = next((str(note["failure"]) for note in notes if "failure" in note), "")
    if part.status.startswith("ran past"):
        status = f"hung: {step} for longer than its limit"
    elif part.status == "passed" and step == DONE:
        status = "passed"
    else:
        status = f"failed: {failure or part.status + ', ' + step}"
    return Ended(name, mode, status, round(part.seconds, 1), step, ratios, "" if status == "passed" else suspects)


def _notes(out: Path, name: str, mode: str) -> Path:
    return out / f"hopper-{name}-{mode}.jsonl"


def _read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut off


# --- in the process of a stage --------------------------------------------------------------------------------------------------------

WHOLE = "whole"
DONE = "done"


def stage_names() -> tuple[str, ...]:
    """In the order in which each rests on those before it."""
    from pytransformer.benchmarks.programs import hopper_stages

    return tuple(hopper_stages.STAGES)


def suspects_of(name: str) -> str:
    """Where to look if this stage is the first that fails."""
    from pytransformer.benchmarks.programs import hopper_stages

    return hopper_stages.STAGES[name].suspects


def run_stage(name: str, device: torch.device, out: Path) -> int:
    """All cases of a stage; what is being done is noted in a file before it is, for whoever started this process."""
    from pytransformer.benchmarks.programs import hopper_stages

    mode, start = os.environ.get(MODE_VARIABLE) or "plain", time.monotonic()
    with _notes(out, name, mode).open("a") as stream:

        def note(step: str, **more: Any) -> None:
            stream.write(json.dumps({"step": step, "at": round(time.monotonic() - start, 2), **more}) + "\n")
            stream.flush()
            print(step, *more.values(), flush=True)

        tiny = device.type == "cpu" or mode != "plain"
        if mode != "plain":
            _give_scratch_memory(device)
        try:
            for case, draw in hopper_stages.STAGES[name].cases.items():
                check_case(case, lambda draw=draw: draw(tiny, device), device, 1 if tiny else REPEATS, note)  # type: ignore[misc]
        except Exception as error:
            note("failed", failure=f"{type(error).__name__}: {error}"[:600])
            raise
        note(DONE)
    return 0


def check_case(
    case: str, draw: Callable[[], Any], device: torch.device, repeats: int, note: Callable[..., None]
) -> None:
    """One draw of inputs: a first launch, which compiles, the contract, then the same bits again and again.

    Raises:
        ContractError: a result is wrong.
        AssertionError: results differ between launches.
    """
    from pytransformer.verification import Contract

    torch.manual_seed(0)
    note(f"drawing inputs of {case}")
    run, plain, golden = draw()
    _wait(device)
    note(f"compiling and launching {case}")
    actual = run()
    note(f"waiting for the kernel, {case}")
    _wait(device)
    actual = {key: value.clone() for key, value in actual.items()}
    note(f"comparing {case}")
    contract = Contract(torch.bfloat16)
    of_plain, of_golden = plain(), golden()
    for key, value in actual.items():
        contract.add(f"{case} {key}", actual=value, plain=of_plain[key], golden=of_golden[key])
    note(f"compared {case}", ratios={key: errors.ratio for key, errors in contract.results.items()})
    contract.check()
    note(f"waiting for launch after launch of {case}")
    for number in range(repeats):
        for key, value in run().items():
            if not torch.equal(value, actual[key]):
                raise AssertionError(f"{case}: launch {number + 2} gives other bits of {key} than the first")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _give_scratch_memory(device: torch.device) -> None:
    """Sanitized kernels keep their books in global memory, which Triton asks its user for."""
    import triton

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)


if __name__ == "__main__":
    sys.exit(main())
