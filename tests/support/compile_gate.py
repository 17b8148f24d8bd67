"""Which launches of the shipped kernels must compile, and for which architectures."""

from __future__ import annotations

import ast
import hashlib
import importlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytransformer.kernels.launch import assume_arch
from tests.support.launch_recorder import Launch, record
from tests.support.limits import complaints
from tests.support.sass import Statistics, compile_launches

ARCHITECTURES = (80, 90, 100)
KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@dataclass(frozen=True)
class Case:
    """One call of a launcher, as a module of tests/compile/cases offers it, for one architecture.

    Attributes:
        name: of the case.
        call: launches.
        arch: compute capability that launch policy and compiler are asked for.
        wgmma_kernels: names of the kernels that must use the matrix instructions of sm_90 or sm_100, there.
    """

    name: str
    call: Callable[[], object]
    arch: int
    wgmma_kernels: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.name}-sm_{self.arch}"


# Their kernels compile for one architecture alone: tests/compile/test_hopper*.py.
OF_ONE_ARCHITECTURE = {"hopper"}


def launched_kernels(path: Path) -> set[str]:
    """Names of the kernels that a file launches: of ``name`` in each ``name[grid](...)`` and each ``PreparedLaunch(name, ...)``."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    kernels = [node.func.value for node in calls if isinstance(node.func, ast.Subscript)]
    kernels += [
        node.args[0]
        for node in calls
        if isinstance(node.func, ast.Name) and node.func.id == "PreparedLaunch" and node.args
    ]
    return {node.id for node in kernels if isinstance(node, ast.Name)}


def ops() -> list[str]:
    """Names of the folders and files in kernels/ that launch something."""
    found = {path.relative_to(KERNELS).parts[0] for path in KERNELS.rglob("*.py") if launched_kernels(path)}
    return sorted(name.removesuffix(".py") for name in found - OF_ONE_ARCHITECTURE)


def kernels_of(op: str) -> set[str]:
    """Names of the kernels that an op's folder or file defines and launches."""
    paths = [KERNELS / f"{op}.py"] if (KERNELS / f"{op}.py").is_file() else list((KERNELS / op).rglob("*.py"))
    defined = {
        node.name for path in paths for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
    }
    return defined & set().union(*map(launched_kernels, paths))


def cases(op: str, architectures: Iterable[int] = ARCHITECTURES) -> Iterator[Case]:
    """The cases of an op for each architecture: what its module in tests/compile/cases says."""
    module = importlib.import_module(f"tests.compile.cases.{op}")
    wgmma_kernels: Callable[[str], Collection[str]] = getattr(module, "wgmma_kernels", lambda case_name: ())
    for arch in architectures:
        # Asked anew for each architecture, and under it: which configurations ship may depend on it.
        with assume_arch(arch):
            for case_name, call in module.compile_cases():
                case_name = str(case_name).replace("torch.", "")
                yield Case(case_name, call, arch, frozenset(wgmma_kernels(case_name)))


def all_cases(architectures: Iterable[int] = ARCHITECTURES) -> Iterator[Case]:
    """The cases of all ops."""
    for op in ops():
        yield from cases(op, architectures)


@dataclass(frozen=True)
class Outcome:
    """A launch of a case, what came of compiling it (None: not compiled again), and what is wrong with that."""

    launch: Launch
    statistics: Statistics | None
    complaints: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What came of a case: its launches, or the error that its launcher raised before launching all of them."""

    case: Case
    outcomes: tuple[Outcome, ...]
    error: str | None = None

    @property
    def complaints(self) -> list[str]:
        """All that is wrong; nothing if the case may ship."""
        if self.error is not None:
            return [f"the launcher raised {self.error}"]
        if not self.outcomes:
            return ["launches nothing"]
        return [f"{outcome.launch.name}: {text}" for outcome in self.outcomes for text in outcome.complaints]


def _record(case: Case) -> list[Launch] | str:
    try:
        return record(case.call, case.arch)
    except Exception as error:  # belongs into the report of this case, and must not keep the others from theirs
        return f"{type(error).__name__}: {error}"


def spot_checks(launches: Iterable[Launch]) -> set[str]:
    """Keys of one launch of each kernel, its first for one architecture: which one a hash of all launches chooses, kernel by kernel, so
    that with each change of the sources others have their turn."""
    firsts: dict[str, dict[int, str]] = {}
    for launch in launches:
        firsts.setdefault(launch.name, {}).setdefault(launch.arch, launch.key)
    everything = "".join(key for by_arch in firsts.values() for key in by_arch.values())

    def turn(name: str) -> int:
        return int(hashlib.sha256(f"{name} {everything}".encode()).hexdigest(), 16) % len(firsts[name])

    return {by_arch[sorted(by_arch)[turn(name)]] for name, by_arch in firsts.items()}


def run_cases(
    chosen: Sequence[Case], processes: int | None = None, known: Collection[str] = frozenset()
) -> dict[str, Report]:
    """Records and compiles the cases, equal launches once; reports by the case's text.

    Launches whose keys are ``known`` to have compiled within the limits are left out, but for a few (:func:`spot_checks`).
    """
    recorded = [(case, _record(case)) for case in chosen]
    launches = [launch for _, group in recorded if not isinstance(group, str) for launch in group]
    known = set(known) - spot_checks(launches)
    due = [launch for launch in launches if launch.key not in known]
    statistics = compile_launches(due, processes)
    reports = {}
    for case, group in recorded:
        if isinstance(group, str):
            reports[str(case)] = Report(case, (), group)
            continue
        results = ((launch, statistics.get(launch.key)) for launch in group)
        reports[str(case)] = Report(
            case,
            tuple(
                Outcome(launch, got, () if got is None else tuple(complaints(case, launch, got)))
                for launch, got in results
            ),
        )
    return reports
