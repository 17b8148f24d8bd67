"""attention with a block mask: the contract on each backend, what is not listed is not touched, and what bad masks get."""

from __future__ import annotations

import math

import pytest
import torch

from pytransformer import reference
from pytransformer.ops.attention import attention, by_torch
from pytransformer.ops.attention.blocks import Blocks, portions
from pytransformer.verification import SEEDS, Contract, measure
from pytransformer.verification.cases import FLOATS
from tests.ops.attention_cases import bias_with_holes, case, packed_qkv, qkv


def blocks(*shape):
    """Boolean, about half of them listed; the first block of queries of the last sequence and head lists none."""
    listed = torch.rand(*shape) < 0.6
    listed[-1, -1, 0] = False
    return listed


# Blocks of 16 and less at the ends, so that there are several of them in few programs for the interpreter.
CASES = {
    found.name: found
    for found in (
        case(
            "causal, GQA",
            lambda: {**qkv(1, 37, 37, 2, 1), "block_mask": blocks(1, 1, 3, 3)},
            causal=True,
            block_size=16,
        ),
        case(
            "by head, Lq < Lk, lse",
            lambda: {**qkv(1, 20, 40, 4, 2), "block_mask": blocks(1, 4, 2, 2)},
            block_size=(16, 32),
            return_lse=True,
        ),
        case(
            "by sequence and head, every option",
            lambda: {
                **qkv(2, 20, 17, 2, 1),
                "block_mask": blocks(2, 2, 2, 2),
                "bias": bias_with_holes(1, 2, 20, 17),
                "mask": torch.rand(2, 1, 20, 17) < 0.8,
                "key_padding_mask": torch.arange(17) < torch.tensor([[17], [14]]),
                "alibi_slopes": torch.rand(2, 2),
                "sinks": torch.randn(2),
                "dropout_seed": torch.tensor([7, 3]),
            },
            "qkvbas",
            block_size=16,
            window=(15, 5),
            softcap=3.0,
            dropout_p=0.2,
        ),
        case(
            "packed, by sequence, causal",
            lambda: {**packed_qkv([5, 0, 17], [20, 5, 17]), "block_mask": blocks(3, 1, 2, 2)},
            causal=True,
            block_size=16,
        ),
    )
}
BACKENDS = ("torch", "triton", "reference")
# Each case with one dtype, taking turns, and each backend with another.
TAKING_TURNS = [
    pytest.param(name, backend, FLOATS[(index + place) % 3], id=f"{name}-{backend}")
    for index, name in enumerate(CASES)
    for place, backend in enumerate(BACKENDS)
]


@pytest.mark.parametrize(("name", "backend", "dtype"), TAKING_TURNS)
def test_backends_are_within_the_contract(name, backend, dtype, device):
    measure(CASES[name], dtype, backend, device).check()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_not_listed_is_not_touched(backend, device):
    """Keys and values of blocks that nobody lists, and queries of blocks that list nothing, are NaN, and none of it arrives."""
    tensors = {name: tensor.to(device) for name, tensor in qkv(1, 48, 64, 4, 2).items()}
    bias = torch.randn(1, 4, 48, 64, device=device)
    listed = torch.rand(1, 4, 3, 4, device=device) < 0.7
    listed[:, :, 1] = listed[:, :, :, 2] = False
    listed[:, :, 0, 0] = listed[:, :, 2, 3] = True
    dout = torch.randn(1, 48, 4, 16, device=device)
    rows, cols = slice(16, 32), slice(32, 48)

    def run(poison):
        given = {name: tensor.clone() for name, tensor in {**tensors, "bias": bias, "dout": dout}.items()}
        for tensor in (given["q"][:, rows], given["k"][:, cols], given["v"][:, cols]):
            tensor.fill_(poison)
        given["bias"].masked_fill_(~listed.repeat_interleave(16, -2).repeat_interleave(16, -1), poison)
        gradient = given.pop("dout")
        leaves = [tensor.requires_grad_() for tensor in given.values()]
        out = attention(**given, block_mask=listed, block_size=16, backend=backend)
        return out, *torch.autograd.grad(out, leaves, gradient)

    clean, poisoned = run(0.0), run(math.nan)
    for one, other in zip(clean, poisoned, strict=True):
        assert torch.equal(one, other)
    out, dq, dk, dv, _ = poisoned
    for nothing in (out[:, rows], dq[:, rows], dk[:, cols], dv[:, cols]):
        assert nothing.eq(0).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equals_the_mask_written_out(backend, device):
    tensors = [tensor.to(device).requires_grad_() for tensor in qkv(1, 40, 40, 2, 1).values()]
    listed = blocks(1, 2, 3, 3).to(device)
    mask = listed.repeat_interleave(16, -2).repeat_interleave(16, -1)[..., :40, :40]
    results = []
    for options in ({"block_mask": listed, "block_size": 16}, {"mask": mask}):
        out = attention(*tensors, causal=True, backend=backend, **options)
        results.append((out, *torch.autograd.grad(out, tensors, torch.ones_like(out))))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)


def test_tiles_of_the_torch_path_hold_listed_blocks_alone():
    listed = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)[None, None]
    found = Blocks(listed, (16, 32))
    assert found.runs(5, 0, 128) == [slice(0, 64), slice(96, 128)]
    assert found.runs(15, 20, 100) == [slice(20, 64), slice(96, 100)]
    assert found.runs(16, 0, 128) == []
    assert list(portions(found.runs(0, 0, 128), 48)) == [(slice(0, 48),), (slice(48, 64), slice(96, 128))]


def test_a_block_mask_is_never_left_to_the_dense_function(device):
    tensors = qkv(1, 32, 32)
    call = by_torch.AttentionCall(**tensors, block_mask=torch.ones(1, 1, 2, 2, dtype=torch.bool), block_size=(16, 16))
    assert not by_torch.serves_by_sdpa(call, 32, 32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"block_mask": torch.ones(3, 5)}, TypeError, "block_mask must be boolean or integer, got float32"),
        ({"block_mask": torch.ones(3, 5) > 0}, ValueError, "block_mask must have 4 dimensions: .*blocks of queries"),
        (
            {"block_mask": torch.ones(1, 1, 1, 5) > 0},
            ValueError,
            r"block_mask must have shape .* = \(2 or 1, 4 or 1, 3, 5\) for blocks of 16 queries and 16 keys, got \(1, 1, 1, 5\)",
        ),
        ({"block_mask": torch.ones(2, 2, 3, 5) > 0}, ValueError, r"block_mask must have shape .*, got \(2, 2, 3, 5\)"),
        ({"block_mask": torch.ones(1, 1, 3, 5, device="meta") > 0}, ValueError, "block_mask must be on .*, got meta"),
        ({"block_mask": [[True]]}, TypeError, "block_mask must be a torch.Tensor"),
        ({"block_size": 8}, ValueError, "block_size must be at least 16, got 8"),
        ({"block_size": (16, 40)}, ValueError, r"block_size must be a multiple of 16, got \(16, 40\)"),
        ({"block_size": (16, 16, 16)}, TypeError, r"block_size must be an int or a pair \(queries, keys\)"),
        ({"block_size": 16.0}, TypeError, "block_size must be an int, got 16.0"),
    ],
)  # fmt: skip
def test_bad_masks_and_sizes(changes, error, message, device):
    tensors = {name: tensor.to(device) for name, tensor in qkv(2, 40, 70, 4, 2).items()}
    given = {"block_mask": torch.ones(1, 1, 3, 5, device=device) > 0, "block_size": 16}
    attention(**tensors, **given)
    with pytest.raises(error, match=message):
        attention(**tensors, **{**given, **changes})


def test_packed_masks_must_cover_the_longest_sequence(device):
    packed = {name: tensor.to(device) for name, tensor in packed_qkv([20, 33], [37, 33]).items()}
    attention(**packed, block_mask=torch.ones(2, 1, 4, 3, device=device) > 0, block_size=16)
    with pytest.raises(
        ValueError, match=r"of packed sequences must have shape .* \(2 or 1, 2 or 1, at least 3, at least 3\)"
    ):
        attention(**packed, block_mask=torch.ones(1, 1, 2, 3, device=device) > 0, block_size=16)


def test_integers_are_masks_and_the_default_size_is_64(device):
    tensors = {name: tensor.to(device) for name, tensor in qkv(1, 70, 70).items()}
    listed = torch.tensor([[3, 0], [1, 2]], device=device)[None, None]
    expected = attention(**tensors, block_mask=listed != 0, block_size=(64, 64))
    assert torch.equal(attention(**tensors, block_mask=listed), expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck_and_fullgraph(backend, device):
    from pytransformer.ops.attention.call import AttentionCall, check_attention

    listed = torch.tensor([[True, False], [True, True]], device=device)[None, None]
    tensors = {name: tensor.to(device).requires_grad_() for name, tensor in qkv(1, 20, 20, 2, 1).items()}
    call = check_attention(AttentionCall(**tensors, block_mask=listed, block_size=16, softmax_scale=None, causal=True))
    torch.library.opcheck(torch.ops.pytransformer.attention_forward, (*call, backend))
    plain = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in call]
    out, lse = torch.ops.pytransformer.attention_forward(*plain, backend)
    backward = (torch.randn_like(out), None, out, lse, *plain, False, False, backend)
    torch.library.opcheck(torch.ops.pytransformer.attention_backward, backward)

    def function(q, k, v, listed):
        return attention(q, k, v, causal=True, block_mask=listed, block_size=16, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for length, mask in ((20, listed), (40, torch.ones(1, 1, 3, 3, dtype=torch.bool, device=device).tril())):
        leaves = [tensor.to(device).requires_grad_() for tensor in qkv(1, length, length, 2, 1).values()]
        results = [run(*leaves, mask) for run in (compiled, function)]
        gradients = [torch.autograd.grad(out, leaves, torch.ones_like(out)) for out in results]
        for one, other in zip((results[0], *gradients[0]), (results[1], *gradients[1])):
            assert torch.equal(one, other)


def test_func_and_autocast(device):
    """vmap over the masks themselves, and 16-bit products where autocast asks for them."""
    tensors = [tensor.to(device) for tensor in qkv(1, 20, 20, 2, 1).values()]
    masks = torch.tensor([[[True, False], [True, True]], [[True, True], [False, True]]], device=device)[:, None, None]

    def loss(q, mask):
        return attention(q, *tensors[1:], block_mask=mask, block_size=16, backend="torch").square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(tensors[0], masks)
    for mask, gradient in zip(masks, found):
        torch.testing.assert_close(gradient, torch.func.grad(loss)(tensors[0], mask))
    with torch.autocast(device.type, torch.bfloat16):
        assert attention(*tensors, block_mask=masks[0], block_size=16).dtype == torch.bfloat16


def test_a_kept_launch_reads_the_mask_anew(device):
    """The calls are like the first in all but the values of the mask."""
    tensors = [tensor.to(device, torch.bfloat16) for tensor in qkv(1, 32, 32, 1, 1).values()]
    contract = Contract(torch.bfloat16)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        blocks = {"block_mask": torch.rand(1, 1, 2, 2, device=device) < 0.5, "block_size": 16}
        found = attention(*tensors, **blocks, backend="triton")
        plain, golden = (
            reference.attention(*(t.to(dtype) for t in tensors), **blocks) for dtype in (torch.bfloat16, torch.float64)
        )
        contract.add("out", actual=found, plain=plain, golden=golden)
    contract.check()


def test_nothing_to_attend_to_in_packed_sequences(device):
    """A mask without a single block: outputs 0, gradients 0, lse -inf."""
    packed = {name: tensor.to(device) for name, tensor in packed_qkv([5, 17], [5, 17]).items()}
    leaves = [packed[name].requires_grad_() for name in "qkv"]
    none = torch.zeros(1, 1, 2, 2, dtype=torch.bool, device=device)
    for backend in ("torch", "triton"):
        out, lse = attention(**packed, block_mask=none, block_size=16, return_lse=True, backend=backend)
        assert out.eq(0).all() and lse.eq(-math.inf).all()
        assert all(gradient.eq(0).all() for gradient in torch.autograd.grad(out.sum(), leaves))
