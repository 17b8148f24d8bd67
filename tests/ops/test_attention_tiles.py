"""Attention over tiles by torch's matrix products: every option beside the reference in float64, many tiles each, and what it costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pytransformer import attention, reference
from pytransformer.ops.attention import tiles
from pytransformer.ops.attention.call import AttentionCall
from pytransformer.ops.attention.dropout import kept
from pytransformer.ops.attention.scratch import Scratch
from pytransformer.reference.philox import dropout_keep

SEED = torch.tensor([123456789123, 5])
TERMS = ("bias", "sinks", "alibi_slopes")


def case(seqlen_q=37, seqlen_k=53, batch=2, num_heads=4, num_kv_heads=2, **options):
    """Tensors in float64 and options; what is callable is made of (batch, num_heads, seqlen_q, seqlen_k)."""
    torch.manual_seed(1)
    sizes = (batch, num_heads, seqlen_q, seqlen_k)
    shapes = ((seqlen_q, num_heads, 16), (seqlen_k, num_kv_heads, 16), (seqlen_k, num_kv_heads, 24))
    tensors = {name: torch.randn(batch, *shape, dtype=torch.float64) for name, shape in zip("qkv", shapes)}
    made = {name: value(*sizes) if callable(value) else value for name, value in options.items()}
    return {**tensors, **{name: value.double() if name in TERMS else value for name, value in made.items()}}


CASES = {
    "causal": case(causal=True),
    "more queries than keys": case(60, 40, causal=True),
    "window": case(window=(5, 3)),
    "causal window": case(causal=True, window=(7, -1)),
    "window to the right": case(window=(-1, 2)),
    "softcap": case(causal=True, softcap=2.0),
    "softmax_scale below 0": case(causal=True, softmax_scale=-0.5),
    "softmax_scale 0": case(causal=True, softmax_scale=0.0),
    "sinks": case(sinks=lambda b, h, q, k: torch.randn(h)),
    "sinks of rows without keys": case(60, 40, causal=True, sinks=lambda b, h, q, k: torch.randn(h)),
    "a sink of -inf": case(60, 40, causal=True, sinks=torch.tensor([0.0, 1.0, -math.inf, 2.0])),
    "mask of each sequence": case(mask=lambda b, h, q, k: torch.rand(b, 1, q, k) > 0.5),
    "mask of each head": case(mask=lambda b, h, q, k: torch.rand(h, 1, k) > 0.9),
    "bias": case(bias=torch.randn),
    "bias of a key": case(bias=lambda b, h, q, k: torch.randn(h, 1, k)),
    "bias of a row": case(bias=lambda b, h, q, k: torch.randn(b, 1, q, 1)),
    "bias with -inf": case(bias=lambda b, h, q, k: torch.randn(q, k).masked_fill(torch.rand(q, k) > 0.7, -math.inf)),
    "ALiBi": case(alibi_slopes=lambda b, h, q, k: torch.rand(h)),
    "ALiBi of each sequence": case(causal=True, alibi_slopes=lambda b, h, q, k: torch.rand(b, h)),
    "key padding": case(key_padding_mask=lambda b, h, q, k: torch.rand(b, k) > 0.3),
    "dropout": case(dropout_p=0.3, dropout_seed=SEED),
    "dropout of all": case(dropout_p=1.0, dropout_seed=SEED),
    "everything": case(
        70,
        90,
        causal=True,
        window=(17, 0),
        softcap=3.0,
        sinks=lambda b, h, q, k: torch.randn(h),
        bias=lambda b, h, q, k: torch.randn(b, 1, q, k),
        mask=lambda b, h, q, k: torch.rand(b, h, q, k) > 0.3,
        alibi_slopes=lambda b, h, q, k: torch.rand(b, h),
        key_padding_mask=lambda b, h, q, k: torch.rand(b, k) > 0.1,
        dropout_p=0.2,
        dropout_seed=SEED,
    ),
}


def results(options, function, **arguments):
    """Output, lse and the gradients of both, of all that has one."""
    wanted = [name for name in (*"qkv", *TERMS) if name in options]
    call = {**options, **{name: options[name].clone().requires_grad_() for name in wanted}}
    out, lse = function(**call, **arguments, return_lse=True)
    seen = lse.isfinite()
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() + lse[seen].square().sum()
    gradients = torch.autograd.grad(loss, [call[name] for name in wanted])
    return {"out": out, "lse": lse, **dict(zip(wanted, gradients))}


@pytest.mark.parametrize("tile_scores", [2**9, 2**18])
@pytest.mark.parametrize("name", CASES)
def test_every_option_is_the_reference(name, tile_scores, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_SCORES", tile_scores)
    monkeypatch.setattr(tiles, "FEWEST_COLS", min(512, tile_scores // 32))
    expected = results(CASES[name], reference.attention)
    for what, actual in results(CASES[name], attention, backend="torch").items():
        torch.testing.assert_close(actual, expected[what], msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.parametrize("name", ["softcap", "sinks", "dropout"])
def test_a_packed_sequence_without_keys_or_queries_crashes_nothing(name):
    options = {
        "softcap": {"softcap": 2.0},
        "sinks": {"sinks": torch.randn(4)},
        "dropout": {"dropout_p": 0.3, "dropout_seed": SEED},
    }
    starts_q, starts_k = (torch.tensor(starts, dtype=torch.int32) for starts in ([0, 5, 9, 9], [0, 6, 6, 8]))
    packed = {
        name: torch.randn(tokens, heads, 16).double() for name, tokens, heads in (("q", 9, 4), ("k", 8, 2), ("v", 8, 2))
    }
    call = {**packed, **{term: value.double() if term in TERMS else value for term, value in options[name].items()}}
    call |= {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k}
    expected = results(call, reference.attention)
    for what, actual in results(call, attention, backend="torch").items():
        torch.testing.assert_close(actual, expected[what], msg=lambda text, what=what: f"{what}: {text}")


def test_dropout_drops_what_the_reference_drops():
    memory = Scratch(torch.float32, torch.device("cpu"))
    for seed in (SEED, torch.tensor([-1, -(2**40)])):
        whole = dropout_keep(0.25, seed, 1, 3, 50, 70, torch.device("cpu"))
        tile = kept(0.25, seed, range(3, 6), slice(9, 31), (slice(16, 39),), memory)
        assert torch.equal(tile.bool(), whole[:, 9:31, 16:39])


def test_hidden_keys_that_hold_nan_or_inf_count_for_nothing():
    """As in the kernels: hiding is not adding -inf."""
    options = case(mask=lambda b, h, q, k: torch.rand(b, 1, 1, k) > 0.5)
    expected = attention(**options, sinks=torch.zeros(4), backend="torch")
    hidden = ~options["mask"][:, 0, 0, :, None, None]
    for garbage in (math.nan, math.inf, 1e308):
        found = attention(
            **{**options, "k": options["k"].masked_fill(hidden, garbage)}, sinks=torch.zeros(4), backend="torch"
        )
        torch.testing.assert_close(found, expected)


def test_the_lowest_finite_bias_is_a_number_and_not_minus_infinity():
    """Masks of Hugging Face's kind: a row of nothing else attends to all keys alike."""
    q, k, v = (torch.randn(1, 5, 2, 16) for _ in range(3))
    bias = torch.full((5, 5), torch.finfo(torch.float32).min)
    out, lse = attention(q, k, v, bias=bias, return_lse=True, backend="torch")
    torch.testing.assert_close(out, v.mean(dim=1, keepdim=True).expand_as(v))
    assert (lse == bias[0, 0]).all()


def test_weights_are_never_denormal():
    """A denormal number slows down every product that it enters; ALiBi leaves a band of them in each row."""
    q = torch.zeros(1, 1, 1, 8)
    problem = tiles.Problem(AttentionCall(q, q, q, bias=q), 1, 1)
    weights = problem.exp_(torch.linspace(-200, 0, 10_001))
    assert not ((weights > 0) & (weights < torch.finfo(torch.float32).tiny)).any()
    torch.testing.assert_close(weights, torch.linspace(-200, 0, 10_001, dtype=torch.float64).exp().float())


class Memory(TorchDispatchMode):
    """The most that is alive at once of what was made inside, in bytes."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.products = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.products += "bmm" in str(function)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (
                    torch.multiprocessing.reductions.StorageWeakRef(storage),
                    storage.nbytes(),
                )
        self.alive = {key: found for key, found in self.alive.items() if not found[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


OPTIONS = {
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": torch.zeros(2)},
    "ALiBi": {"alibi_slopes": torch.ones(2)},
    "dropout": {"dropout_p": 0.1, "dropout_seed": 1},
    "lse": {"return_lse": True},
    "window": {"window": (100, 0)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_memory_grows_with_the_length_not_with_its_square(name):
    """Forward and backward: beyond twice the inputs, outputs and gradients a few tiles."""
    peaks, products = [], []
    for seqlen in (2000, 4000):
        q, k, v = (torch.randn(1, seqlen, heads, 8, requires_grad=True) for heads in (2, 1, 1))
        with Memory() as memory:
            result = attention(q, k, v, causal=True, **OPTIONS[name])
            out = result[0] if isinstance(result, tuple) else result
            out.sum().backward()
        peaks.append(memory.peak)
        products.append(memory.products)
    assert peaks[1] <= 2.1 * peaks[0]
    assert peaks[0] < 0.5 * 4 * 2 * 2000**2  # half of one score matrix
    # Keys that nobody sees cost nothing: twice the queries, twice the tiles of a window.
    assert products[1] <= (2.2 if name == "window" else 4.2) * products[0]


def test_a_scale_of_zero_or_below_is_no_nan_under_causality():
    """torch's fused function for CPUs scales the -inf of is_causal."""
    q, k, v = (torch.randn(1, 6, 2, 16) for _ in range(3))
    starts = torch.tensor([0, 6], dtype=torch.int32)
    for scale in (-1.0, -0.25, 0.0, -0.0):
        expected = reference.attention(q.double(), k.double(), v.double(), causal=True, softmax_scale=scale).float()
        torch.testing.assert_close(attention(q, k, v, causal=True, softmax_scale=scale), expected)
        packed = attention(q[0], k[0], v[0], causal=True, softmax_scale=scale, cu_seqlens_q=starts, cu_seqlens_k=starts)
        torch.testing.assert_close(packed[None], expected)
