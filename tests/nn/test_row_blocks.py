"""RowBlocks: a linear layer in several parameters that nobody outside can tell from one in one."""

from __future__ import annotations

import copy

import pytest
import torch

from pytransformer.nn import Linear, RowBlocks, packed_weight

ROWS = (6, 4, 5)
needs_packing = pytest.mark.skipif(
    packed_weight.why_not_packed(torch.zeros(256, 256)) is not None, reason="this build of torch packs no weights"
)


def make_pair(
    bias: bool, rows: tuple[int, ...] = ROWS, columns: int = 7, dtype: torch.dtype = torch.float32
) -> tuple[Linear, RowBlocks]:
    """The same layer in one parameter and in several."""
    torch.manual_seed(0)
    whole = Linear(columns, sum(rows), bias=bias, dtype=dtype)
    blocks = [block.detach().clone() for block in whole.weight.split(rows)]
    return whole, RowBlocks(blocks, None if whole.bias is None else whole.bias.detach().clone())


@pytest.mark.parametrize("bias", [True, False])
def test_results_and_gradients_are_the_whole_layers(bias):
    whole, blocks = make_pair(bias)
    inputs = [torch.randn(2, 3, 7).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0])
    expected, actual = whole(inputs[0]), blocks(inputs[1])
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(blocks.some_rows(inputs[1], 1, 3), expected[..., 6:])
    torch.testing.assert_close(blocks.some_rows(inputs[1], 0, 1), expected[..., :6])
    direction = torch.randn_like(expected)
    expected.backward(direction)
    actual.backward(direction)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(torch.cat([block.grad for block in blocks.blocks]), whole.weight.grad)
    if bias:
        torch.testing.assert_close(blocks.bias.grad, whole.bias.grad)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_is_the_whole_layers(bias, assign):
    whole, blocks = make_pair(bias)
    state = blocks.state_dict()
    assert list(state) == list(whole.state_dict())
    doubled = {name: 2 * tensor for name, tensor in state.items()}
    whole.load_state_dict(state)
    assert torch.equal(whole.weight, blocks.weight)
    parent = torch.nn.ModuleDict({"layer": blocks})
    parent.load_state_dict({f"layer.{name}": tensor for name, tensor in doubled.items()}, assign=assign)
    assert torch.equal(blocks.weight, 2 * whole.weight)
    assert [tuple(block.shape) for block in blocks.blocks] == [(rows, 7) for rows in ROWS]
    assert all(type(block) is torch.nn.Parameter for block in blocks.blocks)
    if bias:
        assert torch.equal(blocks.bias, 2 * whole.bias)


def test_what_does_not_fit_is_named_as_of_the_whole_layer():
    whole, blocks = make_pair(True)
    state = whole.state_dict()
    found = blocks.load_state_dict({"extra": torch.zeros(1)}, strict=False)
    assert found.missing_keys == ["weight", "bias"] and found.unexpected_keys == ["extra"]
    before = blocks.weight
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: \(3, 7\), expected \(15, 7\)"):
        blocks.load_state_dict({**state, "weight": torch.zeros(3, 7)})
    assert torch.equal(blocks.weight, before)


@needs_packing
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_packed_products_are_those_of_packed_blocks(dtype, bias):
    _, blocks = make_pair(bias, (256, 512), 256, dtype)
    biases = [None, None] if blocks.bias is None else blocks.bias.split((256, 512))
    x = torch.randn(1, 1, 256, dtype=dtype)
    torch.testing.assert_close(blocks.product()(x), blocks(x))
    if packed_weight.why_not_packed(blocks.blocks[0]) is not None:  # bfloat16 on a CPU without AVX-512
        assert not blocks.pack() and not blocks.is_packed
        return
    assert blocks.pack() and blocks.is_packed
    apart = [packed_weight.PackedWeight(block, 1).product(block, part)(x) for block, part in zip(blocks.blocks, biases)]
    assert torch.equal(blocks.product()(x), torch.cat(apart, dim=-1))
    before = blocks._packed
    assert blocks.pack() and blocks._packed is before
    blocks.weight_1.data[0, 0].add_(1)
    assert blocks.pack() and blocks._packed is not before
    twin = copy.deepcopy(blocks)
    assert not twin.is_packed and torch.equal(twin.weight, blocks.weight)
    blocks.unpack()
    assert not blocks.is_packed


def test_a_block_too_small_to_be_packed_leaves_all_as_they_are():
    _, blocks = make_pair(True)
    assert blocks.pack() is False and not blocks.is_packed


@pytest.mark.parametrize(
    ("blocks", "bias", "message"),
    [
        ([], None, "blocks must be matrices with as many columns each, got []"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], None, "got [(2, 3), (2, 4)]"),
        ([torch.zeros(2)], None, "got [(2,)]"),
        ([torch.zeros(2, 3), torch.zeros(1, 3)], torch.zeros(2), "bias must have shape (3,), got (2,)"),
    ],
)
def test_what_is_no_pile_is_refused(blocks, bias, message):
    with pytest.raises(ValueError) as error:
        RowBlocks(blocks, bias)
    assert message in str(error.value)
