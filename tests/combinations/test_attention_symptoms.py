"""What users of attention tripped over, each test named after the symptom, at the level of the op."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pytransformer import attention, decode_attention, reference
from pytransformer.verification import Contract
from tests.ops.attention_cases import qkv
from tests.support.draws import pool

BACKENDS = ("triton", "torch", "reference")
pytestmark = pytest.mark.usefixtures("without_overflow_checks", "poison_empty")


def leaves(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}


def with_gradients(tensors: dict[str, Tensor], dout: Tensor, **options: object) -> dict[str, Tensor]:
    """out and the gradients of all tensors."""
    out = attention(**tensors, **options)
    gradients = torch.autograd.grad(out, list(tensors.values()), dout)
    return {"out": out.detach(), **{f"d{name}": gradient for name, gradient in zip(tensors, gradients)}}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_padding_silently_ignored(causal: bool, backend: str, device: torch.device) -> None:
    """Other numbers in padded keys and values change no bit, and get no gradient."""
    padding = torch.arange(37, device=device) < torch.tensor([[37], [20]], device=device)
    tensors = leaves(qkv(2, 37, 37, 4, 2), device)
    changed = leaves({name: tensor.detach().clone() for name, tensor in tensors.items()}, device)
    with torch.no_grad():
        for name in "kv":
            changed[name][1, 20:] = 100.0 * torch.randn_like(changed[name][1, 20:])
    dout = torch.randn(2, 37, 4, 16, device=device)
    first, second = (
        with_gradients(given, dout, key_padding_mask=padding, causal=causal, backend=backend)
        for given in (tensors, changed)
    )
    assert torch.equal(first["out"], second["out"])
    for found in (first, second):
        assert found["dk"][1, 20:].eq(0).all()
        assert found["dv"][1, 20:].eq(0).all()
    ignored = attention(**tensors, causal=causal, backend=backend)
    assert not torch.equal(first["out"], ignored)


@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding_changes_outputs(backend: str, device: torch.device) -> None:
    """A sequence behind left padding, in a batch, causal: outputs and gradients are those of the sequence by itself."""
    contract = Contract(torch.float32)

    def add(seed: int) -> None:
        torch.manual_seed(seed)
        alone = leaves(qkv(1, 13, 13, 2, 1), device)
        pads = {name: 100.0 * torch.randn(1, 24, tensor.shape[2], 16, device=device) for name, tensor in alone.items()}
        others = {name: tensor.to(device) for name, tensor in qkv(1, 37, 37, 2, 1).items()}
        batch = {name: torch.cat([others[name], torch.cat([pads[name], alone[name]], 1)]) for name in alone}
        padding = torch.arange(37, device=device) >= torch.tensor([[0], [24]], device=device)
        dout = torch.randn(1, 13, 2, 16, device=device)
        out = attention(**batch, key_padding_mask=padding, causal=True, backend=backend)[1:, 24:]
        gradients = torch.autograd.grad(out, list(alone.values()), dout)
        contract.add("out", actual=out, **expected(alone, "out", dout))
        for name, gradient in zip(alone, gradients):
            contract.add(f"d{name}", actual=gradient, kind="gradient", **expected(alone, f"d{name}", dout))

    pool(contract, add, 1).check()


def expected(tensors: dict[str, Tensor], name: str, dout: Tensor) -> dict[str, Tensor]:
    """The reference's result "plain", in the inputs' dtype, and "golden", in float64, of a causal call."""
    found = {}
    for key, dtype in (("plain", torch.float32), ("golden", torch.float64)):
        copies = {letter: tensor.detach().to(dtype).requires_grad_() for letter, tensor in tensors.items()}
        out = reference.attention(**copies, causal=True)
        assert isinstance(out, Tensor)
        gradients = torch.autograd.grad(out, list(copies.values()), dout.to(dtype))
        found[key] = {"out": out.detach(), **{f"d{letter}": g for letter, g in zip(copies, gradients)}}[name]
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden_by", ["mask", "bias", "key_padding_mask", "causal", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_from_fully_masked_rows(hidden_by: str, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Whatever hides all keys of a query: output 0, gradients 0 there and finite elsewhere; and NaN sent into it stays there."""
    seqlen_q, seqlen_k = (40, 20) if hidden_by in ("causal", "window") else (20, 37)
    tensors = {name: t.to(dtype) for name, t in qkv(2, seqlen_q, seqlen_k).items()}
    tensors = leaves(tensors, device)
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    mask[::3] = False
    padding = torch.ones(2, seqlen_k, dtype=torch.bool, device=device)
    padding[1] = False
    options, hidden = {
        "mask": ({"mask": mask}, (slice(None), slice(0, None, 3))),
        "bias": ({"bias": torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)}, (slice(None), slice(0, None, 3))),
        "key_padding_mask": ({"key_padding_mask": padding}, (slice(1, 2), slice(None))),
        "causal": ({"causal": True}, (slice(None), slice(0, 20))),
        "window": ({"window": (3, 0)}, (slice(None), slice(0, 20))),
    }[hidden_by]  # fmt: skip
    found = with_gradients(
        tensors, torch.randn(2, seqlen_q, 2, 16, device=device, dtype=dtype), **options, backend=backend
    )
    for name, result in found.items():
        assert result.isfinite().all(), name
    assert found["out"][hidden].eq(0).all()
    assert found["dq"][hidden].eq(0).all()
    visible = torch.ones(2, seqlen_q, dtype=torch.bool, device=device)
    visible[hidden] = False
    assert found["out"][visible].ne(0).any(-1).all()


def bias_gradient(tensors: dict[str, Tensor], bias: Tensor, dout: Tensor, backend: str) -> Tensor:
    """Gradient of ``bias``, everything in its dtype."""
    leaf = bias.clone().requires_grad_()
    inputs = {name: tensor.to(bias.dtype) for name, tensor in tensors.items()}
    out = attention(**inputs, bias=leaf, causal=True, backend=backend)
    return torch.autograd.grad(out, leaf, dout.to(bias.dtype))[0]


SHAPES = [(1, 4, 5, 20), (2, 1, 5, 20), (2, 1, 1, 20), (5, 20), (20,), (1,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_broadcast_bias_gradient_wrong(shape: tuple[int, ...], device: torch.device) -> None:
    """It is the sum, over what was broadcast, of the gradient of the same bias written out in full.

    The sinks take part so that one bias for all has a gradient too: without them the weights of a row always add up to 1.
    """
    contract = Contract(torch.float32)

    def add(seed: int) -> None:
        torch.manual_seed(seed)
        tensors = {name: tensor.to(device) for name, tensor in qkv(2, 5, 20, 4, 2).items()}
        tensors["sinks"] = torch.randn(4, device=device)
        bias, dout = torch.randn(shape, device=device), torch.randn(2, 5, 4, 16, device=device)
        written_out = bias.expand(2, 4, 5, 20)
        contract.add(
            "dbias",
            actual=bias_gradient(tensors, bias, dout, "triton"),
            plain=bias_gradient(tensors, written_out, dout, "reference").sum_to_size(shape),
            golden=bias_gradient(tensors, written_out.double(), dout, "reference").sum_to_size(shape),
            kind="gradient",
        )

    pool(contract, add, 1).check()


def visible_keys(backend: str, seqlen_q: int, seqlen_k: int, device: torch.device, **options: object) -> Tensor:
    """(seqlen_q, seqlen_k): which key's value reaches which query's output."""
    q, k = torch.zeros(1, seqlen_q, 1, 8, device=device), torch.zeros(1, seqlen_k, 1, 8, device=device)
    v = torch.eye(seqlen_k, 64, device=device)[None, :, None]
    return attention(q, k, v, backend=backend, **options)[0, :, 0, :seqlen_k] > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(5, 40), (40, 5), (33, 33), (1, 40)], ids=str)
def test_top_left_bottom_right_confusion(lengths: tuple[int, int], backend: str, device: torch.device) -> None:
    """The last query sees the last key, whichever side is longer; not the first query the first key."""
    seqlen_q, seqlen_k = lengths
    expected_keys = torch.ones(lengths, dtype=torch.bool, device=device).tril(seqlen_k - seqlen_q)
    assert torch.equal(visible_keys(backend, seqlen_q, seqlen_k, device, causal=True), expected_keys)
    assert bool(expected_keys[-1].all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(37, 37), (9, 40), (40, 9)], ids=str)
def test_window_off_by_one(lengths: tuple[int, int], backend: str, device: torch.device) -> None:
    """(left, right) is inclusive on both sides: left + 1 + right keys, counted from the aligned position; 0 is the key itself."""
    seqlen_q, seqlen_k = lengths
    position = torch.arange(seqlen_q, device=device)[:, None] + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k, device=device)
    for left, right in ((0, 0), (1, 0), (0, 1), (4, 2), (31, 0), (-1, 3), (3, -1)):
        expected_keys = torch.ones(lengths, dtype=torch.bool, device=device)
        if left >= 0:
            expected_keys &= key >= position - left
        if right >= 0:
            expected_keys &= key <= position + right
        found = visible_keys(backend, seqlen_q, seqlen_k, device, window=(left, right))
        assert torch.equal(found, expected_keys), (left, right)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_window_off_by_one_in_a_cache(backend: str, device: torch.device) -> None:
    """The new token counts: with left = 3 it sees itself and the three before it."""
    cache = torch.zeros(1, 40, 1, 8, device=device)
    v_cache = torch.eye(40, 64, device=device)[None, :, None]
    length = torch.tensor([30], dtype=torch.int32, device=device)
    q = torch.zeros(1, 2, 1, 8, device=device)
    out = decode_attention(q, cache, v_cache, length, window=(3, -1), backend=backend)[0, :, 0]
    assert [row.nonzero().flatten().tolist() for row in out] == [[25, 26, 27, 28], [26, 27, 28, 29]]


@pytest.mark.parametrize("option", ["mask", "bias"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding_cuts_the_newest_keys_of_a_masked_cache(option: str, backend: str, device: torch.device) -> None:
    """A mask as wide as the longest sequence, behind padding: the keys at the end of the cache still count."""
    cache = torch.zeros(1, 43, 1, 8, device=device)
    v_cache = torch.eye(43, 64, device=device)[None, :, None]
    length, leftpad = (torch.tensor([n], dtype=torch.int32, device=device) for n in (40, 3))
    values = torch.ones(40, dtype=torch.bool, device=device) if option == "mask" else torch.zeros(40, device=device)
    q = torch.zeros(1, 1, 1, 8, device=device)
    if backend == "torch" and device.type == "cuda":
        return  # refused there: lengths cannot be read back
    out = decode_attention(q, cache, v_cache, length, cache_leftpad=leftpad, **{option: values}, backend=backend)
    assert out.flatten().nonzero().flatten().tolist() == list(range(3, 43))


def test_result_changes_with_the_rest_of_the_batch(device: torch.device) -> None:
    """Each sequence alone has the bits it has in the batch, forward and backward, with everything that is given per sequence."""
    tensors = leaves(qkv(3, 20, 33, 4, 2), device)
    options = {
        "mask": torch.rand(3, 1, 20, 33, device=device) > 0.3,
        "key_padding_mask": torch.arange(33, device=device) < torch.tensor([[33], [9], [20]], device=device),
        "alibi_slopes": torch.rand(3, 4, device=device),
        "bias": torch.randn(3, 4, 20, 33, device=device),
    }
    dout = torch.randn(3, 20, 4, 16, device=device)
    together = with_gradients(tensors, dout, **options, causal=True, backend="triton")
    for sequence in range(3):
        one = slice(sequence, sequence + 1)
        alone = with_gradients(
            {name: tensor[one] for name, tensor in tensors.items()}, dout[one],
            **{name: value[one] for name, value in options.items()}, causal=True, backend="triton",
        )  # fmt: skip
        for name, result in alone.items():
            assert torch.equal(result, together[name][one]), name
