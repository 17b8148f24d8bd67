"""Naive linear attention against the weights written out, closed forms and finite differences."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.testing import assert_close

from pytransformer.reference import linear_attention

BATCH, SEQLEN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VALUE_DIM = 2, 7, 4, 2, 5, 3
OPTIONS = [
    {"causal": causal, "normalize": normalize, "feature_map": feature_map, "decays": decays}
    for causal, normalize, feature_map, decays in itertools.product((True, False), (True, False), ("elu", None), (0, 1))
    if causal or not decays
]


def draw(device, *, seqlen=SEQLEN, seqlen_k=None):
    shapes = ((seqlen, NUM_HEADS, HEAD_DIM), (seqlen_k or seqlen, NUM_KV_HEADS, HEAD_DIM))
    q, k = (torch.randn(BATCH, *shape, dtype=torch.float64, device=device, requires_grad=True) for shape in shapes)
    v = torch.randn(BATCH, *shapes[1][:2], VALUE_DIM, dtype=torch.float64, device=device, requires_grad=True)
    return q, k, v


def draw_decay(device):
    return torch.tensor([0.9, 0.3], dtype=torch.float64, device=device, requires_grad=True)


def by_weights(q, k, v, *, causal=True, normalize=True, feature_map="elu", decay=None):
    """All weights of a head in one matrix."""
    if feature_map == "elu":
        q, k = F.elu(q) + 1, F.elu(k) + 1
    k, v = (tensor.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=2) for tensor in (k, v))
    weights = torch.einsum("bihd,bjhd->bhij", q, k)
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    if decay is not None:
        factors = decay.repeat_interleave(NUM_HEADS // NUM_KV_HEADS)
        weights = weights * factors[:, None, None] ** distance.clamp(min=0).to(q.device)
    if causal:
        weights = weights.masked_fill((distance < 0).to(q.device), 0.0)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return torch.einsum("bhij,bjhe->bihe", weights, v)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_equals_the_weights_written_out_with_gradients(options, device):
    options = dict(options)
    inputs = draw(device)
    if options.pop("decays"):
        options["decay"] = draw_decay(device)
    ours, theirs = linear_attention(*inputs, **options), by_weights(*inputs, **options)
    assert_close(ours, theirs)
    wanted = (*inputs, *([options["decay"]] if "decay" in options else []))
    gradient = torch.randn_like(ours)
    for found, expected in zip(
        torch.autograd.grad(ours, wanted, gradient), torch.autograd.grad(theirs, wanted, gradient)
    ):
        assert_close(found, expected)


def test_full_attention_to_another_length(device):
    inputs = draw(device, seqlen=3, seqlen_k=8)
    assert_close(linear_attention(*inputs, causal=False), by_weights(*inputs, causal=False))


def test_state_worked_by_hand(device):
    """One head, features 1 and values 1: z counts the tokens, weighed by 1, 1/2, 1/4, … from the last one on."""
    ones = torch.ones(1, 4, 1, 1, dtype=torch.float64, device=device)
    decay = torch.tensor([0.5], dtype=torch.float64, device=device)
    options = {"feature_map": None, "decay": decay, "return_state": True}
    output, (state, normalizer) = linear_attention(ones, ones, ones, normalize=False, **options)
    assert_close(output.flatten(), torch.tensor([1.0, 1.5, 1.75, 1.875], dtype=torch.float64, device=device))
    assert_close(state, output[:, -1:])
    assert_close(normalizer, output[:, -1])
    assert_close(linear_attention(ones, ones, ones, **options)[0], ones)


@pytest.mark.parametrize("decays", [False, True])
def test_pieces_with_the_state_handed_on_equal_the_whole(decays, device):
    q, k, v = draw(device)
    decay = draw_decay(device) if decays else None
    whole, expected = linear_attention(q, k, v, decay=decay, return_state=True)
    state, outputs = None, []
    for piece in (slice(0, 3), slice(3, 3), slice(3, 4), slice(4, SEQLEN)):
        inputs = (tensor[:, piece] for tensor in (q, k, v))
        output, state = linear_attention(*inputs, decay=decay, initial_state=state, return_state=True)
        outputs.append(output)
    assert_close(torch.cat(outputs, dim=1), whole)
    assert_close(state, expected)


def test_without_keys_the_output_is_zero(device):
    q, k, v = draw(device)
    output = linear_attention(q, k[:, :0], v[:, :0], causal=False)
    assert torch.equal(output, torch.zeros_like(output))


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_finite_differences(causal, device):
    inputs = draw(device, seqlen=3)
    state = torch.randn(BATCH, NUM_KV_HEADS, HEAD_DIM, VALUE_DIM, dtype=torch.float64, device=device)
    normalizer = torch.rand(BATCH, NUM_KV_HEADS, HEAD_DIM, dtype=torch.float64, device=device)

    def run(q, k, v, state, normalizer, *decay):
        options = {"decay": decay[0]} if decay else {}
        initial = (state, normalizer)
        out, last = linear_attention(q, k, v, causal=causal, initial_state=initial, return_state=True, **options)
        return out, *last

    given = (*inputs, state.requires_grad_(), normalizer.requires_grad_(), *([draw_decay(device)] if causal else []))
    assert gradcheck(run, given)


def test_low_precision_sums_in_float32(device):
    """1024 features of 1: a sum in bfloat16 would stand still at 256."""
    ones = torch.ones(1, 1024, 1, 1, dtype=torch.bfloat16, device=device)
    _, (state, normalizer) = linear_attention(ones, ones, ones, feature_map=None, return_state=True)
    assert state.dtype == normalizer.dtype == torch.float32
    assert state.item() == normalizer.item() == 1024
