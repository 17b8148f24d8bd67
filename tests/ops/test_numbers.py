"""Numbers that are not Python's: numpy's, and tensors without dimensions, wherever torch's own functions take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pytransformer
import pytransformer.nn as ptnn
from pytransformer.ops import checks
from pytransformer.ops.backend import use_backend
from pytransformer.ops.op import forget_launches

BACKENDS = ("reference", "torch", "triton")


@pytest.mark.parametrize(
    "value", [np.float16(0.5), np.float32(0.5), np.float64(0.5), np.longdouble(0.5), torch.tensor(0.5)], ids=repr
)
def test_a_checked_number_is_pythons(value: Any) -> None:
    number = checks.check_float("eps", value)
    assert type(number) is float and number == 0.5
    with pytest.raises(ValueError, match=r"eps must be between 0\.0 and 0\.25, got 0\.5"):
        checks.check_float("eps", value, minimum=0.0, maximum=0.25)
    with pytest.raises(TypeError, match="size must be an int"):
        checks.check_int("size", value)


@pytest.mark.parametrize(
    "value", [np.int8(5), np.uint8(5), np.int64(5), torch.tensor(5), torch.tensor(5, dtype=torch.int32)], ids=repr
)
def test_a_checked_int_is_pythons(value: Any) -> None:
    for check in (checks.check_int, checks.check_float):
        number = check("size", value)
        assert type(number) is int and number == 5
        with pytest.raises(ValueError, match="size must be at least 6, got 5"):
            check("size", value, minimum=6)


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), torch.tensor(True), "5", None, 1j, np.complex64(1), np.array([5]), torch.tensor([5])], ids=repr
)  # fmt: skip
def test_what_is_no_number_is_none(value: Any) -> None:
    with pytest.raises(TypeError, match="size must be an int, got"):
        checks.check_int("size", value)
    with pytest.raises(TypeError, match="eps must be a number, got"):
        checks.check_float("eps", value)


def test_a_number_that_trains_is_refused() -> None:
    """Or its gradient would be lost without a word; torch refuses it too."""
    with pytest.raises(TypeError, match="softmax_scale must be a number, got a float32 tensor of shape"):
        checks.check_float("softmax_scale", torch.tensor(0.5, requires_grad=True))


@pytest.mark.parametrize("value", [np.nan, np.inf, np.float32("nan"), torch.tensor(torch.inf)], ids=repr)
def test_a_number_that_is_not_finite(value: Any) -> None:
    with pytest.raises(ValueError, match="eps must be finite, got"):
        checks.check_float("eps", value)


@pytest.mark.parametrize("value", [np.bool_(True), np.bool_(False)], ids=repr)
def test_a_checked_flag_is_pythons(value: Any) -> None:
    assert checks.check_bool("causal", value) is bool(value)


@pytest.mark.parametrize("value", [1, 0.0, "True", None, np.int64(1), torch.tensor(True), np.array([True])], ids=repr)
def test_what_is_no_flag_is_none(value: Any) -> None:
    with pytest.raises(TypeError, match="causal must be True or False, got"):
        checks.check_bool("causal", value)


LENGTHS = torch.tensor([3, 5], dtype=torch.int32)


def append(q: torch.Tensor, **options: Any) -> tuple[Any, ...]:
    caches = torch.zeros(2, 8, 2, 16, device=q.device), torch.zeros(2, 8, 2, 16, device=q.device)
    new = pytransformer.kv_append(
        q[:, :1], q[:, :1], *caches, cache_seqlens=LENGTHS.to(q.device), q=q[:, :1], **options
    )
    return (new, *caches)


def cross_entropy(q: torch.Tensor, **options: Any) -> torch.Tensor:
    x = q.flatten(1)[:, :16]
    targets = torch.tensor([1, -7], device=q.device)
    return pytransformer.linear_cross_entropy(x, q.flatten()[:80].view(5, 16), targets, **options)


def rotate(q: torch.Tensor, **options: Any) -> Any:
    cos, sin = (table.to(q.device) for table in pytransformer.rope_tables(16, 16))
    return pytransformer.rope(q, None, cos, sin, **options)[0]


def packed(q: torch.Tensor, **options: Any) -> Any:
    starts = torch.tensor([0, 6], dtype=torch.int32, device=q.device)
    return pytransformer.attention(q[0], q[0], q[0], cu_seqlens_q=starts, cu_seqlens_k=starts, **options)


def decode(q: torch.Tensor, **options: Any) -> Any:
    return pytransformer.decode_attention(q[:, :1], q, q, LENGTHS.to(q.device), **options)


OPS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "attention": (lambda q, **options: pytransformer.attention(q, q, q, **options), {
        "causal": True, "window": (3, 1), "softmax_scale": 0.3, "dropout_p": 0.0, "dropout_seed": 3, "deterministic": False,
    }),
    "attention, dropout": (lambda q, **options: pytransformer.attention(q, q, q, **options), {
        "dropout_p": 0.25, "dropout_seed": 2**40 + 3, "softcap": 2.0, "return_lse": True,
    }),
    "attention, packed": (packed, {"max_seqlen_q": 6, "max_seqlen_k": 8, "causal": True}),
    "decode_attention": (decode, {"softmax_scale": 0.3, "window": (2, 0), "num_splits": 0, "causal": True, "return_lse": False}),
    "kv_append": (append, {"norm_eps": 1e-5, "norm_weight_offset": 1.0, "interleaved": True}),
    "rope": (rotate, {"offsets": 4, "interleaved": True, "inplace": False}),
    "layer_norm": (pytransformer.layer_norm, {"eps": 0.125}),
    "rms_norm": (lambda q, **options: pytransformer.rms_norm(q, q[0, 0, 0], **options), {"eps": 0.125, "weight_offset": 1.0}),
    "linear_cross_entropy": (cross_entropy, {"ignore_index": -7, "label_smoothing": 0.1, "softcap": 5.0, "z_loss": 0.01}),
    "linear_attention": (lambda q, **options: pytransformer.linear_attention(q, q, q, **options), {
        "causal": True, "normalize": False, "return_state": True,
    }),
}  # fmt: skip


def as_numpy(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(as_numpy, value))
    kind = {bool: np.bool_, int: np.int64, float: np.float64}[type(value)]
    return kind(value)


def as_tensors(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(as_tensors, value))
    return (
        value
        if isinstance(value, bool)
        else torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    )


# A seed is no number: a tensor is (seed, offset). Offsets as a tensor are those of each sequence.
NO_TENSORS = {"dropout_seed", "offsets"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["numpy", "tensors"])
@pytest.mark.parametrize("name", OPS)
def test_options_of_the_ops(name: str, kind: str, backend: str, device: torch.device) -> None:
    """The bits of Python's numbers, in a call that is the first of its kind and in later ones, whose launch may have been kept."""
    function, options = OPS[name]
    q = torch.randn(2, 6, 2, 16, generator=torch.manual_seed(0)).to(device)
    others = {
        key: as_numpy(value) if kind == "numpy" else value if key in NO_TENSORS else as_tensors(value)
        for key, value in options.items()
    }
    forget_launches()
    with torch.no_grad(), use_backend(backend):
        try:
            right = function(q, **options)
        except NotImplementedError:
            with pytest.raises(NotImplementedError):
                function(q, **others)
            return
        forget_launches()
        for given in (others, others, options, others):
            torch.testing.assert_close(function(q, **given), right, rtol=0, atol=0, equal_nan=True)
    leaf = q.clone().requires_grad_()
    if name in ("decode_attention", "kv_append"):
        return
    with use_backend(backend):
        for given in (others, others):
            found = function(leaf, **given)
            found = found if isinstance(found, torch.Tensor) else found[0]
            found.sum().backward()


def test_tables_of_numpys_numbers() -> None:
    for given in (
        (np.int64(16), np.int32(5), np.float32(1000.0)),
        (torch.tensor(16), torch.tensor(5), torch.tensor(1000.0)),
    ):
        found = pytransformer.rope_tables(
            *given[:2], base=given[2], scaling={"rope_type": "linear", "factor": np.float64(2.0)}
        )
        right = pytransformer.rope_tables(16, 5, base=1000.0, scaling={"rope_type": "linear", "factor": 2.0})
        assert all(torch.equal(one, other) for one, other in zip(found, right))


@pytest.mark.parametrize("width", [np.int64(16), [np.int64(2), np.int32(8)]], ids=repr)
@pytest.mark.parametrize("eps", [np.float32(1e-3), np.float64(1e-3), torch.tensor(1e-3)], ids=repr)
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_norms_of_numpys_numbers(kind: str, eps: Any, width: Any, device: torch.device) -> None:
    """Made here, or made by torch and patched: a model that ran must run."""
    x = torch.randn(3, 2, 8, device=device)
    x = x.view(3, 16) if isinstance(width, np.int64) else x
    theirs = nn.Sequential(getattr(nn, kind)(width, eps=eps)).to(device)
    right = theirs(x)
    ours = getattr(ptnn, kind)(width, eps=eps).to(device)
    torch.testing.assert_close(ours(x), right)
    ptnn.patch(theirs)
    torch.testing.assert_close(theirs(x), right)


def test_an_epsilon_of_numpys_in_another_librarys_norm(device: torch.device) -> None:
    class FooRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.randn(16)), np.float32(1e-5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(x, (16,), self.weight, float(self.eps))

    model = nn.Sequential(FooRMSNorm()).to(device)
    x = torch.randn(3, 16, device=device)
    right = model(x)
    assert len(ptnn.patch(model).replaced) == 1
    torch.testing.assert_close(model(x), right)


def test_a_configuration_of_numpys_numbers() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "max_seqlen": 16}
    plain = pytransformer.TransformerConfig.llama(**sizes, norm_eps=0.25, qk_norm=True)
    given = {name: np.int64(size) for name, size in sizes.items()}
    config = pytransformer.TransformerConfig.llama(**given, norm_eps=np.float64(0.25), qk_norm=np.bool_(True))
    assert config == plain and config.to_json() == plain.to_json()
    torch.manual_seed(0)
    right = pytransformer.Transformer(plain).eval()
    model = pytransformer.Transformer(config).eval()
    model.load_state_dict(right.state_dict())
    ids = torch.randint(0, 32, (1, 8))
    assert torch.equal(model(ids), right(ids))


def test_modules_of_numpys_numbers(device: torch.device) -> None:
    attention = ptnn.Attention(
        np.int64(32), np.int64(4), num_kv_heads=np.int32(2), window=(np.int64(3), np.int64(0)), softmax_scale=np.float32(0.25),
        qk_norm_eps=np.float32(1e-6), dropout=np.float32(0.0), causal=np.bool_(True),
        rotary=ptnn.RotaryEmbedding(np.int64(8), np.int64(16)),
    ).to(device)  # fmt: skip
    plain = ptnn.Attention(
        32,
        4,
        num_kv_heads=2,
        window=(3, 0),
        softmax_scale=0.25,
        qk_norm_eps=float(np.float32(1e-6)),
        rotary=ptnn.RotaryEmbedding(8, 16),
    ).to(device)
    plain.load_state_dict(attention.state_dict())
    x = torch.randn(2, 6, 32, device=device)
    torch.testing.assert_close(attention(x), plain(x), rtol=0, atol=0)
    feed_forward = ptnn.FeedForward(np.int64(32), np.int64(48), activation="swiglu", dropout=np.float32(0.1)).to(device)
    assert feed_forward(x).shape == x.shape
    assert ptnn.AlibiSlopes(np.int64(4)).slopes.shape == (4,)
    assert ptnn.SinusoidalPositions(np.int64(4), np.int64(6))(torch.tensor([1])).shape == (1, 6)
    assert ptnn.Linear(np.int64(32), np.int64(8)).to(device)(x).shape == (2, 6, 8)
