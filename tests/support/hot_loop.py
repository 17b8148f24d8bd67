"""The loops of a kernel in its machine code, and what decides their speed: instructions by class, barriers, local memory, bytes.

A loop is what lies between the target of a backward branch and that branch. Only innermost loops count, and of those the ones that do
the kernel's work: of a kernel with matrix instructions the loops that have them, of another the loops that move its global memory. A kernel
without such a loop does all its work once, and is judged whole.

``issue_ratio`` says which of issue and memory a streaming kernel waits for. An SM issues an instruction for each of 4 warps per clock, so a
loop of ``instructions`` takes ``instructions * warps / 4`` clocks of issue; the bytes of a loop of ``warps`` warps take
``32 * warps * bytes_per_thread / bytes_per_clock``. The warps cancel out. Above 0.8 issue is what the loop waits for.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence

WARP_SIZE = 32
# Warps that an SM issues an instruction for in each clock.
ISSUED_PER_CLOCK = 4
# Bytes that global memory moves per clock and SM: measured copy rate, or 80 % of the data sheet's, by the SMs and their boost clock. sm_80:
# 1.555 TB/s (A100 40 GB), 108 SMs, 1.41 GHz; sm_90: 4.3 TB/s measured on an H200, 132 SMs, 1.755 GHz; sm_100: 8 TB/s, 148 SMs, 1.85 GHz.
BYTES_PER_CLOCK = {80: 8.2, 90: 18.6, 100: 23.4}
# Loops with less than this part of the most work of one loop are not hot: searches, tails, prologues.
LEAST_WORK = 0.25

LINE = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<name>[A-Z][A-Z0-9_.]*)(?P<operands>[^;]*);"
    r"|^\s*(?P<label>\.L_\w+):",
    re.MULTILINE,
)
_TARGET = re.compile(r"`\((?P<label>\.L_\w+)\)|\b0x(?P<address>[0-9a-f]+)\s*$")
_WIDTH = re.compile(r"\.(?:ENL2\.)?(?:[US])?(8|16|32|64|128|256)(?:\.|$)")
MATRIX = re.compile(r"[DHIQO]MMA|[HIQ]GMMA|UTC\w*MMA")
GLOBAL = re.compile(r"(LDG|STG|LDGSTS)\.")
LOCAL = re.compile(r"LDL|STL")

# Class of an instruction by how its name begins, first match counts. Everything issues in the same slots, the uniform datapath too.
CLASSES = {
    "matrix": MATRIX,
    "ex2": re.compile(r"MUFU\.EX2"),
    "special": re.compile(r"MUFU"),
    "local": LOCAL,
    "global": re.compile(r"LDG(?!DEPBAR)|STG|RED|ATOMG|UTMALDG|UTMASTG|UBLKCP|LD\.|ST\."),
    "shared": re.compile(r"LDS|STS|LDSM|STSM|ATOMS|LDTM|STTM|LDT\.|STT\."),
    "barrier": re.compile(r"BAR\.|SYNCS|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|WARPGROUP|WARPSYNC|ERRBAR|UTMACMDFLUSH"),
    "convert": re.compile(r"F2F|F2I|I2F|F2FP|I2I|FRND|UF2F|PRMT|I2FP|HADD2\.F32"),
    "float": re.compile(
        r"F(ADD|MUL|FMA|MNMX|SETP|SET|SEL|CHK|SWZADD)|H(ADD|MUL|FMA|MNMX|SET)|D(ADD|MUL|FMA|SETP)|FADD2|UF"
    ),
    "shuffle": re.compile(r"SHFL|REDUX|VOTE|MATCH|CREDUX"),
    "integer": re.compile(
        r"U?(IADD|IMAD(?!\.MOV)|LEA|LOP3|LOP|SHF|SHL|SHR|ISETP|IABS|IMNMX|VIMNMX|VIADD|VIADDMNMX|BREV|FLO|POPC|SGXT|BMSK|IDP|ISCADD)"
    ),
    "move": re.compile(r"U?(MOV|SEL|IMAD\.MOV|R2P|P2R|PLOP3|S2R|S2UR|CS2R|LDC|LDCU|R2UR|FSEL)"),
    "control": re.compile(
        r"BRA|BSSY|BSYNC|EXIT|CALL|RET|NOP|JMP|BRX|WARPSYNC|BREAK|ELECT|NANOSLEEP|YIELD|ACQBULK|KILL"
    ),
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a listing.

    Attributes:
        name: with its modifiers, ``LDG.E.128``.
        operands: the text behind it.
    """

    name: str
    operands: str = ""

    @property
    def is_cta_barrier(self) -> bool:
        """Whether all warps of the block meet here: barrier 0, and no number of threads that would make it a part's."""
        return self.name.startswith(("BAR.SYNC", "BAR.RED")) and "," not in self.operands

    @property
    def global_bytes(self) -> int:
        """Bytes of global memory that each thread moves; of what the TMA moves nothing is known here."""
        if not GLOBAL.match(self.name):
            return 0
        width = _WIDTH.search(self.name)
        return int(width.group(1)) // 8 if width else 4


@dataclasses.dataclass(frozen=True)
class Loop:
    """What a loop is made of, or a whole kernel where ``is_loop`` is False.

    Attributes:
        classes: instructions by the classes of :data:`CLASSES`; ``other`` is the rest.
        cta_barriers: where all warps of the block wait for each other.
        bytes_per_thread: of global memory, by registers or cp.async, if all lanes and predicates take part.
    """

    classes: Mapping[str, int]
    cta_barriers: int
    bytes_per_thread: int
    is_loop: bool = True

    @property
    def instructions(self) -> int:
        """All of them."""
        return sum(self.classes.values())

    @property
    def work(self) -> tuple[int, int]:
        """What makes one loop hotter than another."""
        return self.classes.get("matrix", 0), self.bytes_per_thread

    def issue_ratio(self, arch: int) -> float | None:
        """Clocks of issue by clocks of memory on an SM of ``arch``; None if no bytes are seen."""
        if self.bytes_per_thread == 0:
            return None
        memory_clocks = WARP_SIZE * self.bytes_per_thread / BYTES_PER_CLOCK[arch]
        return self.instructions / ISSUED_PER_CLOCK / memory_clocks


def class_of(name: str) -> str:
    """Of :data:`CLASSES`, or ``other``."""
    return next((kind for kind, pattern in CLASSES.items() if pattern.match(name)), "other")


def summary(instructions: Sequence[Instruction], is_loop: bool = True) -> Loop:
    """What a stretch of instructions is made of."""
    counted = Counter(class_of(instruction.name) for instruction in instructions)
    return Loop(
        dict(sorted(counted.items())),
        sum(instruction.is_cta_barrier for instruction in instructions),
        sum(instruction.global_bytes for instruction in instructions),
        is_loop,
    )


def read(listing: str) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """The instructions of a function's listing, and (first, last) index of each of its loops, outer ones too.

    Args:
        listing: of nvdisasm, whose branches name labels, or of cuobjdump, whose branches name addresses.
    """
    instructions: list[Instruction] = []
    places: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in LINE.finditer(listing):
        if line["label"]:
            places[line["label"]] = len(instructions)
            continue
        places[f"0x{int(line['address'], 16):x}"] = len(instructions)
        if line["name"].startswith(("BRA", "JMP")):
            target = _TARGET.search(line["operands"].strip())
            if target:
                branches.append((len(instructions), target["label"] or f"0x{int(target['address'], 16):x}"))
        instructions.append(Instruction(line["name"], line["operands"]))
    ends: dict[int, int] = {}
    for last, target in branches:
        first = places.get(target, last + 1)
        # A branch to itself is the trap behind the end.
        if first < last:
            ends[first] = max(last, ends.get(first, 0))
    return instructions, sorted(ends.items())


def innermost(loops: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that no other one lies in."""
    return [
        (first, last)
        for first, last in loops
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in loops)
    ]


def hot_loops(listing: str) -> list[Loop]:
    """The loops that do the work of a function, in the order of its code; the whole of it where none does.

    Args:
        listing: of one function.
    """
    instructions, loops = read(listing)
    found = [summary(instructions[first : last + 1]) for first, last in innermost(loops)]
    whole = summary(instructions, is_loop=False)
    kind = 0 if whole.work[0] else 1
    # Where most of the work lies outside of loops, they are not what costs.
    if sum(loop.work[kind] for loop in found) <= LEAST_WORK * whole.work[kind]:
        return [whole]
    most = max(loop.work[kind] for loop in found)
    return [loop for loop in found if loop.work[kind] >= LEAST_WORK * most]
