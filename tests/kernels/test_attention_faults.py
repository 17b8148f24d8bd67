"""Broken copies of the attention kernels: the checks that the shipped kernels pass must fail for each of them."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pytransformer.verification import Contract, ContractError
from tests.conftest import INTERPRETING

from .attention_contract import WITH_SLOPES, Case, backward, draw, forward, run_backward, run_forward, run_reference

KERNELS = Path(__file__).resolve().parents[2] / "kernels/attention"
pytestmark = pytest.mark.usefixtures("without_overflow_checks")

CAUSAL = Case((20, 33), options={"causal": True})
WINDOW = Case((20, 40), options={"window": (9, 2)})
MORE_QUERIES = Case((40, 20), options={"causal": True})
PACKED = Case(((5, 7), (0, 3), (17, 33), (4, 0)), heads=(4, 2), options={"causal": True})
DROPOUT = Case((20, 33), options={"dropout_p": 0.3, "dropout_seed": torch.tensor([3, 4])})
SOFTCAP = Case((20, 33), options={"softcap": 0.8})
SINKS = Case((20, 33), options={"sinks": torch.tensor([0.5, -0.5])})
SHARED_BIAS = Case((20, 33), batch=2, options={"bias": torch.randn(1, 2, 20, 33, generator=torch.manual_seed(0))})
SLOPES = Case((20, 40), options={"alibi_slopes": torch.tensor([0.5, 0.1]), "softcap": 2.0}, differentiable=WITH_SLOPES)
PACKED_SLOPES = replace(SLOPES, lengths=PACKED.lengths, options={"alibi_slopes": torch.full((4, 2), 0.3)})
HUGE = Case((20, 33), lse_gradient=False, options={"bias": torch.full((33,), -1e9)})
LONG = Case((20, 100), options={"window": (-1, 30)})


def blocks(case: Case, generator: torch.Generator) -> torch.Tensor:
    """Of blocks of 16; each head its own."""
    return torch.rand(1, 4, 3, 3, generator=generator) < 0.6


BLOCKS = Case((33, 40), heads=(4, 2), options={"causal": True, "block_mask": blocks, "block_size": (16, 16)})
SHARED_BIAS_BLOCKS = replace(
    SHARED_BIAS, options={**SHARED_BIAS.options, "block_mask": torch.eye(2, 3)[None, None] > 0, "block_size": (16, 16)}
)


@dataclass(frozen=True)
class Fault:
    """Text of one kernel file to replace, and a case in which that matters."""

    file: str
    good: str
    bad: str
    case: Case = field(default_factory=lambda: CAUSAL)
    times: int = 1


FAULTS = {
    "causal mask removed": Fault("tile", "edges.seqlen_q + edges.window_right)", "edges.seqlen_q + 99)"),
    "window off by one": Fault("tile", "keep & (keys >= rows", "keep & (keys > rows", WINDOW),
    "left edge of the window removed": Fault(
        "tile", "edges.seqlen_q - edges.window_left) - start_n", "edges.seqlen_q - 99) - start_n", WINDOW
    ),
    "end of the keys not masked": Fault(
        "tile", "last = tl.where(rows < edges.seqlen_q, edges.seqlen_k - 1, -1)", "last = rows * 0 + 99", Case((20, 33))
    ),
    "loads not masked at the end": Fault(
        "tile", "mask=offs_row[:, None] < rows_left, other=0.0", "mask=offs_row[:, None] >= 0, other=0.0"
    ),
    "features behind head_dim loaded": Fault(
        "tile",
        "mask=(offs_row[:, None] < rows_left) & (offs_dim[None, :] < DIM), other=0.0",
        "mask=(offs_row[:, None] < rows_left) & (offs_dim[None, :] >= 0), other=0.0",
        Case((20, 33), dims=(40, 24)),
    ),
    "stores not masked at the end": Fault("tile", "mask = offs_row[:, None] < rows_left", "mask = offs_row[:, None] >= 0"),
    "last tile forgotten": Fault("tile", "    end_position = length\n", "    end_position = length - 31\n", Case((20, 33))),
    "tile of the right edge taken for whole": Fault(
        "tile", "inside_end_position = tl.minimum(length, first + high_shift + 1)", "inside_end_position = end_position", CAUSAL
    ),
    "tile of the left edge taken for whole": Fault(
        "tile", "inside_begin = (tl.maximum(last + low_shift, 0) + BLOCK - 1) // BLOCK", "inside_begin = begin", WINDOW
    ),
    "lengths aligned top-left": Fault(
        "tile", "rows + (edges.seqlen_k - edges.seqlen_q + edges.window_right)", "rows + edges.window_right"
    ),
    "two programs for one tile": Fault("tile", "tile = within // slots_here", "tile = within // slots_here // 2 * 2"),
    "rows of the neighbouring sequence": Fault(
        "tile", "tl.minimum(end, total) - start", "tl.minimum(end + 1, total) - start", PACKED
    ),
    "wrong sequence found": Fault("tile", "// BLOCK + middle <= tile", "// BLOCK + middle < tile", PACKED),
    "wrong dropout words": Fault("tile", "tl.join(tl.join(word_0, word_2)", "tl.join(tl.join(word_2, word_0)", DROPOUT),
    "wrong stride": Fault(
        "forward", "v_tile_ptr = v_ptr + first_key * v_strides.seq", "v_tile_ptr = v_ptr + first_key * q_strides.seq"
    ),
    "wrong head of the keys": Fault("forward", "kv_head = place.head // traits.HEADS_PER_KV", "kv_head = place.head % traits.HEADS_PER_KV"),
    "output not rescaled": Fault("forward", "acc = acc * rescale[:, None]", "acc = acc", LONG),
    "sum not rescaled": Fault("forward", "row_sum = row_sum * rescale + ", "row_sum = row_sum + ", LONG),
    "output not divided by the sum": Fault("forward", "acc = acc / row_sum[:, None]", "acc = acc"),
    "rows that see nothing not guarded": Fault(
        "forward", 'shift = tl.where(new_max == float("-inf"), 0.0, new_max)', "shift = new_max", MORE_QUERIES
    ),
    "lse in base 2": Fault("forward", "row_max + tl.log2(row_sum) * LN2", "row_max + tl.log2(row_sum)"),
    "output not written": Fault("forward", "common.store_tile(out_ptr", "common.store_tile(q_ptr"),
    "dropout not rescaled": Fault("forward", "acc = acc * dropout.scale", "acc = acc", DROPOUT),
    "gradient of lse ignored": Fault(
        "backward", "delta -= tl.load(dlse_ptr", "delta -= 0.0 * tl.load(dlse_ptr"
    ),
    "gradient into rows that see nothing": Fault(
        "backward", 'delta = tl.where(lse == float("-inf"), 0.0, delta)', "delta = delta", MORE_QUERIES
    ),
    "dq not scaled": Fault("backward", "dq * softmax_scale", "dq"),
    "dk not scaled": Fault("backward", "dk * softmax_scale", "dk"),
    "one head of the group forgotten": Fault(
        "backward", "last = 0, tiles * traits.HEADS_PER_KV", "last = 0, tiles * traits.HEADS_PER_KV - tiles"
    ),
    "group of heads stepped through by tiles": Fault("backward", "head_32 += was_last", "head_32 += 0"),
    "delta not subtracted": Fault("backward", "ds = p * (dp - delta[None, :])", "ds = p * dp"),
    "softcap without its slope": Fault("backward", "* common.softcap_slope(capped, softcap)", "", SOFTCAP, times=2),
    "dv without dropout": Fault("backward", "kept = tl.where(keep, p * dropout.scale, 0.0)", "kept = p", DROPOUT),
    "sink without its sign": Fault("backward", "tl.store(dsinks_ptr, -tl.sum(", "tl.store(dsinks_ptr, tl.sum(", SINKS),
    "gradient of a slope without distances": Fault("backward", "dslopes -= tl.sum(ds * distances, 1)", "dslopes -= tl.sum(ds, 1)", SLOPES),
    "gradient of a slope without its sign": Fault("backward", "dslopes -= tl.sum(", "dslopes += tl.sum(", SLOPES),
    "rows of the neighbour in the gradient of a slope": Fault(
        "slope_gradient", "mask=row < end, other=0.0", "mask=row < end + 1, other=0.0", PACKED_SLOPES
    ),
    "large rows not normalised again": Fault("backward", "tl.abs(lse)), 0) > large_lse", "tl.abs(lse)), 0) > 1e30", HUGE),
    "list of the neighbouring head": Fault("block_lists", "head * strides.head +", "head // 2 * strides.head +", BLOCKS),
    "list of the neighbouring block": Fault("block_lists", "start // strides.block_size,", "start // strides.block_size + 1,", BLOCKS),
    "entries counted up to the next tile": Fault("block_lists", "tl.minimum(tile, ", "tl.minimum(tile + 1, ", BLOCKS),
    "entries begin one later": Fault("block_lists", "row_ptr + strides.tiles + 1", "row_ptr + strides.tiles + 2", BLOCKS),
    "heads of a group share a mask": Fault("block_lists", "if group > 1 and mask.shape[1] > 1:", "if False:", BLOCKS),
    "tile taken for its entry": Fault("forward", "tile_n = tl.load(lists_ptr + step)", "tile_n = step", BLOCKS),
    "head taken from the tile": Fault("backward", "entry % traits.HEADS_PER_KV", "0", BLOCKS),
    "shared bias without its lists": Fault("bias_gradient", "tile_n = tl.load(row_ptr + step)", "tile_n = step", SHARED_BIAS_BLOCKS),
    "one batch of a shared bias forgotten": Fault(
        "bias_gradient", "first_sequence, last_sequence = 0, batch", "first_sequence, last_sequence = 0, batch - 1", SHARED_BIAS
    ),
}  # fmt: skip
FILES = ("tile", "block_lists", "normalisation", "bias_gradient", "slope_gradient", "forward", "backward")


def load(directory: Path, fault: Fault | None) -> dict[str, ModuleType]:
    """The kernel files, one of them broken, under other names beside the shipped ones."""
    modules = {}
    for file in FILES:
        source = (KERNELS / f"{file}.py").read_text()
        if fault is not None and file == fault.file:
            assert source.count(fault.good) == fault.times, (
                f"{fault.good!r} stands {source.count(fault.good)} times in {file}.py"
            )
            source = source.replace(fault.good, fault.bad)
        for other in FILES:
            source = source.replace(f"from .{other} import", f"from .broken_{other} import")
            source = source.replace(f"from . import {other} as", f"from . import broken_{other} as")
            source = source.replace(f"from . import {other}\n", f"from . import broken_{other} as {other}\n")
        name = f"pytransformer.kernels.attention.broken_{file}"
        path = directory / f"broken_{file}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        modules[file] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[file])
    return modules


@pytest.fixture
def unload() -> Iterator[None]:
    yield
    import pytransformer.kernels.attention

    for file in FILES:
        sys.modules.pop(f"pytransformer.kernels.attention.broken_{file}", None)
        vars(pytransformer.kernels.attention).pop(f"broken_{file}", None)


def check(modules: dict[str, ModuleType], case: Case, device: torch.device) -> None:
    """One draw, as faults are gross; the outputs are judged before there are gradients, as many faults show in them."""
    inputs, contract = draw(case, 0, device), Contract(case.dtype)
    plain, golden = run_reference(inputs), run_reference(inputs, torch.float64)
    outputs = run_forward(case, inputs, functools.partial(forward, launch=modules["forward"].attention_forward))
    contract.add_all(outputs, plain[0], golden[0])
    contract.check()
    launch = functools.partial(backward, launch=modules["backward"].attention_backward)
    contract.add_all(run_backward(case, inputs, outputs, launch), plain[1], golden[1], kind="gradient")
    contract.check()


@pytest.mark.skipif(not INTERPRETING, reason="a kernel that leaves its tensors is for the interpreter only")
@pytest.mark.parametrize("fault", [pytest.param(fault, id=name) for name, fault in FAULTS.items()])
def test_a_broken_kernel_is_caught(
    fault: Fault, tmp_path: Path, device: torch.device, poison_empty: None, unload: None
) -> None:
    from pytransformer.triton_interpreter import KernelFault

    modules = load(tmp_path, fault)
    with pytest.raises((ContractError, KernelFault)):
        check(modules, fault.case, device)


def test_copies_that_are_not_broken_pass(
    tmp_path: Path, device: torch.device, poison_empty: None, unload: None
) -> None:
    """Else the tests above would show nothing."""
    modules = load(tmp_path, None)
    for case in {id(fault.case): fault.case for fault in FAULTS.values()}.values():
        check(modules, case, device)
