"""The committed figures of the static gate: what each kernel compiled to, per architecture, and how that compares with now.

For one compiler and one source they are always the same, so a difference is a change of the code. Large ones are said, since they may be
meant; a kernel without figures fails: `make gate-figures` writes them.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
from collections.abc import Mapping
from typing import Any

import triton

from tests.support import cuda_sass
from tests.support.emulator import ROOT, builder
from tests.support.hot_loop import Loop
from tests.support.occupancy import blocks_per_sm
from tests.support.sass import GLOBAL_128_BIT, GLOBAL_ACCESS, TENSOR_MEMORY_MMA, WARP_GROUP_MMA, Statistics

FOLDER = ROOT / "benchmarks/results/gate"
# What decides whether a compiled kernel passes, beside the compiler: with other rules each is compiled again.
_RULES = ("limits.py", "hot_loop.py", "occupancy.py", "sass.py")
WARP_MMA = re.compile(r"[HIQ]MMA")
LOCAL_ACCESS = re.compile(r"LDL|STL")
# A change of more than this is said.
NOTEWORTHY = 0.10


def compiler(kind: str) -> str:
    """What the figures of a kind ("triton", "peer" or "cuda") depend on beside the sources."""
    if kind != "cuda":
        ptxas = ROOT / triton.knobs.nvidia.ptxas.path
        release = re.search(
            r"V[\d.]+", subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
        )
        return f"triton {triton.__version__}, ptxas {release.group() if release else 'unknown'}"
    nvcc = builder().find_nvcc()
    return f"nvcc {builder().nvcc_version(nvcc)}"


def arch_of(name: str) -> int:
    """The compute capability in a kernel's name: both kinds have an "sm_90" in it."""
    found = re.search(r"\bsm_(\d+)", name)
    assert found is not None, name
    return int(found.group(1))


def loop_figures(loop: Loop, arch: int) -> dict[str, Any]:
    """What is kept of a hot loop: instructions, of each class that occurs, and what they wait for."""
    ratio = loop.issue_ratio(arch)
    return {
        "is_loop": loop.is_loop,
        "instructions": loop.instructions,
        "cta_barriers": loop.cta_barriers,
        "bytes_per_thread": loop.bytes_per_thread,
        "issue_ratio": None if ratio is None else round(ratio, 2),
        "classes": dict(loop.classes),
    }


def figures(statistics: Statistics, arch: int) -> dict[str, Any]:
    """What is kept of a compiled kernel. ``blocks_per_sm`` is None where only a call knows the block."""
    accesses = statistics.count(GLOBAL_ACCESS)
    wide = statistics.count(GLOBAL_128_BIT)
    warps = statistics.num_warps
    return {
        "registers": statistics.registers,
        "spill_bytes": statistics.spill_bytes,
        "stack_bytes": statistics.stack_bytes,
        "shared_memory": statistics.shared_memory,
        "blocks_per_sm": blocks_per_sm(arch, statistics.registers, warps, statistics.shared_memory) if warps else None,
        "instructions": sum(statistics.instructions.values()),
        "mma": statistics.count(WARP_MMA),
        "wgmma": statistics.count(WARP_GROUP_MMA),
        "tcgen05": statistics.count(TENSOR_MEMORY_MMA),
        "ex2": statistics.count(r"MUFU\.EX2"),
        "tma_loads": statistics.count("UTMALDG"),
        "async_copies": statistics.count("LDGSTS"),
        "global_128_bit": wide,
        "global_narrower": accesses - wide,
        "local": statistics.count(LOCAL_ACCESS),
        "loops": [loop_figures(loop, arch) for loop in statistics.loops],
    }


def flat(kept: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of :func:`figures` by one name each, those of loops as "loop 0 integer"."""
    numbers = {name: value for name, value in kept.items() if name not in ("loops", "key") and value is not None}
    loops = kept.get("loops", [])
    numbers["loops"] = len(loops)
    for number, loop in enumerate(loops):
        parts = {name: value for name, value in loop.items() if isinstance(value, int)} | loop["classes"]
        numbers |= {f"loop {number} {name}": value for name, value in parts.items()}
    return numbers


def _wgmma_rules() -> list[str]:
    """The functions of the cases' modules that say which kernels must use the matrix instructions."""
    found = []
    for path in sorted((ROOT / "tests/compile/cases").glob("*.py")):
        text = path.read_text()
        functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        found += [ast.get_source_segment(text, node) or "" for node in functions if node.name == "wgmma_kernels"]
    return found


def rules() -> str:
    """Of the sources of the rules, a hash."""
    texts = [(ROOT / "tests/support" / name).read_text() for name in _RULES]
    return hashlib.sha256("".join(texts + _wgmma_rules()).encode()).hexdigest()[:16]


def known_keys() -> frozenset[str]:
    """Keys of the Triton launches that have passed with this compiler and these rules, as the committed figures say."""
    committed = json.loads((FOLDER / "triton.json").read_text())
    if (committed["compiler"], committed.get("rules")) != (compiler("triton"), rules()):
        return frozenset()
    return frozenset(kept["key"] for kept in committed["kernels"].values() if "key" in kept)


def write(kind: str, kernels: Mapping[str, Statistics], passed: Mapping[str, str]) -> None:
    """Makes these the committed figures of a kind; ``passed`` has the keys of those that are within the limits, by name."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in sorted(kernels):
        kept = ({"key": passed[name]} if name in passed else {}) | figures(kernels[name], arch_of(name))
        lines.append(f"    {json.dumps(name)}: {json.dumps(kept)}")
    head = f'{{\n  "compiler": {json.dumps(compiler(kind))},\n  "rules": {json.dumps(rules())},\n'
    if kind == "cuda":
        head += f'  "sources": {json.dumps(cuda_sass.sources())},\n'
    (FOLDER / f"{kind}.json").write_text(head + '  "kernels": {\n' + ",\n".join(lines) + "\n  }\n}\n")


def compare(kind: str, kernels: Mapping[str, Statistics]) -> tuple[list[str], list[str]]:
    """(what is wrong, what is worth knowing) about ``kernels`` beside the committed figures; nothing is wrong with another compiler."""
    committed = json.loads((FOLDER / f"{kind}.json").read_text())
    if committed["compiler"] != compiler(kind):
        return [], [f"the figures were made with {committed['compiler']}, this is {compiler(kind)}: not compared"]
    wrong, changes = [], []
    for name, statistics in kernels.items():
        before = committed["kernels"].get(name)
        if before is None:
            wrong.append(
                f"{name} has no committed figures: run `make gate-figures` and commit {FOLDER.name}/{kind}.json"
            )
            continue
        old, new = flat(before), flat(figures(statistics, arch_of(name)))
        for figure in sorted(old.keys() | new.keys()):
            value = new.get(figure, 0)
            if abs(value - old.get(figure, 0)) > NOTEWORTHY * old.get(figure, 0):
                changes.append(f"{name}: {figure} {old.get(figure, 0)} -> {value}")
    return wrong, changes
