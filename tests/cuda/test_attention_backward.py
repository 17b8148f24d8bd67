"""The backward kernels of attention in CUDA against the contract, and what they may touch."""

from __future__ import annotations

import math
import mmap
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pytransformer import extension
from tests.cuda.attention_ops import backward, check_case, exact_forward, gradients_of, op_options
from tests.kernels.attention_contract import Case, Inputs, draw, grid_cases
from tests.support.memory import surrounded

# Tiles of the kernels: 128 queries against 32 keys for dq, 128 keys against 32 queries for dk and dv; above 128 features, 64 against 32 and
# 32 against 32. The lengths are one row, a tile of either kind and one row less or more, more queries than keys, and packed sequences, some
# of a whole tile, some without queries or keys.
GRID: dict[str, list[Any]] = {
    "lengths": [(1, 1), (32, 128), (33, 129), (127, 31), (40, 20), (65, 40), ((5, 0), (32, 128), (0, 3), (1, 40))],
    "dims": [(8, 64), (40, 24), (80, 96), (128, 128), (192, 16), (256, 256)],
    "window": ["none", "causal", "left", "both", "causal, left"],
    "dtype": [torch.bfloat16, torch.float16],
    "heads": [(1, 1), (3, 1), (2, 2)],
}
PACKED = ((5, 7), (0, 3), (17, 33), (4, 0))


def slopes(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.manual_seed(0))


OPTION_CASES = {
    "softcap": Case((40, 70), options={"softcap": 0.8, "causal": True}),
    "softcap-large": Case((40, 33), dtype=torch.float16, options={"softcap": 50.0}),
    "softcap-packed-d128": Case(PACKED, dims=(128, 96), options={"softcap": 2.0, "window": (9, 2)}),
    "alibi": Case((20, 140), options={"alibi_slopes": torch.tensor([0.5, 0.1]), "causal": True}),
    "alibi-both-ways": Case((40, 20), dtype=torch.float16, options={"alibi_slopes": torch.tensor([0.5, 0.1])}),
    "alibi-per-batch": Case((20, 40), heads=(4, 2), batch=2, options={"alibi_slopes": slopes(2, 4)}),
    "alibi-per-batch-packed": Case(PACKED, dtype=torch.float16, options={"alibi_slopes": slopes(4, 2)}),
    "softcap-alibi-window-d256": Case(
        (70, 40), dims=(136, 256), options={"softcap": 5.0, "alibi_slopes": slopes(2), "window": (25, 3)}
    ),
    "scale-negative": Case((20, 33), options={"softmax_scale": -0.3, "causal": True}),
    "scale-zero": Case((20, 33), options={"softmax_scale": 0.0, "causal": True}),
    "logits-1e4": Case((20, 33), scale_of_q=2500.0, options={"causal": True}),
    "outlier": Case((20, 33), scale_of_q=torch.tensor([1.0] * 15 + [1000.0]), options={"causal": True}),
    "lse-without-gradient": Case((40, 33), lse_gradient=False),
    "many-tiles": Case((200, 200), heads=(1, 1), dims=(8, 8), options={"causal": True, "window": (100, 0)}),
    "batch": Case((33, 20), heads=(4, 1), batch=3, options={"window": (7, -1)}),
}


@pytest.mark.parametrize("case", grid_cases(GRID))
def test_contract_over_shapes(case: Case, device: torch.device, poison_empty: None) -> None:
    check_case(case, device, every_schedule=False)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case if case.dtype == torch.float16 else replace(case, dtype=torch.bfloat16), id=name)
        for name, case in OPTION_CASES.items()
    ],
)
def test_contract_over_options(case: Case, device: torch.device, poison_empty: None) -> None:
    check_case(case, device, every_schedule=True)


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="hundreds of runs are for a GPU")
def test_hundreds_of_runs_give_the_same_bits(device: torch.device) -> None:
    for dims in ((64, 64), (128, 128), (256, 256)):
        case = Case((1000, 1100), heads=(8, 2), dims=dims, batch=2, dtype=torch.bfloat16, options={"causal": True})
        inputs = draw(case, 0, device)
        out, lse = exact_forward(*inputs.tensors.values(), **inputs.options)
        first = backward(inputs.dout, *inputs.tensors.values(), out, lse, inputs.dlse, **inputs.options)
        for _ in range(100):
            again = backward(inputs.dout, *inputs.tensors.values(), out, lse, inputs.dlse, **inputs.options)
            assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))


@pytest.mark.parametrize("dims", [(16, 16), (40, 24), (136, 96)], ids=str)
@pytest.mark.parametrize("lengths", [(17, 33), PACKED], ids=["dense", "packed"])
def test_nothing_beside_the_inputs_is_read(
    lengths: Any, dims: tuple[int, int], device: torch.device, poison_empty: None
) -> None:
    """Rows behind a short tile, features behind head_dim, the space between strided rows: all NaN, and none of it arrives."""
    case = Case(lengths, dims=dims, heads=(4, 2), dtype=torch.float16, options={"causal": True})
    inputs = draw(case, 0, device)
    strided = Inputs(
        {name: surrounded(tensor) for name, tensor in inputs.tensors.items()}, inputs.options, surrounded(inputs.dout), inputs.dlse
    )  # fmt: skip
    assert_same_bits(gradients_of(case, inputs), gradients_of(case, strided))


def test_any_order_of_dimensions_and_expanded_heads(device: torch.device, poison_empty: None) -> None:
    """The (batch, heads, length, dim) layout of SDPA, transposed; and strides of 0 over heads and batch."""
    case = Case((17, 33), heads=(4, 4), batch=2, dtype=torch.bfloat16)
    one = draw(Case((17, 33), heads=(4, 1), batch=1, dtype=torch.bfloat16), 0, device)
    expanded = {name: tensor.expand(2, -1, 4, -1) for name, tensor in one.tensors.items()}
    dout, dlse = one.dout.expand(2, -1, -1, -1), one.dlse.expand(2, -1, -1).contiguous()
    copies = {name: tensor.contiguous() for name, tensor in expanded.items()}
    moved = {name: tensor.transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in copies.items()}
    expected = gradients_of(case, Inputs(copies, one.options, dout.contiguous(), dlse))
    assert_same_bits(expected, gradients_of(case, Inputs(expanded, one.options, dout, dlse)))
    assert_same_bits(expected, gradients_of(case, Inputs(moved, one.options, dout, dlse)))


@pytest.mark.parametrize("dims", [(64, 64), (256, 256)], ids=str)
def test_rows_and_keys_that_meet_nothing_get_zero(
    dims: tuple[int, int], device: torch.device, poison_empty: None
) -> None:
    """More queries than keys, causal: the first ones see no key, in whole tiles and in part of one, and NaN flows into their lse. With a
    window the first keys are seen by nobody."""
    rows = Case((150, 10), dims=dims, dtype=torch.bfloat16, options={"causal": True})
    dq = gradients_of(rows, draw(rows, 0, device))["dq"]
    assert torch.equal(dq[:, :140], torch.zeros_like(dq[:, :140])) and bool(dq[:, 140:].abs().amax(-1).gt(0).all())
    keys = Case((10, 150), dims=dims, dtype=torch.bfloat16, options={"window": (3, 3)})
    gradients = gradients_of(keys, draw(keys, 0, device))
    for name in ("dk", "dv"):
        unseen = gradients[name][:, :137]
        assert torch.equal(unseen, torch.zeros_like(unseen)) and bool(
            gradients[name][:, 137:].abs().amax(-1).gt(0).all()
        )


def test_tokens_behind_the_last_sequence(device: torch.device, poison_empty: None) -> None:
    """Padding of a packed batch up to a fixed size: gradients 0 there, and no influence on the sequences, though its numbers are NaN."""
    case = Case(PACKED, heads=(4, 2), dtype=torch.bfloat16, options={"causal": True, "alibi_slopes": slopes(4, 4)})
    inputs = draw(case, 0, device)
    padding = 150
    padded = Inputs(
        {name: torch.cat([t, torch.full_like(t[:1], math.nan).expand(padding, -1, -1)]) for name, t in inputs.tensors.items()},
        inputs.options,
        torch.cat([inputs.dout, torch.full_like(inputs.dout[:1], math.nan).expand(padding, -1, -1)]),
        torch.cat([inputs.dlse, torch.zeros_like(inputs.dlse[:, :1]).expand(-1, padding)], dim=1),
    )  # fmt: skip
    expected, got = gradients_of(case, inputs), gradients_of(case, padded)
    for name, tensor in expected.items():
        assert torch.equal(got[name][: tensor.shape[0]], tensor), name
        assert torch.equal(got[name][tensor.shape[0] :], torch.zeros_like(got[name][tensor.shape[0] :])), name


def far_memory(elements: int, device: torch.device) -> Tensor:
    """Uninitialised float16 memory; untouched, it costs nothing on a CPU."""
    if device.type == "cuda":
        if torch.cuda.mem_get_info()[0] < 8e9:
            pytest.skip("needs a tensor of 2^31 elements")
        return torch.empty(elements, dtype=torch.float16, device=device)
    return torch.frombuffer(mmap.mmap(-1, 2 * elements), dtype=torch.float16)


@pytest.mark.parametrize("axis", ["batch", "head", "sequence"])
def test_offsets_beyond_2_to_the_31(axis: str, device: torch.device) -> None:
    """Elements of one tensor, for "sequence" also of one tile, that lie 2^31 elements apart."""
    sizes, far = (2, 18, 2, 16), 2**31 + 64
    strides = {"batch": (far, 64, 16, 1), "head": (18 * 16, 16, far, 1), "sequence": (16, far // 15 // 8 * 8, 32, 1)}[
        axis
    ]
    case = Case((18, 18), heads=(2, 2), batch=2, dtype=torch.float16, options={"causal": True})
    inputs = draw(case, 0, device)
    inputs.tensors = dict.fromkeys(("q", "k", "v"), inputs.tensors["v"])  # one piece of memory serves as all of them
    inputs.dout = inputs.tensors["v"]
    memory = far_memory(sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1, device)
    view = memory.as_strided(sizes, strides)
    view.copy_(inputs.tensors["v"])
    far_apart = Inputs(dict.fromkeys(("q", "k", "v"), view), inputs.options, view, inputs.dlse)
    assert_same_bits(gradients_of(case, inputs), gradients_of(case, far_apart))


@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 0, 5), (2, 5, 0)], ids=["no-batch", "no-queries", "no-keys"])
def test_empty_inputs(sizes: tuple[int, int, int], device: torch.device, poison_empty: None) -> None:
    batch, seqlen_q, seqlen_k = sizes
    q, k, v = (torch.randn(batch, n, 2, 8, device=device, dtype=torch.bfloat16) for n in (seqlen_q, seqlen_k, seqlen_k))
    lse = torch.full((batch, 2, seqlen_q), -math.inf, device=device)
    gradients = backward(torch.ones_like(q), q, k, v, torch.zeros_like(q), lse, None, softmax_scale=1.0, causal=True)
    for gradient, tensor in zip(gradients, (q, k, v), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def arguments(device: torch.device) -> dict[str, Any]:
    q, k, v = (torch.randn(1, 4, heads, 16, device=device, dtype=torch.float16) for heads in (2, 1, 1))
    lse = torch.zeros(1, 2, 4, device=device)
    return {"dout": q, "dlse": None, "out": q.clone(), "lse": lse, "q": q, "k": k, "v": v}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "shape of dout": ({"dout": lambda t: t[:, :3]}, r"dout must have shape \(1, 4, 2, 16\), got \(1, 3, 2, 16\)"),
    "dtype of dout": ({"dout": lambda t: t.bfloat16()}, "dout must be float16, got bfloat16"),
    "dout of one number": (
        {"dout": lambda t: t[..., :1].expand_as(t)},
        "dout must be contiguous in its last dimension",
    ),
    "odd strides": ({"dout": lambda t: torch.cat([t, t], -1)[..., 1:17]}, "dout must be 16-byte aligned"),
    "shape of out": ({"out": lambda t: t[:, :, :1]}, "out must have shape"),
    "out with gaps": ({"out": lambda t: torch.cat([t, t], -1)[..., :16]}, "out must be contiguous"),
    "shape of lse": ({"lse": lambda t: t[:, :1]}, r"lse must have shape \(1, 2, 4\), got \(1, 1, 4\)"),
    "dtype of lse": ({"lse": lambda t: t.half()}, "lse must be float32, got float16"),
    "lse with gaps": ({"lse": lambda t: torch.stack([t, t], -1)[..., 0]}, "lse must be contiguous"),
    "shape of dlse": ({"dlse": lambda t: torch.zeros(2, 4)}, "dlse must have shape"),
    "dtype of q": ({"q": lambda t: t.float()}, "q must be float16 or bfloat16, got float32"),
    "head_dim of k": ({"k": lambda t: t[..., :8]}, "k must have the head_dim of q"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name: str, device: torch.device) -> None:
    changes, message = WRONG[name]
    values = arguments(device)
    for argument, change in changes.items():
        values[argument] = change(values[argument])
        if isinstance(values[argument], Tensor):
            values[argument] = values[argument].to(device)
    with pytest.raises(ValueError, match=message):
        extension.op("attention_backward")(*values.values(), *op_options(softmax_scale=1.0, causal=True))
