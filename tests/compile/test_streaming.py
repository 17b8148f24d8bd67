"""What kernels that move memory wait for before they ask for it, read in their machine code."""

from __future__ import annotations

import re

import pytest
import triton

from tests.support.compile_gate import Case, cases
from tests.support.launch_recorder import Launch, record
from tests.support.sass import compile_launch, disassemble

pytestmark = pytest.mark.compiles

ARCHITECTURES = (80, 90, 100)
ROPE_POSITIONS = "rope-half-32/8x128-bfloat16-positions"
ROPE = ("rope-half-32/8x128-bfloat16", "rope-interleaved-32/8x128-bfloat16")
APPEND = ("bfloat16-prefill-rope", "bfloat16-prefill-interleaved", "bfloat16-decode-rope-norm")
NORM = "norm-forward-layer-4096-bfloat16-inference"
_LOAD_BARRIER_OR_CALL = re.compile(r"\b(?:LDG|BAR|CALL)\.[^;]*")


def _case(op: str, name: str, arch: int) -> Case:
    (found,) = (case for case in cases(op, [arch]) if case.name == name)
    return found


def _launch(op: str, name: str, arch: int, kernel: str) -> Launch:
    case = _case(op, name, arch)
    (launch,) = (launch for launch in record(case.call, arch) if launch.name == kernel)
    return launch


def _rope(name: str, arch: int = 90) -> Launch:
    return _launch("rope", name, arch, "rope_kernel")


def _append(name: str) -> Launch:
    return _launch("kv_append", f"kv_append-{name}", 90, "_kv_append_kernel")


def _norm() -> Launch:
    return _launch("norm", NORM, 90, "norm_forward_kernel")


def decided_by() -> list[str]:
    launches = [_rope(ROPE_POSITIONS, arch) for arch in ARCHITECTURES]
    launches += [*map(_rope, ROPE), *map(_append, APPEND), _norm()]
    return [launch.key for launch in launches]


def _loads_and_barriers(launch: Launch) -> list[str]:
    """Loads of global memory, barriers and calls of functions with their operands, in the order of the machine code."""
    compiled = triton.compile(launch.source(), target=launch.target, options=launch.options.__dict__)
    return _LOAD_BARRIER_OR_CALL.findall(disassemble(compiled.asm["cubin"]))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rope_reads_heads_before_it_knows_their_positions(arch: int) -> None:
    """A thread's two loads of a head lie half a head apart, 128 bytes; the rows of the tables are known when the positions are."""
    found = _loads_and_barriers(_rope(ROPE_POSITIONS, arch))
    wide = [text for text in found if re.match(r"LDG\S*\.(128|256)", text)]
    assert "+0x80]" in wide[0] + wide[1], wide[:4]
    assert not [text for text in found if not text.startswith("LDG")]


@pytest.mark.parametrize("name", ROPE)
def test_rope_hands_nothing_from_thread_to_thread(name: str) -> None:
    statistics = compile_launch(_rope(name))
    assert statistics.shared_memory == 0 and not statistics.count("BAR|SHFL|CALL")


@pytest.mark.parametrize("name", APPEND)
def test_append_reads_features_once_before_it_knows_their_places(name: str) -> None:
    """Two halves or two rows a thread, of q or of k; as many of v; cos, sin and weights. Nothing is read for a pair's other half."""
    launch = _append(name)
    loads = [text for text in _loads_and_barriers(launch) if text.startswith("LDG")]
    assert re.match(r"LDG\S*\.128", loads[0])
    wide = [text for text in loads if re.match(r"LDG\S*\.128", text)]
    assert len(wide) <= (14 if "norm" in name else 10)
    assert compile_launch(launch).shared_memory == 0


def test_norms_ask_for_weights_before_the_row_is_reduced() -> None:
    names = [text.split(".")[0] for text in _loads_and_barriers(_norm())]
    assert names.count("LDG") == 8  # two of x, residual, weight and bias
    assert "LDG" not in names[names.index("BAR") :]
