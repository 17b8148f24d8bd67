"""The attention kernels against the accuracy contract: a covering grid of shapes, and every option."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pytransformer.kernels.attention.backward import BackwardConfig
from pytransformer.kernels.attention.forward import ForwardConfig

from .attention_contract import (
    SQUARE_BACKWARD_TILES,
    SQUARE_FORWARD_TILES,
    WITH_SLOPES,
    Case,
    contract_of,
    grid_cases,
)

pytestmark = pytest.mark.usefixtures("without_overflow_checks")

# Every pair of choices occurs in some case. Tiles are 32 by 32; the lengths are one row, a tile and one row less or more, more queries than
# keys, several tiles, and packed sequences, some of a whole tile, some without queries or keys.
GRID: dict[str, list[Any]] = {
    "lengths": [(1, 1), (31, 33), (33, 31), (40, 20), (20, 70), ((5, 0), (32, 32), (0, 3), (1, 40))],
    "dims": [(8, 64), (40, 24), (80, 96), (128, 128), (192, 16), (256, 256)],
    "window": ["none", "causal", "left", "both", "causal, left"],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "heads": [(1, 1), (3, 1), (4, 2), (2, 2)],
}


def square(case: Case) -> Case:
    tiles = {"forward_tiles": SQUARE_FORWARD_TILES, "backward_tiles": SQUARE_BACKWARD_TILES}
    return replace(case, **tiles, differentiable=WITH_SLOPES)


@pytest.mark.parametrize("case", grid_cases(GRID))
def test_contract_over_shapes(case: Case, device: torch.device, poison_empty: None) -> None:
    contract_of(square(case), device).check()


def normal(*shape: int) -> Callable[[Case, torch.Generator], Tensor]:
    return lambda case, generator: torch.randn(*shape, generator=generator).to(case.dtype)


def attend(*shape: int, dtype: torch.dtype = torch.bool) -> Callable[[Case, torch.Generator], Tensor]:
    """A mask that hides a third; the first row of a mask of all rows hides everything."""

    def make(case: Case, generator: torch.Generator) -> Tensor:
        mask = torch.rand(*shape, generator=generator) > 0.3
        if len(shape) == 4 and shape[2] > 1:
            mask[:, :, 0] = False
        return mask.to(dtype) * 3 if dtype != torch.bool else mask

    return make


def bias_with_infinities(*shape: int) -> Callable[[Case, torch.Generator], Tensor]:
    """Normal, a quarter -inf, the second row entirely, the third row the finite number that is often meant to hide.

    The lse of such a row is that number, whatever was added to it, so autograd's logsumexp knows no gradient to compare with.
    """

    def make(case: Case, generator: torch.Generator) -> Tensor:
        bias = torch.randn(*shape, generator=generator)
        bias[torch.rand(*shape, generator=generator) < 0.25] = -torch.inf
        bias[..., 1, :] = -torch.inf
        bias[..., 2, :] = torch.finfo(case.dtype).min
        return bias.to(case.dtype)

    return make


PACKED = ((5, 7), (0, 3), (17, 33))
SEED = torch.tensor([2**40 + 5, -(2**33) - 7])
OPTION_CASES = {
    "softcap-float32": Case(options={"softcap": 0.8, "causal": True}),
    "softcap-large-float32": Case(options={"softcap": 50.0}),
    "softcap-bfloat16": Case(options={"softcap": 2.0}, dtype=torch.bfloat16),
    "alibi": Case((20, 40), options={"alibi_slopes": torch.tensor([0.5, 0.1]), "causal": True}),
    "alibi-per-batch-packed": Case(
        PACKED, dtype=torch.float16, options={"alibi_slopes": torch.rand(3, 2, generator=torch.manual_seed(0))}
    ),
    "alibi-per-batch": Case(
        (20, 40),
        batch=2,
        dtype=torch.bfloat16,
        options={"alibi_slopes": torch.rand(2, 2, generator=torch.manual_seed(0)), "window": (30, 9)},
    ),
    "alibi-packed": Case(PACKED, heads=(4, 2), options={"alibi_slopes": torch.rand(4), "softcap": 2.0}),
    "key-padding": Case((20, 40), batch=2, options={"key_padding_mask": attend(2, 40), "causal": True}),
    "key-padding-packed": Case(PACKED, options={"key_padding_mask": attend(3, 33)}),
    "mask": Case((20, 33), batch=2, options={"mask": attend(2, 2, 20, 33)}),
    "mask-over-batch-and-head": Case(
        (20, 33), batch=2, dtype=torch.bfloat16, options={"mask": attend(1, 1, 20, 33), "causal": True}
    ),
    "mask-over-queries": Case((20, 33), batch=2, options={"mask": attend(2, 1, 1, 33, dtype=torch.int32)}),
    "mask-of-two-dimensions": Case((20, 33), options={"mask": attend(20, 33, dtype=torch.int64)}),
    "mask-packed": Case(PACKED, options={"mask": attend(3, 1, 17, 33), "window": (9, 2)}),
    "bias": Case((20, 33), batch=2, lse_gradient=False, options={"bias": bias_with_infinities(2, 2, 20, 33)}),
    "bias-over-batch": Case(
        (20, 33), batch=2, dtype=torch.bfloat16, options={"bias": normal(1, 2, 20, 33), "causal": True}
    ),
    "bias-over-heads": Case(
        (20, 33), batch=2, lse_gradient=False, options={"bias": bias_with_infinities(2, 1, 20, 33), "causal": True}
    ),
    "bias-over-queries": Case((20, 33), batch=2, options={"bias": normal(2, 2, 1, 33)}),
    "bias-over-keys": Case((20, 33), batch=2, options={"bias": normal(2, 2, 20, 1), "softcap": 1.0}),
    "bias-over-everything": Case((20, 33), options={"bias": normal(1), "window": (9, 9)}),
    "bias-packed": Case(PACKED, options={"bias": normal(3, 2, 17, 33), "causal": True}),
    "bias-over-batch-packed": Case(PACKED, options={"bias": normal(2, 17, 33), "causal": True}),
    "sinks": Case((20, 33), batch=2, options={"sinks": normal(2), "causal": True}),
    "sinks-rows-that-see-nothing": Case((40, 20), dtype=torch.bfloat16, options={"sinks": normal(2), "causal": True}),
    "sinks-packed": Case(PACKED, options={"sinks": torch.tensor([-torch.inf, 0.5])}),
    "dropout": Case((20, 70), options={"dropout_p": 0.3, "dropout_seed": SEED, "causal": True}),
    "dropout-packed": Case(PACKED, dtype=torch.bfloat16, options={"dropout_p": 0.7, "dropout_seed": SEED}),
    "scale-negative": Case((20, 33), options={"softmax_scale": -0.3, "causal": True}),
    "scale-zero": Case((20, 33), options={"softmax_scale": 0.0, "causal": True}),
    "everything": Case(
        (20, 40),
        batch=2,
        dtype=torch.bfloat16,
        options={
            "causal": True,
            "window": (25, 0),
            "softcap": 5.0,
            "alibi_slopes": torch.tensor([[0.1, 0.2], [0.5, 0.0]]),
            "key_padding_mask": attend(2, 40),
            "mask": attend(1, 2, 20, 40),
            "bias": normal(1, 2, 20, 40),
            "sinks": normal(2),
            "dropout_p": 0.2,
            "dropout_seed": SEED,
        },
    ),
}


# Quick tests meet each option, and each two of them, through the public op: tests/combinations.
@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in OPTION_CASES.items()])
def test_contract_over_options(case: Case, device: torch.device, poison_empty: None) -> None:
    contract_of(square(case), device).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("height", ["logits-1e4", "logits-120", "outlier"])
def test_contract_at_the_ends_of_the_scale(height: str, dtype: torch.dtype, device: torch.device) -> None:
    """Scores around ±1e4 (float16's products still fit), all scores near -120, and one feature a thousand times the others."""
    options: dict[str, Any] = {"causal": True}
    scale_of_q: float | Tensor = 1.0
    if height == "logits-1e4":
        scale_of_q = 2500.0
    elif height == "logits-120":
        options["bias"] = torch.full((1, 1, 20, 33), -120.0)
    else:
        scale_of_q = torch.tensor([1.0] * 15 + [1000.0 if dtype != torch.float16 else 100.0])
    case = Case((20, 33), dtype=dtype, options=options, scale_of_q=scale_of_q)
    contract_of(square(case), device).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contract_with_the_shipped_tiles(dtype: torch.dtype, device: torch.device) -> None:
    """The launch policy's own tile sizes, over more than one tile of either axis."""
    case = Case(
        (150, 140),
        heads=(1, 1),
        dims=(64, 64),
        dtype=dtype,
        options={"causal": True},
        forward_tiles=None,
        backward_tiles=None,
    )
    contract_of(case, device, seeds=2 if dtype == torch.float32 else 8).check()


def test_contract_with_more_tiles_than_stages(device: torch.device) -> None:
    """Many tiles in every run of the loop: cut by the left edge, whole, cut by the right edge."""
    case = Case((20, 150), heads=(1, 1), dtype=torch.bfloat16, options={"causal": True, "window": (100, 0)},
                forward_tiles=ForwardConfig(16, 16, 4, 2), backward_tiles=BackwardConfig(16, 16, 4, 2, 16, 16, 4, 2))  # fmt: skip
    contract_of(case, device).check()
