"""The helpers that take padding out and put it back, against loops over the mask."""

from __future__ import annotations

import inspect

import pytest
import torch

from pytransformer.interop import bert_padding
from pytransformer.interop.flash_attn import flash_attn_varlen_func
from pytransformer.verification import Contract
from tests.interop import flash_attn_meaning as meaning

MASK = [[1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]]
UNUSED = [[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_signatures_are_those_of_flash_attn():
    names = {
        "unpad_input": ["hidden_states", "attention_mask", "unused_mask"],
        "unpad_input_for_concatenated_sequences": ["hidden_states", "attention_mask_in_length"],
        "pad_input": ["hidden_states", "indices", "batch", "seqlen"],
        "index_first_axis": ["input", "indices"],
        "index_put_first_axis": ["values", "indices", "first_axis_dim"],
    }
    for name, parameters in names.items():
        assert list(inspect.signature(getattr(bert_padding, name)).parameters) == parameters
    assert inspect.signature(bert_padding.unpad_input).parameters["unused_mask"].default is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32])
@pytest.mark.parametrize("unused", [None, UNUSED])
def test_unpad_and_pad(unused, dtype, device):
    hidden = torch.randn(3, 4, 2, 5, device=device)
    kept = [[one or other for one, other in zip(*rows)] for rows in zip(MASK, unused or [[0] * 4] * 3)]
    masks = [torch.tensor(mask, device=device).to(dtype) for mask in (MASK, unused) if mask]
    tokens, indices, cu_seqlens, max_seqlen, seqused = bert_padding.unpad_input(hidden, *masks)
    places = [(row, column) for row in range(3) for column in range(4) if kept[row][column]]
    assert torch.equal(tokens, torch.stack([hidden[place] for place in places]))
    assert indices.tolist() == [4 * row + column for row, column in places] and indices.dtype == torch.int64
    starts = [0, *(sum(sum(row) for row in kept[: end + 1]) for end in range(3))]
    assert cu_seqlens.tolist() == starts and cu_seqlens.dtype == torch.int32
    assert max_seqlen == max(sum(row) for row in kept) and type(max_seqlen) is int
    assert seqused.tolist() == [sum(row) for row in MASK] and seqused.dtype == torch.int32

    padded = bert_padding.pad_input(tokens, indices, 3, 4)
    assert torch.equal(padded, hidden * torch.tensor(kept, device=device)[..., None, None])


def test_unpad_concatenated_sequences(device):
    """The example of flash_attn's documentation."""
    hidden = torch.arange(18, device=device).float().view(3, 6, 1)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]], device=device)
    tokens, indices, cu_seqlens, max_seqlen = bert_padding.unpad_input_for_concatenated_sequences(hidden, lengths)
    expected = [*range(5), *range(6, 11), *range(12, 18)]
    assert indices.tolist() == expected and tokens.flatten().tolist() == expected
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and cu_seqlens.dtype == torch.int32
    assert max_seqlen == 6 and type(max_seqlen) is int


def test_gradients(device):
    hidden = torch.randn(6, 3, dtype=torch.float64, device=device, requires_grad=True)
    indices = torch.tensor([4, 0, 4], device=device)  # one index twice: both gradients count
    assert torch.autograd.gradcheck(lambda x: bert_padding.index_first_axis(x, indices), hidden)
    values = torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: bert_padding.index_put_first_axis(x, indices[:2], 6), values)
    assert torch.autograd.gradgradcheck(lambda x: bert_padding.index_first_axis(x, indices).square(), hidden)


def test_padding_is_not_silently_ignored(device):
    """unpad, attend, pad: what lies in the padding, NaN even, changes nothing."""
    mask = torch.tensor(MASK, device=device, dtype=torch.bool)
    qkv = torch.randn(3, 4, 3, 2, 16, device=device)

    def attend(qkv):
        tokens, indices, cu_seqlens, max_seqlen, _ = bert_padding.unpad_input(qkv, mask)
        out = flash_attn_varlen_func(*tokens.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True)
        return bert_padding.pad_input(out, indices, 3, 4)

    out = attend(qkv)
    poisoned = qkv.masked_fill(~mask[..., None, None, None], float("nan"))
    assert torch.equal(attend(poisoned), out)
    assert torch.equal(out[~mask], torch.zeros_like(out[~mask]))
    contract = Contract(torch.float32)
    for row in range(3):
        golden, plain = (
            meaning.softmax_attention(*qkv[row, mask[row]].to(dtype).unbind(1), causal=True)[0]
            for dtype in (torch.float64, torch.float32)
        )
        contract.add("out", actual=out[row, mask[row]], plain=plain, golden=golden)
    contract.check()


def test_mistakes_raise_what_flash_attn_raises(device):
    hidden = torch.zeros(2, 3, 4, device=device)
    mask = torch.ones(2, 3, device=device, dtype=torch.int64)
    for error, words, call in (
        (AssertionError, "at least 2 dimensions", lambda: bert_padding.unpad_input(hidden[..., 0], mask)),
        (AssertionError, "at least 2 dimensions", lambda: bert_padding.index_first_axis(hidden[0, 0], mask[0])),
        (AssertionError, "at least 2 dimensions", lambda: bert_padding.index_put_first_axis(hidden[0, 0], mask[0], 3)),
        (AssertionError, "indices must have 1 dimension", lambda: bert_padding.index_put_first_axis(hidden[0], mask, 3)),
        (RuntimeError, r"attention_mask must have shape \(batch, seqlen\) = \(2, 3\)", lambda: bert_padding.unpad_input(hidden, mask[:1])),
        (RuntimeError, "unused_mask must have shape", lambda: bert_padding.unpad_input(hidden, mask, mask[0])),
        (
            RuntimeError, "attention_mask_in_length must have shape",
            lambda: bert_padding.unpad_input_for_concatenated_sequences(hidden, mask[:, :2]),
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            call()
