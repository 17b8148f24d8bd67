"""Hopper's attention part by part, for the first minutes on a GPU: copies, the product q kᵀ, the softmax, then the whole kernels.

Each part is a kernel with the structure of the whole one: a producer warp copies tiles by TMA into two stages of shared memory, a warpgroup
takes them from there, and barriers say when a stage is full and when it is empty. So what one of them hangs on or gets wrong is one of few
things: see :data:`STAGES`. They run in the Gluon interpreter as on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from pytransformer import reference
from pytransformer.kernels.hopper.backward_launch import HopperBackward
from pytransformer.kernels.hopper.bringup import BLOCK, LAYOUT, ROWS, loads_kernel, product_kernel, softmax_kernel
from pytransformer.kernels.hopper.descriptors import HostDescriptor
from pytransformer.kernels.hopper.launch import HopperForward, prepare
from pytransformer.kernels.hopper.names import HAS_REDUCTIONS
from pytransformer.kernels.launch import COMMON_OPTIONS
from pytransformer.kernels.prepared import PreparedLaunch
from pytransformer.ops.attention.call import AttentionCall
from pytransformer.verification import Contract

NUM_WARPS = 4
# Launches that must give the same bits.
REPEATS = 50
# Of Triton: it compiles its sanitizers into every kernel of a process.
MODE_VARIABLE = "TRITON_INSTRUMENTATION_MODE"
# How the steps are called in which a kernel of ours is waited for; in others it is a compiler, or torch that computes what is compared.
WAITING, DONE = "waiting", "done"
GRADIENTS = ("dq", "dk", "dv")
# Its sums are added to memory in whatever order programs get there.
UNORDERED = ("dq",)


@dataclass(frozen=True)
class Size:
    """How much a stage does: so many programs, each over so many tiles of 128 keys, of vectors of ``head_dim``."""

    programs: int
    tiles: int
    head_dim: int

    @property
    def rows(self) -> int:
        return self.programs * ROWS.value

    @property
    def keys(self) -> int:
        return self.tiles * BLOCK.value


# More tiles than stages, so that each stage is used again; on a GPU two programs for each SM of an H200.
TINY = Size(2, 3, 64)
LARGE = Size(264, 8, 128)


Results = dict[str, Tensor]
# What a draw of inputs comes to, name by name: by the kernel, which is launched anew each time, by torch in 16 bits, and in float64.
Case = tuple[Callable[[], Results], Callable[[], Results], Callable[[], Results]]
# Draws them: (whether small ones, device).
Draw = Callable[[bool, torch.device], Case]


def loads(size: Size, device: torch.device) -> Case:
    """A copy: right to the bit, or wrong."""
    x = _normal(size.programs * size.keys, size.head_dim, device=device)
    out = torch.full_like(x, float("nan"))
    launch = _prepared(loads_kernel, size, (_tiles(x, BLOCK.value), None, size.tiles), {"D": size.head_dim})

    def run() -> Results:
        launch((x, out))
        return {"out": out}

    return run, lambda: {"out": x}, lambda: {"out": x.double()}


def product(size: Size, device: torch.device) -> Case:
    """Scores of all queries and keys."""
    q = _normal(size.rows, size.head_dim, device=device)
    k = _normal(size.keys, size.head_dim, device=device)
    out = torch.full((size.rows, size.keys), float("nan"), device=device)
    arguments = (_tiles(q, ROWS.value), _tiles(k, BLOCK.value), None, size.tiles)
    launch = _prepared(product_kernel, size, arguments, {})

    def run() -> Results:
        launch((q, k, out))
        return {"out": out}

    return run, lambda: {"out": q @ k.T}, lambda: {"out": q.double() @ k.double().T}


def softmax(size: Size, device: torch.device) -> Case:
    """The softmax of scores that are given."""
    scores = 3 * _normal(size.rows, size.keys, device=device)
    lse = torch.full((size.rows,), float("nan"), device=device)
    last = torch.full((size.rows, BLOCK.value), float("nan"), device=device)
    launch = _prepared(softmax_kernel, size, (_tiles(scores, ROWS.value), None, None, size.tiles), {})

    def run() -> Results:
        launch((scores, lse, last))
        return {"lse": lse, "weights": last}

    def by_torch(x: Tensor) -> Results:
        return {"lse": x.logsumexp(1), "weights": x.softmax(1)[:, -BLOCK.value :]}

    return run, lambda: by_torch(scores), lambda: by_torch(scores.double())


def _whole(queries: int, keys: int, heads: int, kv_heads: int, head_dim: int, causal: bool) -> Draw:
    """The forward kernel as calls launch it. Lengths are no multiples of a tile: the last one of each is cut."""

    def draw(tiny: bool, device: torch.device) -> Case:
        batch, lengths = (1, (queries // 8, keys // 8)) if tiny else (2, (queries, keys))
        q = _normal(batch, lengths[0], heads, head_dim, device=device)
        k, v = (_normal(batch, lengths[1], kv_heads, head_dim, device=device) for _ in range(2))
        call = AttentionCall(q, k, v, softmax_scale=head_dim**-0.5, causal=causal)
        forward = HopperForward(call)

        def run() -> Results:
            return dict(zip(("out", "lse"), forward(call)))

        def by_reference(*tensors: Tensor) -> Results:
            return dict(zip(("out", "lse"), reference.attention(*tensors, causal=causal, return_lse=True)))

        return run, lambda: by_reference(q, k, v), lambda: by_reference(q.double(), k.double(), v.double())

    return draw


def _backward(seqlen: int, heads: int, head_dim: int) -> Draw:
    """The backward kernels behind what the reference's forward pass returned, rounded: causal, two query heads for each key head."""

    def draw(tiny: bool, device: torch.device) -> Case:
        batch, length, kv_heads = (1, seqlen // 8, heads // 2) if tiny else (2, seqlen, heads // 2)
        q, dout = (_normal(batch, length, heads, head_dim, device=device) for _ in range(2))
        k, v = (_normal(batch, length, kv_heads, head_dim, device=device) for _ in range(2))
        out, lse = reference.attention(q.double(), k.double(), v.double(), causal=True, return_lse=True)
        call = AttentionCall(q, k, v, softmax_scale=head_dim**-0.5, causal=True)
        given = (call, dout, out.bfloat16(), lse.float(), None)
        backward = HopperBackward(*given)

        def run() -> Results:
            return dict(zip(GRADIENTS, backward(*given)[:3]))

        def by_reference(*tensors: Tensor) -> Results:
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            with torch.enable_grad():
                attended = reference.attention(*leaves, causal=True)
                return dict(zip(GRADIENTS, torch.autograd.grad(attended, leaves, dout.to(leaves[0].dtype))))

        return run, lambda: by_reference(q, k, v), lambda: by_reference(q.double(), k.double(), v.double())

    return draw


def _prepared(kernel: Any, size: Size, arguments: tuple[Any, ...], constants: dict[str, Any]) -> PreparedLaunch:
    return prepare(kernel, (size.programs,), arguments, {**constants, "num_warps": NUM_WARPS, **COMMON_OPTIONS})


def _tiles(matrix: Tensor, rows: int) -> HostDescriptor:
    """Boxes of so many rows, as wide as a tile: the features, or 128 scores."""
    return HostDescriptor.of(matrix, (rows, min(matrix.shape[1], BLOCK.value)), LAYOUT)


def _normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Stage:
    """One part of the kernel.

    Attributes:
        cases: by name.
        suspects: what to look at if it hangs or is wrong while the stages before it passed.
    """

    cases: dict[str, Draw]
    suspects: str


def _sized(case: Callable[[Size, torch.device], Case]) -> dict[str, Draw]:
    def at(head_dim: int) -> Draw:
        return lambda tiny, device: case(replace(TINY if tiny else LARGE, head_dim=head_dim), device)

    return {"d64": at(64), "d128": at(128)}


STAGES = {
    "loads": Stage(
        _sized(loads), "tensor maps (descriptors.py), expected bytes, phases of full and empty, register counts"
    ),
    "product": Stage(
        _sized(product), "layouts of wgmma's operands, its wait, what a stage holds when it is given back"
    ),
    "softmax": Stage(
        {"d128": _sized(softmax)["d128"]}, "reductions in the layout of wgmma's results, exp2, reads of shared memory"
    ),
    "whole": Stage(
        {
            "d128 causal, grouped, fewer queries": _whole(504, 1016, 8, 2, 128, True),
            # 192 places: more than there are blocks, of which some go on to a second one.
            "d128 causal, two places for a block": _whole(1016, 1016, 12, 12, 128, True),
            "d64, two places for a block": _whole(1000, 1528, 12, 12, 64, False),
        },
        "what no stage before has: two consumers that share stages, the product with v, its operand in registers, the store; "
        "where one place is right and two are not, q_empty and the phases that go on",
    ),
    "backward": Stage(
        {"d128": _backward(1016, 8, 128), "d64": _backward(1016, 8, 64)},
        "the reduce-add of dq and its wait, the shifts and deltas of a stage, the store of ds between warpgroups and copies",
    ),
}
if not HAS_REDUCTIONS:  # so in Triton 3.6, where the portable kernels compute gradients
    del STAGES["backward"]


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pytransformer.benchmarks.programs.hopper_stages STAGE --notes FILE`: one stage, as a process of gpu_hopper.py."""
    parser = argparse.ArgumentParser(prog="python -m pytransformer.benchmarks.programs.hopper_stages")
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--notes", type=Path, required=True, help="a line of JSON for each step, written before it is taken"
    )
    arguments = parser.parse_args(argv)
    device, start = torch.device(arguments.device), time.monotonic()
    is_sanitized = bool(os.environ.get(MODE_VARIABLE))
    with arguments.notes.open("a") as stream:

        def note(step: str, **more: Any) -> None:
            stream.write(json.dumps({"step": step, "at": round(time.monotonic() - start, 2), **more}) + "\n")
            stream.flush()
            print(step, *more.values(), flush=True)

        tiny = device.type == "cpu" or is_sanitized
        if is_sanitized:
            _give_scratch_memory(device)
        try:
            for case, draw in STAGES[arguments.stage].cases.items():
                check_case(case, draw, tiny, device, note)
        except Exception as error:
            note("failed", failure=f"{type(error).__name__}: {error}"[:600])
            raise
        note(DONE)
    return 0


def check_case(case: str, draw: Draw, tiny: bool, device: torch.device, note: Callable[..., None]) -> None:
    """One draw of inputs: a first launch, which compiles, the contract, then the same bits again and again.

    Raises:
        ContractError: a result is wrong.
        AssertionError: results differ between launches.
    """
    torch.manual_seed(0)
    note(f"drawing inputs of {case}")
    run, plain, golden = draw(tiny, device)
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
        kind = "gradient" if key in GRADIENTS else "output"
        contract.add(f"{case} {key}", actual=value, plain=of_plain[key], golden=of_golden[key], kind=kind)
    note(f"compared {case}", ratios={key: errors.ratio for key, errors in contract.results.items()})
    contract.check()
    note(f"waiting for launch after launch of {case}")
    for number in range(1 if tiny else REPEATS):
        for key, value in run().items():
            if key not in UNORDERED and not torch.equal(value, actual[key]):
                raise AssertionError(f"{case}: launch {number + 2} gives other bits of {key} than the first")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _give_scratch_memory(device: torch.device) -> None:
    """Sanitized kernels keep their books in global memory, which Triton asks its user for."""

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)
    triton.runtime._allocation.set_profile_allocator(allocate)


if __name__ == "__main__":
    sys.exit(main())
