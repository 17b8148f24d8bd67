"""RoPE of q and k, out of place, half layout."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import pytransformer
from pytransformer.benchmarks.definitions import formulas
from pytransformer.benchmarks.definitions.cases import RopeCase
from pytransformer.benchmarks.harness.rows import Inputs, Row, Variant
from pytransformer.benchmarks.suites.common import Wanted, all_variants, checked_rows, no_grad, normal

QUICK = (RopeCase(8192, 32, 8, 128), RopeCase(32768, 32, 8, 128))
FULL = (RopeCase(8192, 32, 32, 128), RopeCase(16384, 64, 8, 64), RopeCase(8192, 8, 4, 256), RopeCase(64, 32, 8, 128))
TINY = (RopeCase(32, 4, 2, 32),)


def rows(wanted: Wanted) -> Iterator[Row]:
    """The targets' rows, then equal heads, small and large heads, a decode-size call."""
    for case in TINY if wanted.tiny else QUICK:
        yield _row(wanted, case, 0)
    for case in () if wanted.tiny else FULL:
        yield _row(wanted, case, 1)


def draw(case: RopeCase, device: torch.device, seed: int) -> Inputs:
    """q, k and the tables."""
    cos, sin = pytransformer.rope_tables(case.head_dim, case.tokens, device=device)
    return {
        "q": normal(device, 2 * seed, 1, case.tokens, case.num_heads, case.head_dim),
        "k": normal(device, 2 * seed + 1, 1, case.tokens, case.num_kv_heads, case.head_dim),
        "cos": cos,
        "sin": sin,
    }


def _golden(inputs: Inputs) -> Tensor:
    """Checked tokens of q and k."""
    tokens = checked_rows(inputs["q"].shape[1], inputs["q"].device)
    cos, sin = inputs["cos"][tokens].double(), inputs["sin"][tokens].double()
    return torch.cat([formulas.rotate(inputs[name][0, tokens].double(), cos, sin) for name in ("q", "k")], 1)


def _pick(result: tuple[Tensor, Tensor]) -> Tensor:
    tokens = checked_rows(result[0].shape[1], result[0].device)
    return torch.cat([tensor[0, tokens] for tensor in result], 1)


def _row(wanted: Wanted, case: RopeCase, priority: int) -> Row:
    def ours(backend: str | None) -> Variant:
        return lambda inputs: pytransformer.rope(
            inputs["q"], inputs["k"], inputs["cos"], inputs["sin"], backend=backend
        )

    calls, notes = all_variants(wanted, "rope", case, ours)
    return Row(
        "rope_forward",
        case.shape,
        0.0,
        case.moved_bytes,
        lambda device, seed: draw(case, device, seed),
        {name: no_grad(call) for name, call in calls.items()},
        _golden,
        _pick,
        notes=notes,
        priority=priority,
    )
