"""Random RoPE calls, the reference's results for the same call, and the contract; for Triton's launcher and that of the extension."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.kernels.rope import RopeConfig
from pytransformer.verification import SEEDS, Contract
from tests.support.draws import pool
from tests.support.launchers import rope_rotate

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
# Few tokens and heads per tile make several tiles of each; no two numbers are equal, so that a swap shows.
SMALL = RopeConfig(block_tokens=4, block_heads=2, block_kv_heads=1, num_warps=4)
LENGTH = 24


@dataclass(frozen=True)
class Case:
    """One call. ``lengths``: seqlen of each sequence of a batch if equal, else packed; num_kv_heads 0 means no k."""

    dtype: torch.dtype = FLOAT32
    lengths: tuple[int, ...] = (7, 7)
    packed: bool = False
    heads: tuple[int, int] = (3, 2)
    head_dim: int = 16
    rotary_dim: int = 16
    interleaved: bool = False
    reverse: bool = False
    positions: str = "index"  # or offset, offsets, given, given per sequence
    config: RopeConfig | None = SMALL

    def inputs(self, device: torch.device, seed: int) -> tuple[tuple[Tensor, Tensor | None], dict[str, object]]:
        """(q, k) and where they stand."""
        torch.manual_seed(seed)
        batch, seqlen, total = len(self.lengths), self.lengths[0], sum(self.lengths)
        tokens = (total,) if self.packed else (batch, seqlen)
        q, k = (
            torch.randn(*tokens, heads, self.head_dim).to(device, self.dtype) if heads else None for heads in self.heads
        )
        where: dict[str, object] = {}
        if self.positions == "offset":
            where["offsets"] = 5
        elif self.positions == "offsets":
            where["offsets"] = torch.randint(0, LENGTH - max(self.lengths), (batch,), device=device)
        elif self.positions == "given":
            where["positions"] = torch.randint(0, LENGTH, tokens[-1:], dtype=torch.int32, device=device)
        elif self.positions == "given per sequence":
            where["positions"] = torch.randint(0, LENGTH, tokens, device=device)
        if self.packed:
            bounds = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)
            where["cu_seqlens"] = bounds.to(device)
        return (q, k), where

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # Not on the unit circle, so that a lost factor shows.
        cos, sin = reference.rope_tables(self.rotary_dim, LENGTH, base=100.0)
        return (1.25 * cos).to(device), (1.25 * sin).to(device)


def by_reference(
    case: Case, tensors: tuple[Tensor, Tensor | None], where: dict[str, object], dtype: torch.dtype
) -> list[Tensor]:
    """The reference in ``dtype``; the opposite angle is the same cosine and the opposite sine."""
    wide = torch.promote_types(dtype, FLOAT32)
    cos, sin = (table.to(wide) for table in case.tables(torch.device("cpu")))
    q, k = (None if tensor is None else tensor.cpu().to(dtype) for tensor in tensors)
    options = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in where.items()}
    rotated = reference.rope(q, k, cos, -sin if case.reverse else sin, interleaved=case.interleaved, **options)
    return [tensor for tensor in rotated if tensor is not None]


def measure(
    case: Case,
    device: torch.device,
    seeds: int = SEEDS,
    rotate: Callable[..., object] = rope_rotate,
    least: int | None = None,
) -> Contract:
    """The contract of a case over some seeds; over ``least`` and all only in doubt where what is asked is which cells are read."""
    contract = Contract(case.dtype)

    def add(seed: int) -> None:
        tensors, where = case.inputs(device, seed)
        options = {"interleaved": case.interleaved, "reverse": case.reverse, "config": case.config}
        rotated = rotate(*tensors, *case.tables(device), **where, **options)
        assert all((a is None) == (b is None) for a, b in zip(rotated, tensors))
        actual = [tensor for tensor in rotated if tensor is not None]
        plain, golden = (
            by_reference(case, tensors, where, case.dtype),
            by_reference(case, tensors, where, torch.float64),
        )
        for name, *values in zip(("q", "k"), actual, plain, golden):
            assert values[0].is_contiguous() and values[0].dtype == case.dtype
            contract.add(name, actual=values[0], plain=values[1], golden=values[2])

    return pool(contract, add, least, seeds)
