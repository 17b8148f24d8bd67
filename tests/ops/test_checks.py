"""The shared argument checks: what passes, and what each message says."""

from __future__ import annotations

import pytest
import torch

from pytransformer.ops import checks

CPU = torch.device("cpu")


def test_what_is_allowed_passes():
    x = torch.zeros(2, 3, 8)
    assert checks.check_tensor("x", x, ndim=(2, 3), dtypes=checks.FLOAT_DTYPES, device=CPU) is x
    checks.check_shape("x", x, (2, None, 8), "(batch, any, dim)")
    checks.check_broadcastable("x", x[:1], (4, 2, 3, 8), "(a, b, c, d)")
    checks.check_same_dtype("x", x, "y", x)
    checks.check_last_dim_contiguous("x", x.transpose(0, 1))
    checks.check_last_dim_contiguous("x", x.transpose(1, 2)[..., :1])  # one element has no stride
    assert checks.check_bool("flag", False) is False
    assert checks.check_int("count", 3, minimum=0, maximum=3) == 3
    assert checks.check_float("p", 1, minimum=0.0, maximum=1.0) == 1
    assert checks.check_window("window", [-1, 5]) == (-1, 5)
    checks.check_gqa(8, 2)
    checks.check_head_dim("q", 1)
    starts = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert checks.check_cu_seqlens("cu", starts, 5, CPU, batch=3) is starts
    checks.check_values("slots", torch.tensor([-1, 4]), -1, 4, "slots")
    checks.check_no_nan("scale", torch.ones(2))
    checks.refuse_grad("append", k=x, v=None)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: checks.check_tensor("x", 1.5), TypeError, r"x must be a torch.Tensor, got 1.5 \(float\)"),
        (
            lambda x: checks.check_tensor("x", x.to_sparse()),
            TypeError,
            "dense .strided. tensor, got layout torch.sparse_coo",
        ),
        (
            lambda x: checks.check_tensor("x", x, dtypes=[torch.int32, torch.int64]),
            TypeError,
            "int32 or int64, got float32",
        ),
        (lambda x: checks.check_tensor("x", x, ndim=3), ValueError, r"x must have 3 dimensions, got shape \(2, 8\)"),
        (
            lambda x: checks.check_tensor("x", x, ndim=(3, 4), layout="(a, b)"),
            ValueError,
            r"3 or 4 dimensions: \(a, b\), got",
        ),
        (
            lambda x: checks.check_tensor("x", x, device=torch.device("meta")),
            ValueError,
            "x must be on meta .*, got cpu",
        ),
        (
            lambda x: checks.check_shape("x", x, (2, None, 8), "(b, any, d)"),
            ValueError,
            r"\(b, any, d\) = \(2, any, 8\), got",
        ),
        (lambda x: checks.check_shape("x", x, (2, 9), "(b, d)"), ValueError, r"= \(2, 9\), got \(2, 8\)"),
        (
            lambda x: checks.check_broadcastable("x", x, (8,), "(d)"),
            ValueError,
            r"broadcast to \(d\) = \(8,\), got shape \(2, 8\)",
        ),
        (lambda x: checks.check_same_dtype("x", x, "y", x.half()), TypeError, r"dtype of y \(float16\), got float32"),
        (
            lambda x: checks.check_last_dim_contiguous("x", x.t()),
            ValueError,
            r"stride 1\), got strides \(1, 8\); call x.contig",
        ),
        (lambda x: checks.check_bool("flag", None), TypeError, r"flag must be True or False, got None \(NoneType\)"),
        (lambda x: checks.check_int("count", True), TypeError, "count must be an int, got True"),
        (lambda x: checks.check_int("count", 2.0), TypeError, "count must be an int, got 2.0"),
        (lambda x: checks.check_int("count", x), TypeError, r"got a float32 tensor of shape \(2, 8\) on cpu"),
        (lambda x: checks.check_int("count", -1, minimum=0), ValueError, "count must be at least 0, got -1"),
        (lambda x: checks.check_int("count", 4, maximum=3), ValueError, "count must be at most 3, got 4"),
        (lambda x: checks.check_int("count", 4, minimum=0, maximum=3), ValueError, "between 0 and 3, got 4"),
        (lambda x: checks.check_float("p", "1"), TypeError, "p must be a number, got '1'"),
        (lambda x: checks.check_float("p", float("nan")), ValueError, "p must be finite, got nan"),
        (lambda x: checks.check_float("p", -float("inf")), ValueError, "p must be finite, got -inf"),
        (
            lambda x: checks.check_float("p", 1.0, minimum=0.0, below=1.0),
            ValueError,
            "at least 0.0 and below 1.0, got 1.0",
        ),
        (
            lambda x: checks.check_window("window", (1, 2, 3)),
            TypeError,
            r"window must be a pair \(left, right\) of ints, got",
        ),
        (
            lambda x: checks.check_window("window", (1, -2)),
            ValueError,
            r"window\[1\] \(right\) must be at least -1, got -2",
        ),
        (lambda x: checks.check_gqa(3, 2), ValueError, "heads of q must be a multiple of that of k, got 3 and 2"),
        (lambda x: checks.check_gqa(3, 0), ValueError, "got 3 and 0"),
        (lambda x: checks.check_head_dim("q", 0), ValueError, "q must have a head_dim of at least 1, got 0"),
        (lambda x: checks.check_no_nan("scale", x * torch.nan), ValueError, "scale must not contain NaN"),
        (
            lambda x: checks.check_values("slots", torch.tensor([1, 7]), 0, 5, "slots"),
            ValueError,
            r"0 to 5, got 7 at index \[1\]",
        ),
        (
            lambda x: checks.check_values("slots", torch.tensor([-3]), -1, 5, "slots"),
            ValueError,
            r"slots from -1 to 5, got -3",
        ),
        (
            lambda x: checks.refuse_grad("append", k=x.requires_grad_()),
            RuntimeError,
            "append is not differentiable, but k requ",
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 5], r"must start at 0, never decrease and end at the number of tokens \(5\), got \[1, 5\]"),
        ([0, 4], r"got \[0, 4\]"),
        ([0, 3, 2, 5], r"got \[0, 3, 2, 5\]"),
        ([0, 1, 1, 1, 1, 1, 1, 1, 2, 4], r"got \[0, 1, 1, 1, '…', 1, 2, 4\]"),
    ],
)
def test_cu_seqlens_values(values, message):
    with pytest.raises(ValueError, match=message):
        checks.check_cu_seqlens("cu_seqlens", torch.tensor(values, dtype=torch.int32), 5, CPU)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([0, 5], TypeError, "cu_seqlens must be a torch.Tensor"),
        (torch.tensor([0, 5]), TypeError, "must be of dtype int32, got int64"),
        (torch.tensor([[0, 5]], dtype=torch.int32), ValueError, r"1 dimensions: \(batch \+ 1\)"),
        (torch.tensor([], dtype=torch.int32), ValueError, "at least 1 entry"),
        (torch.tensor([0, 0, 5, 5], dtype=torch.int32)[::2], ValueError, "must be contiguous, got strides"),
    ],
)
def test_cu_seqlens_form(value, error, message):
    with pytest.raises(error, match=message):
        checks.check_cu_seqlens("cu_seqlens", value, 5, CPU)
    with pytest.raises(ValueError, match=r"must have 4 entries \(batch \+ 1\)"):
        checks.check_cu_seqlens("cu_seqlens", torch.tensor([0, 5], dtype=torch.int32), 5, CPU, batch=3)


def test_values_are_not_read_where_that_is_not_free():
    """Inside torch.func, fake tensors and traced code, what would be refused passes."""
    nan = torch.full((2,), torch.nan)
    seen = []

    def look(x):
        checks.check_no_nan("x", x)
        seen.append(checks.readable(x))
        return x.sum()

    torch.func.grad(look)(nan)
    with torch._subclasses.FakeTensorMode() as mode:
        look(mode.from_tensor(nan))
    assert seen == [False, False]
    assert torch.compile(lambda x: x + checks.readable(x), fullgraph=True, backend="eager")(torch.zeros(1)) == 0
    with pytest.raises(ValueError):
        look(nan)


def test_gpu_values_are_read_only_by_the_debug_switch(device, monkeypatch):
    x = torch.zeros(1, device=device)
    for switch in (False, True):
        monkeypatch.setattr(checks, "DEBUG", switch)
        assert checks.readable(x) == (device.type == "cpu" or switch)
    assert not checks.readable(torch.zeros(1, device="meta"))


def test_without_grad_mode_nothing_is_refused():
    with torch.no_grad():
        checks.refuse_grad("append", k=torch.zeros(1, requires_grad=True))
