"""What the attention kernels may touch, and what must not change their bits."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.kernels.attention.backward import BackwardConfig, BackwardLaunch, attention_backward
from pytransformer.kernels.attention.forward import ForwardConfig, ForwardLaunch, attention_forward
from pytransformer.ops.attention.call import AttentionCall
from tests.conftest import INTERPRETING
from tests.support.memory import surrounded

from .attention_contract import (
    BACKWARD_TILES,
    FORWARD_TILES,
    Case,
    Inputs,
    backward,
    contract_of,
    draw,
    forward,
    run_kernels,
    run_reference,
)


def results(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    outputs, gradients = run_kernels(case, inputs)
    return {**outputs, **gradients}


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


PACKED = Case(((5, 7), (0, 3), (17, 33), (4, 0)), heads=(4, 2), options={"causal": True})


@pytest.mark.parametrize("case", [Case((40, 33), heads=(4, 2), batch=2), PACKED], ids=["dense", "packed"])
@pytest.mark.usefixtures("without_overflow_checks")
def test_program_order_does_not_change_a_bit(case: Case, device: torch.device) -> None:
    """Each run gives the same bits: on a GPU programs run in whatever order they get, here in their own and in one that is drawn."""
    inputs = draw(case, 0, device)
    first = results(case, inputs)
    shuffled: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if INTERPRETING:
        from pytransformer import triton_interpreter

        shuffled = triton_interpreter.program_order(1)
    with shuffled:
        assert_same_bits(first, results(case, inputs))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETING, reason="hundreds of runs are for a GPU")
def test_hundreds_of_runs_give_the_same_bits(device: torch.device) -> None:
    case = Case((1000, 1100), heads=(8, 2), dims=(128, 128), batch=2, dtype=torch.bfloat16, options={"causal": True},
                forward_tiles=None, backward_tiles=None)  # fmt: skip
    inputs = draw(case, 0, device)
    first = results(case, inputs)
    for _ in range(300):
        assert_same_bits(first, results(case, inputs))


@pytest.mark.usefixtures("without_overflow_checks")
def test_a_broadcast_bias_and_sinks_have_deterministic_gradients(device: torch.device) -> None:
    bias, sinks = torch.randn(1, 1, 20, 33), torch.randn(2)
    case = Case((20, 33), heads=(2, 1), batch=2, options={"bias": bias, "sinks": sinks})
    inputs = draw(case, 0, device)
    assert_same_bits(results(case, inputs), results(case, inputs))


@pytest.mark.parametrize(
    ("lengths", "dims"), [((17, 33), (40, 24)), (PACKED.lengths, (16, 16))], ids=["dense", "packed"]
)
def test_nothing_beside_the_inputs_is_read(
    lengths: Any, dims: tuple[int, int], device: torch.device, poison_empty: None
) -> None:
    """Rows behind a short tile, features behind head_dim, the space between strided rows: all NaN, and none of it arrives."""
    case = Case(lengths, dims=dims, heads=(4, 2), options={"causal": True})
    inputs = draw(case, 0, device)
    expected = results(case, inputs)
    strided = Inputs(
        {name: surrounded(tensor) for name, tensor in inputs.tensors.items()},
        inputs.options,
        surrounded(inputs.dout),
        inputs.dlse,
    )
    assert_same_bits(expected, results(case, strided))


@pytest.mark.usefixtures("without_overflow_checks")
def test_key_and_value_of_one_head_may_be_expanded(device: torch.device) -> None:
    """A stride of 0 over heads or batch is a stride like any other."""
    inputs = draw(Case((20, 33), heads=(4, 1), batch=1), 0, device)
    case = Case((20, 33), heads=(4, 4), batch=2)
    expanded = {name: tensor.expand(2, -1, 4, -1) for name, tensor in inputs.tensors.items()}
    dout, dlse = inputs.dout.expand(2, -1, -1, -1), inputs.dlse.expand(2, -1, -1)
    copies = Inputs(
        {name: t.contiguous() for name, t in expanded.items()}, inputs.options, dout.contiguous(), dlse.contiguous()
    )
    assert_same_bits(results(case, copies), results(case, Inputs(expanded, inputs.options, dout, dlse)))


@pytest.mark.usefixtures("without_overflow_checks")
def test_layout_heads_before_length(device: torch.device) -> None:
    """The (batch, heads, length, dim) layout of SDPA, transposed, and odd base addresses."""
    case = Case((17, 33), heads=(4, 2), batch=2, dtype=torch.bfloat16)
    inputs = draw(case, 0, device)
    moved = {}
    for name, tensor in inputs.tensors.items():
        memory = torch.full((tensor.numel() + 1,), math.nan, dtype=tensor.dtype, device=device)
        batch, length, heads, dim = tensor.shape
        moved[name] = memory[1:].view(batch, heads, length, dim).transpose(1, 2)
        moved[name].copy_(tensor)
    assert_same_bits(results(case, inputs), results(case, Inputs(moved, inputs.options, inputs.dout, inputs.dlse)))


def test_gradient_of_a_sum_is_an_expanded_scalar(device: torch.device) -> None:
    """``out.sum().backward()`` sends a dout whose strides are all 0."""
    case = Case((17, 20))
    inputs = draw(case, 0, device)
    inputs.dout = torch.ones((), device=device).expand_as(inputs.dout)
    whole = Inputs(inputs.tensors, inputs.options, inputs.dout.contiguous(), inputs.dlse)
    assert_same_bits(results(case, whole), results(case, inputs))


@pytest.mark.parametrize(
    "shape",
    [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)],
    ids=["no-batch", "no-queries", "no-keys", "nothing"],
)
def test_empty_inputs(shape: tuple[int, int, int], device: torch.device, poison_empty: None) -> None:
    batch, seqlen_q, seqlen_k = shape
    q, k, v = (torch.randn(batch, length, 2, 8, device=device) for length in (seqlen_q, seqlen_k, seqlen_k))
    out, lse = forward(q, k, v, softmax_scale=1.0, causal=True)
    assert torch.equal(out, torch.zeros_like(q)) and torch.equal(
        lse, torch.full((batch, 2, seqlen_q), -math.inf, device=device)
    )
    gradients = backward(torch.ones_like(out), q, k, v, out, lse, None, softmax_scale=1.0, causal=True)
    for gradient, tensor in zip(gradients, (q, k, v)):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_queries_that_see_nothing(device: torch.device, poison_empty: None) -> None:
    """More queries than keys, causal: the first ones see no key; whole tiles of them, and part of a tile."""
    case = Case((50, 10), options={"causal": True})
    inputs = draw(case, 0, device)
    got = results(case, inputs)
    assert torch.equal(got["out"][:, :40], torch.zeros_like(got["out"][:, :40]))
    assert torch.equal(got["dq"][:, :40], torch.zeros_like(got["dq"][:, :40]))
    assert bool((got["lse"][..., :40] == -math.inf).all()) and bool(got["lse"][..., 40:].isfinite().all())


@pytest.mark.usefixtures("without_overflow_checks")
def test_tokens_behind_the_last_sequence(device: torch.device, poison_empty: None) -> None:
    """Padding of a packed batch up to a fixed size: outputs and gradients 0, lse -inf, and no influence on the sequences."""
    inputs = draw(PACKED, 0, device)
    padded = Inputs(
        {
            name: torch.cat([t, torch.full_like(t[:1], math.nan).expand(37, -1, -1)])
            for name, t in inputs.tensors.items()
        },
        inputs.options,
        torch.cat([inputs.dout, torch.zeros_like(inputs.dout[:1]).expand(37, -1, -1)]),
        torch.cat([inputs.dlse, torch.zeros_like(inputs.dlse[:, :1]).expand(-1, 37)], dim=1),
    )
    expected, got = results(PACKED, inputs), results(PACKED, padded)
    for name, tensor in expected.items():
        axis = 1 if name == "lse" else 0
        length = tensor.shape[axis]
        assert torch.equal(got[name].narrow(axis, 0, length), tensor), name
        rest = got[name].narrow(axis, length, 37)
        assert torch.equal(rest, torch.full_like(rest, -math.inf if name == "lse" else 0.0)), name


@pytest.mark.usefixtures("without_overflow_checks")
def test_packed_sequences_equal_their_own_calls(device: torch.device) -> None:
    """A sequence's result doesn't depend on what it is packed with."""
    inputs = draw(PACKED, 3, device)
    packed = results(PACKED, inputs)
    start_q = start_k = 0
    for rows_q, rows_k in PACKED.pairs:
        at_q, at_k = slice(start_q, start_q + rows_q), slice(start_k, start_k + rows_k)
        start_q, start_k = at_q.stop, at_k.stop
        alone = Inputs(
            {name: tensor[at_q if name == "q" else at_k][None] for name, tensor in inputs.tensors.items()},
            {"causal": True, "softmax_scale": PACKED.softmax_scale},
            inputs.dout[None, at_q],
            inputs.dlse[None, :, at_q],
        )
        for name, tensor in results(Case((rows_q, rows_k), heads=(4, 2)), alone).items():
            part = packed[name][:, at_q] if name == "lse" else packed[name][at_k if name in ("dk", "dv") else at_q]
            assert torch.equal(tensor[0], part), name


@pytest.mark.parametrize("hint", [None, 1, 33, 10**6])
@pytest.mark.usefixtures("without_overflow_checks")
def test_length_hints_are_only_hints(hint: int | None, device: torch.device) -> None:
    inputs = draw(PACKED, 0, device)
    expected = forward(*inputs.tensors.values(), **inputs.options, config=FORWARD_TILES)
    hinted = forward(
        *inputs.tensors.values(), **inputs.options, max_seqlen_q=hint, max_seqlen_k=hint, config=FORWARD_TILES
    )
    assert torch.equal(hinted[0], expected[0]) and torch.equal(hinted[1], expected[1])


@pytest.mark.parametrize(
    "options", [{}, {"bias": torch.ones(2, 17, 20), "sinks": torch.ones(2)}], ids=["plain", "options"]
)
@pytest.mark.usefixtures("without_overflow_checks")
def test_a_prepared_launch_serves_calls_that_are_alike(options: dict[str, Tensor], device: torch.device) -> None:
    """It keeps nothing of the tensors it was prepared for; gradients that no kernel can walk are copied in each call."""
    calls, given = [], []
    for seed in range(3):
        inputs = draw(Case((17, 20), batch=2, options=options), seed, device)
        inputs.tensors = {name: tensor + seed for name, tensor in inputs.tensors.items()}
        calls.append(AttentionCall(**inputs.tensors, **inputs.options))
        strided = inputs.dout.transpose(-1, -2).contiguous().transpose(-1, -2)
        given.append((strided, inputs.dlse.transpose(-1, -2).contiguous().transpose(-1, -2)))
    forward_launch = ForwardLaunch(calls[0], config=FORWARD_TILES)
    backward_launch = None
    for call, (dout, dlse) in zip(calls, given):
        out, lse = forward_launch(call)
        backward_launch = backward_launch or BackwardLaunch(call, dout, out, lse, dlse, config=BACKWARD_TILES)
        gradients = backward_launch(call, dout, out, lse, dlse)
        expected = attention_forward(call, config=FORWARD_TILES)
        expected += attention_backward(
            call, dout.contiguous(), *expected, dlse.contiguous(), config=BACKWARD_TILES
        )  # fmt: skip
        for found, wanted in zip((out, lse, *gradients), expected, strict=True):
            assert (found is None and wanted is None) or torch.equal(found, wanted)  # type: ignore[arg-type]


@pytest.mark.usefixtures("without_overflow_checks")
def test_many_sequences_are_found(device: torch.device) -> None:
    """The search for a tile's sequence among more of them than a few, many of which are empty."""
    lengths = [0, 0, 1, 16, 17, 0, 15, 3, 0, 32, 1, 0, 0, 2, 9, 0]
    case = Case(tuple((length, length) for length in lengths), heads=(1, 1), dims=(8, 8), options={"causal": True})
    inputs = draw(case, 0, device)
    golden, _ = run_reference(inputs, torch.float64)
    out, lse = forward(*inputs.tensors.values(), **inputs.options, config=FORWARD_TILES)
    torch.testing.assert_close(lse, golden["lse"].float())
    torch.testing.assert_close(out, golden["out"].float())


@pytest.mark.usefixtures("without_overflow_checks")
def test_groups_of_heads_cover_every_tile_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are grouped to fit the L2 cache; groups that don't divide the number of heads leave none out."""
    from pytransformer.kernels.attention import backward as backward_module
    from pytransformer.kernels.attention import forward as forward_module

    case = Case((33, 33), heads=(3, 3), batch=3, options={"causal": True})
    inputs = draw(case, 0, device)
    expected = results(case, inputs)
    for module in (forward_module, backward_module):
        monkeypatch.setattr(module, "slots_per_group", lambda *_: 4)
    assert_same_bits(expected, results(case, inputs))


@pytest.mark.parametrize("axis", ["batch", "head", "sequence"])
def test_offsets_beyond_2_to_the_31(axis: str, device: torch.device) -> None:
    """Elements of one tensor, for "sequence" also of one tile, that lie 2^31 elements apart. Untouched memory costs nothing on a CPU."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 8e9:
        pytest.skip("needs a tensor of 2^31 elements")
    sizes, far = (2, 18, 2, 16), 2**31 + 64
    strides = {"batch": (far, 64, 16, 1), "head": (18 * 16, 16, far, 1), "sequence": (16, far // 15, 32, 1)}[axis]
    case = Case((18, 18), heads=(2, 2), batch=2, dtype=torch.float16, options={"causal": True})
    inputs = draw(case, 0, device)
    inputs.tensors = dict.fromkeys(("q", "k", "v"), inputs.tensors["v"])  # one piece of memory serves as all three
    memory = torch.empty(
        sum((size - 1) * stride for size, stride in zip(sizes, strides)) + 1, dtype=torch.float16, device=device
    )
    view = memory.as_strided(sizes, strides)
    view.copy_(inputs.tensors["v"])
    far_apart = Inputs(dict.fromkeys(("q", "k", "v"), view), inputs.options, inputs.dout, inputs.dlse)
    assert_same_bits(results(case, inputs), results(case, far_apart))


def test_a_window_wider_than_the_sequences_is_none(device: torch.device) -> None:
    """Also one whose limits, added to a position, would not fit 32 bits."""
    inputs = draw(Case((20, 33)), 0, device)
    expected = forward(*inputs.tensors.values(), **inputs.options, config=FORWARD_TILES)
    for window in ((32, 19), (2**31 - 1, 2**31 - 1)):
        wide = forward(*inputs.tensors.values(), **inputs.options, window=window, config=FORWARD_TILES)
        assert torch.equal(wide[0], expected[0]) and torch.equal(wide[1], expected[1])
    narrower = forward(*inputs.tensors.values(), **inputs.options, window=(31, 19), config=FORWARD_TILES)
    assert not torch.equal(narrower[0], expected[0])


def test_dropout_drops_what_the_reference_says(device: torch.device) -> None:
    """With v the identity, the output is the matrix of weights: zero exactly where the counter-based mask says so."""
    q, k = torch.randn(2, 17, 3, 16, device=device), torch.randn(2, 32, 3, 16, device=device)
    v = torch.eye(32, device=device)[None, :, None].expand(2, -1, 3, -1)
    options = {
        "softmax_scale": 0.25,
        "causal": False,
        "dropout_p": 0.4,
        "dropout_seed": torch.tensor([7, 2**33 + 1], device=device),
    }
    weights, _ = forward(q, k, v, **options, config=FORWARD_TILES)
    expected = reference.attention(q, k, v, **options)
    assert torch.equal(weights == 0, expected == 0)
    other_tiles, _ = forward(q, k, v, **options, config=ForwardConfig(32, 16, 4, 1))
    assert torch.equal(other_tiles == 0, weights == 0)


def test_everything_dropped(device: torch.device, poison_empty: None) -> None:
    inputs = draw(Case((17, 20), options={"dropout_p": 1.0, "dropout_seed": torch.tensor([1, 2])}), 0, device)
    got = results(Case((17, 20)), inputs)
    assert torch.equal(got["out"], torch.zeros_like(got["out"])) and torch.equal(got["dv"], torch.zeros_like(got["dv"]))
    assert bool(got["lse"].isfinite().all())


def test_dropout_needs_a_seed(device: torch.device) -> None:
    q = torch.randn(1, 4, 1, 8, device=device)
    with pytest.raises(ValueError, match="dropout_seed"):
        forward(q, q, q, softmax_scale=1.0, causal=False, dropout_p=0.5)


@pytest.mark.usefixtures("without_overflow_checks")
def test_tiles_of_another_shape(device: torch.device) -> None:
    """More keys than queries in a tile, and fewer, in all three kernels."""
    for forward_tiles, backward_tiles in (
        (ForwardConfig(32, 16, 4, 1), BackwardConfig(32, 16, 4, 1, 64, 16, 4, 1)),
        (ForwardConfig(16, 64, 4, 1), BackwardConfig(16, 64, 4, 1, 16, 64, 4, 1)),
    ):
        case = Case(
            (40, 70),
            options={"causal": True, "window": (30, 0)},
            forward_tiles=forward_tiles,
            backward_tiles=backward_tiles,
        )
        contract_of(case, device, seeds=2).check()


def test_tf32_only_where_allowed(device: torch.device) -> None:
    """float32 products keep their bits unless the caller allows tf32."""
    inputs = draw(Case((17, 20)), 0, device)
    golden, _ = run_reference(inputs, torch.float64)

    def error(allow_tf32: bool) -> float:
        out, _ = forward(*inputs.tensors.values(), **inputs.options, allow_tf32=allow_tf32, config=FORWARD_TILES)
        return float((out - golden["out"]).abs().max())

    assert error(allow_tf32=False) < 2e-6 < 2e-5 < error(allow_tf32=True) < 2e-2
