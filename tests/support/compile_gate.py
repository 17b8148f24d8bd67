"""Which launches of the shipped kernels must compile, for which architectures, and what is a reason to fail."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

from pytransformer.kernels.launch import assume_arch
from tests.support.launch_recorder import Launch, record
from tests.support.sass import TENSOR_MEMORY_MMA, WARP_GROUP_MMA, Statistics, compile_launches

ARCHITECTURES = (80, 90, 100)
MAX_SPILL_BYTES = 16

# What a compiler does to single cases, and is known: release of Triton, case → beginning of the complaint.
KNOWN_COMPLAINTS = {
    # ptxas stops at 64 registers; what it puts on the stack is read and written outside of the loop, which the gate holds to none.
    ("3.9", "attention_bias_gradient-float32-d64-sm_80"): "spills 24 bytes",
    # Gradients of few features: ptxas puts waits between products that share registers. Neither one stage nor four warps changed that.
    ("3.9", "linear_attention-bfloat16-d64-sm_90"): "ptxas warns: ptxas-blackwell info    : (C751",
    ("3.9", "linear_attention-bfloat16-d80-given-sm_90"): "ptxas warns: ptxas-blackwell info    : (C7517)",
    # dv's weights of both kinds of decay fill the registers of four warps.
    ("3.9", "linear_attention-bfloat16-d128-decay-sm_100"): "spills 40 bytes",
    # 128 rows of 256 values fill the registers; it keeps some of what is used before the loop on the stack.
    ("3.6", "attention_forward-bfloat16-d256-causal-sm_90"): "spills 72 bytes",
    # All options at once: it waits for each product before the next.
    ("3.6", "attention_backward-bfloat16-d64-options-sm_90"): "ptxas warns: ptxas info    : (C7515)",
}

# Kernels whose floor is the bytes they move: above this ratio of issue to memory (tests/support/hot_loop.py) they wait for issue instead.
MAX_ISSUE_RATIO = 0.8
STREAMING = frozenset(
    {
        "activation_forward_kernel",
        "activation_backward_kernel",
        "cross_entropy_kernel",
        "_decode_kernel",
        "_kv_append_kernel",
        "norm_forward_kernel",
        "norm_forward_wide_kernel",
        "norm_backward_kernel",
        "rope_kernel",
    }
)
# Cases that do, and why, by a pattern of their names.
KNOWN_ISSUE_BOUND = {
    r"decode_attention-.*-int8-.*-sm_100": "five instructions for four codes, at a quarter more bytes per clock than sm_90 has",
    r"decode_attention-.*-options": "bias, mask, ALiBi and the tanh of softcap for every score",
    r"decode_attention-float32": "exact float32 products run on the FMA units",
    r"decode_attention-.*-(q8|q40|packed)": "the rows of several tokens share the bytes: it waits for products",
    r"kv_append-(int8|e4m3)": "codes are made by hand, each from an IEEE division, and half the bytes are written",
    r"linear_cross_entropy-.*-bfloat16-everything": "softcap's tanh, an exponential and a division more for each logit",
    r"norm_backward-backward-(layer|rms)-128": "reductions of each row, and only 128 columns to share them",
    r"activation-(geglu|gelu)": "erf or tanh of each element, forward and backward",
}

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


def hot_loop_complaints(statistics: Statistics) -> list[str]:
    """What is wrong with the hot loops of a kernel, of Triton or CUDA: nothing of theirs may lie in local memory."""
    local = [loop.classes["local"] for loop in statistics.loops if loop.is_loop and "local" in loop.classes]
    return [f"accesses local memory {number} times in a hot loop" for number in local]


def _is_known_to_be_issue_bound(case: Case) -> bool:
    return any(re.match(pattern, str(case)) for pattern in KNOWN_ISSUE_BOUND)


def complaints(case: Case, launch: Launch, statistics: Statistics) -> list[str]:
    """What is wrong with what came of compiling a launch of a case; nothing if it may ship."""
    if statistics.error is not None:
        return [f"does not compile: {statistics.error}"]
    found = [f"ptxas warns: {line}" for line in statistics.warnings]
    if statistics.spill_bytes > MAX_SPILL_BYTES:
        found.append(f"spills {statistics.spill_bytes} bytes per thread, {MAX_SPILL_BYTES} are allowed")
    found += hot_loop_complaints(statistics)
    ratio = max((loop.issue_ratio(case.arch) or 0.0 for loop in statistics.loops), default=0.0)
    if launch.name in STREAMING and ratio > MAX_ISSUE_RATIO and not _is_known_to_be_issue_bound(case):
        found.append(f"issues for {ratio:.2f} of the time that its bytes take, {MAX_ISSUE_RATIO} are allowed")
    with assume_arch(case.arch) as limits:
        if statistics.shared_memory > limits.shared_memory:
            found.append(
                f"needs {statistics.shared_memory} bytes of shared memory per block, "
                f"sm_{case.arch} has {limits.shared_memory}"
            )
    if launch.name in case.wgmma_kernels:
        if case.arch == 90 and not statistics.count(WARP_GROUP_MMA):
            found.append("does not use wgmma, as it should")
        if case.arch == 100 and not statistics.count(TENSOR_MEMORY_MMA):
            found.append("does not use tcgen05.mma, as it should")
    release = ".".join(triton.__version__.split(".")[:2])
    known = KNOWN_COMPLAINTS.get((release, str(case)))
    return [text for text in found if known is None or not text.startswith(known)]


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


def run_cases(
    chosen: Sequence[Case], processes: int | None = None, known: Collection[str] = frozenset()
) -> dict[str, Report]:
    """Records and compiles the cases, equal launches once; reports by the case's text.

    Launches whose keys are ``known`` to have compiled within the limits are left out, but for one of each kernel and architecture.
    """
    recorded = [(case, _record(case)) for case in chosen]
    launches = [launch for _, group in recorded if not isinstance(group, str) for launch in group]
    firsts = {(launch.name, launch.arch): launch.key for launch in reversed(launches)}
    due = [launch for launch in launches if launch.key not in known or firsts[launch.name, launch.arch] == launch.key]
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
