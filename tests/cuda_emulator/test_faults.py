"""The emulator sees what it claims to see: each of many faults, switched on in small kernels, is reported; the sound kernels are silent."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.emulator import SCHEDULES, build_program, builder, environment, prefix

SOURCE = Path(__file__).with_name("faults.cu")
# Each fault: what reports it in the build with AddressSanitizer and UBSan, in at least one of the schedules.
FAULTS = {
    "load past the end": "heap-buffer-overflow",
    "store past the end": "heap-buffer-overflow",
    "store before the start": "heap-buffer-overflow",
    "shared store past the end": "global-buffer-overflow|out of bounds",
    "too little shared memory": "use-after-poison",
    "misaligned vector": "misaligned address",
    "misaligned cp.async": "misaligned address in cp.async",
    "divergent barrier": "divergent barrier: __syncthreads",
    "barrier that half of the threads skip": "deadlock or divergent barrier",
    "different barriers": "divergent barrier: __syncthreads",
    "shuffle by half a warp": "its mask names a lane that has ended",
    "unwritten output": "wrong result",
    "missing wait": "wrong result|never waited for",
    "one group waited for too few": "wrong result",
    "empty grid": "invalid grid dimensions",
    "grid too high": "invalid grid dimensions",
    "block too large": "invalid block dimensions",
    "more shared memory than there is": "pipeline_kernel: 233472 bytes .* a block may have 232448",
}
# Races change the result in some schedule; ThreadSanitizer calls them by their name.
RACES = (
    "missing barrier before reading",
    "missing barrier before reuse",
    "missing barrier after wait",
    "missing trailing barrier",
    "missing warp barrier",
    "two threads write one element",
)


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> dict[str, Path]:
    """The faulty kernels, built with each family of sanitizers; once for all test processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    try:
        return {flavor: build_program(SOURCE, flavor, folder) for flavor in ("address", "thread")}
    except builder().BuildError as error:
        pytest.skip(f"the emulator cannot be built here: {error}")


def run(program: Path, flavor: str, fault: str, schedule: int) -> tuple[int, str]:
    variables = os.environ | environment(flavor, program)
    variables.pop("LD_PRELOAD", None)  # the program is linked with its sanitizer
    command = [*prefix(flavor), str(program), fault, str(schedule)]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=120)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("flavor", ["address", "thread"])
def test_sound_kernels_are_silent_in_every_schedule(flavor: str, programs) -> None:
    for schedule in SCHEDULES:
        status, output = run(programs[flavor], flavor, "none", schedule)
        assert (status, output) == (0, ""), f"schedule {schedule}: {output}"


@pytest.mark.parametrize("flavor", ["address", "thread"])
def test_threads_of_the_host_may_launch_at_the_same_time(flavor: str, programs) -> None:
    """The runtime is asked for the device's limits once, and a kernel may have the shared memory of the largest launch in the end."""
    assert run(programs[flavor], flavor, "host threads", 0) == (0, "")


def assert_seen(programs: dict[str, Path], flavor: str, fault: str, is_report: Callable[[int, str], bool]) -> None:
    """Some schedule shows what is looked for; no more of them are run than that takes."""
    outputs = []
    for schedule in SCHEDULES:
        outputs.append(run(programs[flavor], flavor, fault, schedule))
        if is_report(*outputs[-1]):
            return
    raise AssertionError(f"not seen in any schedule: {outputs}")


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_reported(fault: str, programs) -> None:
    report = re.compile(FAULTS[fault])
    assert_seen(programs, "address", fault, lambda status, output: status != 0 and report.search(output) is not None)


@pytest.mark.parametrize("race", RACES)
def test_race_is_named(race: str, programs) -> None:
    named = "ThreadSanitizer: data race"
    assert_seen(programs, "thread", race, lambda status, output: status == 66 and named in output)
    # Without its help some schedule gives a wrong result.
    assert_seen(programs, "address", race, lambda status, _: status == 3)
