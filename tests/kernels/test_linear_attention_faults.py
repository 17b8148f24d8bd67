"""Broken copies of linear attention's kernels: the contract that the shipped kernels keep must fail for each of them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pytransformer import triton_interpreter
from pytransformer.verification import ContractError
from tests.support.launchers import linear_backward, linear_forward

from .linear_contract import CHUNK, Case, measure

pytestmark = pytest.mark.usefixtures("without_overflow_checks")
KERNELS = Path(__file__).resolve().parents[2] / "kernels/linear_attention"
BASE = Case(CHUNK + 9, decay=(0.9,))
FILES = ("tile", "policy", "states", "rows", "statistics", "recurrence", "forward", "backward")
FULL = Case(20, 40, dims=(16, 16), options={"causal": False})
PLAIN = Case(CHUNK + 9, dims=(16, 16))
DECAYED = replace(PLAIN, decay=(0.9,))
SEVERAL = Case(5, heads=(4, 2), dims=(16, 40), decay=(0.9, 0.5), config=None)
# By name: file, good text, bad text, and a case in which that matters.
FAULTS: dict[str, tuple[str, str, str, Case]] = {
    "no causal mask": ("rows", "tl.where(distance >= 0, products", "tl.where(distance >= -99, products", PLAIN),
    "features of padding": (
        "tile",
        "x = tl.where(inside, tl.where(wide",
        "x = tl.where(wide == wide, tl.where(wide",
        BASE,
    ),
    "rows behind the last loaded": (
        "tile",
        "mask=inside, other=0.0)",
        "mask=(offs_row[:, None] >= 0) & (offs_dim[None, :] < DIM), other=0.0)",
        PLAIN,
    ),
    "decay one step late": ("rows", "age = rows - first + 1", "age = rows - first", DECAYED),
    "decay of keys one step late": ("rows", "age = end - 1 - rows", "age = end - rows", DECAYED),
    "state without decay": (
        "states",
        "power(log2_decay, length - 1 - rows, traits)",
        "power(log2_decay, 0 * rows, traits)",
        DECAYED,
    ),
    "whole chunks between states": (
        "states",
        "length_1 = tl.minimum(seqlen - start - direction * CHUNK, CHUNK)",
        "length_1 = CHUNK",
        DECAYED,
    ),
    "state of the first chunk": (
        "rows",
        "(here.slot * num_chunks + chunk) * SIZE",
        "(here.slot * num_chunks) * SIZE",
        PLAIN,
    ),
    "states with the wrong stride": (
        "states",
        "states_ptr + (here.slot * num_chunks + chunk) * size",
        "states_ptr + (here.slot * num_chunks + chunk) * (size - 1)",
        PLAIN,
    ),
    "the own chunk in the state": (
        "states",
        "tl.store(states_ptr + place, state, mask=exists)",
        "tl.store(states_ptr + place, state + added, mask=exists)",
        PLAIN,
    ),
    "a chunk's last tile forgotten": (
        "states",
        "range(0, length, BLOCK_ROWS)",
        "range(0, length - BLOCK_ROWS + 1, BLOCK_ROWS)",
        PLAIN,
    ),
    "rows of the next chunk": ("rows", "end = tl.minimum(first + CHUNK, seqlen)", "end = seqlen", PLAIN),
    "keys of the wrong head": (
        "tile",
        "kv_head = head // traits.HEADS_PER_KV",
        "kv_head = head % traits.HEADS_PER_KV",
        replace(PLAIN, seqlen=9, heads=(4, 2)),
    ),
    "one head of the group forgotten": (
        "rows",
        "traits.HEADS_PER_KV if ROWS_ARE_KEYS else 1",
        "traits.HEADS_PER_KV - 1 if ROWS_ARE_KEYS else 1",
        replace(PLAIN, seqlen=9),
    ),
    "initial state forgotten": (
        "states",
        "if first_state_ptr is not None:",
        "if REVERSED and first_state_ptr is not None:",
        replace(PLAIN, seqlen=9),
    ),
    "denominator without the state": ("rows", "denominator *= weight", "denominator *= 0.0", replace(PLAIN, seqlen=9)),
    "delta not subtracted": (
        "rows",
        "products -= delta[:, None]",
        "products -= 0.0 * delta[:, None]",
        replace(PLAIN, seqlen=9),
    ),
    "delta of out alone": (
        "statistics",
        "dout.to(tl.float32) * out.to(tl.float32)",
        "out.to(tl.float32) * out.to(tl.float32)",
        replace(PLAIN, seqlen=9),
    ),
    "the slope of the features": (
        "rows",
        "acc *= tl.where(raw > 0.0, 1.0, tl.exp(raw))",
        "acc *= 1.0",
        replace(PLAIN, seqlen=9),
    ),
    "full: the state before the last chunk": (
        "states",
        "tl.store(states_ptr + base + offs, state, mask=inside)",
        "tl.store(states_ptr + base + offs, state * 0.5, mask=inside)",
        FULL,
    ),
    "slope of the decay between states": (
        "backward",
        '"before": "states" if given.wants_decay',
        '"before": "gradients" if given.wants_decay',
        DECAYED,
    ),
    "slope of the decay within chunks": (
        "rows",
        "gradient += tl.sum(scores * slopes, 1)",
        "gradient += tl.sum(scores * 0.0, 1)",
        replace(DECAYED, seqlen=9),
    ),
    "recurrence: state of the first head": (
        "recurrence",
        "last_state_ptr += here.slot * (traits",
        "last_state_ptr += here.slot * 0 * (traits",
        SEVERAL,
    ),
    "recurrence: decay forgotten": ("recurrence", "state = decay * state", "state = state", SEVERAL),
    "recurrence: columns behind the last": (
        "recurrence",
        "mask=offs_e < traits.VALUE_DIM",
        "mask=offs_e >= 0",
        SEVERAL,
    ),
}


def load(directory: Path, *fault: str) -> dict[str, Any]:
    """Launchers of a copy of all kernel files, one of them broken if a (file, good, bad) is given."""
    modules: dict[str, ModuleType] = {}
    for file in FILES:
        source = (KERNELS / f"{file}.py").read_text()
        if fault and file == fault[0]:
            assert source.count(fault[1]) == 1, f"{fault[1]!r} stands {source.count(fault[1])} times in {file}.py"
            source = source.replace(fault[1], fault[2])
        for other in FILES:
            source = source.replace(f"from .{other} import", f"from .broken_{other} import")
        name = f"pytransformer.kernels.linear_attention.broken_{file}"
        path = directory / f"broken_{file}.py"
        path.write_text(source)
        specification = importlib.util.spec_from_file_location(name, path)
        assert specification is not None and specification.loader is not None
        modules[file] = sys.modules[name] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(modules[file])

    def forward(*given: Any, **options: Any) -> Any:
        return linear_forward(*given, launch=modules["forward"].LinearForward, **options)

    def backward(*given: Any, **options: Any) -> Any:
        return linear_backward(*given, launch=modules["backward"].LinearBackward, **options)

    return {"forward": forward, "backward": backward}


@pytest.fixture
def unload() -> Iterator[None]:
    yield
    import pytransformer.kernels.linear_attention as package

    for file in FILES:
        sys.modules.pop(f"{package.__name__}.broken_{file}", None)
        vars(package).pop(f"broken_{file}", None)


@pytest.mark.skipif(not triton_interpreter.installed(), reason="faulty kernels run in the interpreter only")
@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_kernel_is_caught(
    name: str, tmp_path: Path, device: torch.device, poison_empty: None, unload: None
) -> None:
    *fault, case = FAULTS[name]
    with pytest.raises((ContractError, triton_interpreter.KernelFault)):
        measure(case, device, seeds=1, **load(tmp_path, *fault)).check()


def test_copies_that_are_not_broken_pass(
    tmp_path: Path, device: torch.device, poison_empty: None, unload: None
) -> None:
    """Else the tests above would show nothing."""
    launchers = load(tmp_path)
    for case in {id(entry[-1]): entry[-1] for entry in FAULTS.values()}.values():
        measure(case, device, seeds=1, **launchers).check()
