"""What layer_norm and rms_norm refuse, and in which words."""

from __future__ import annotations

import re

import pytest
import torch

from pytransformer import layer_norm, rms_norm
from tests.ops.norm_cases import (
    ALL_BACKENDS,
    ALL_KERNELS,
    ALL_OPS,
    EMULATED,
    OPS,
    draw,
    run,
)

# In the emulator's process (`make sanitize` runs this file there) these tests are about the extension alone.


# The extension's own checks come first where it is called at once, and must leave the words to the op.
ON_REQUEST = "cuda" if EMULATED else None
X = torch.ones(2, 3, 8)
W = torch.ones(8)
BAD_INPUT = [
    (TypeError, "x must be a torch.Tensor, got [1.0, 2.0] (list)", {"x": [1.0, 2.0]}),
    (
        TypeError,
        "x must be of dtype float32 or float16 or bfloat16 or float64, got int64",
        {"x": torch.ones(2, 8).long()},
    ),
    (TypeError, "x must be a dense (strided) tensor, got layout torch.sparse_coo", {"x": torch.ones(2, 8).to_sparse()}),
    (ValueError, "x must have at least 1 dimension: (..., width), got shape ()", {"x": torch.tensor(1.0)}),
    (TypeError, "weight must be a torch.Tensor, got 1.0 (float)", {"weight": 1.0}),
    (TypeError, "weight must be of dtype float32 or float16 or bfloat16 or float64, got int32", {"weight": W.int()}),
    (ValueError, "weight must have 1 dimensions: (width), got shape (1, 8)", {"weight": W[None]}),
    (ValueError, "weight must have shape (width,), the last dimension of x, = (8), got (7,)", {"weight": W[1:]}),
    (ValueError, "weight must be on cpu like the other tensors, got meta", {"weight": W.to("meta")}),
    (TypeError, "residual must be a torch.Tensor, got True (bool)", {"residual": True}),
    (
        TypeError,
        "residual must be of dtype float32 or float16 or bfloat16 or float64, got bool",
        {"residual": X.bool()},
    ),
    (ValueError, "residual must have shape of x = (2, 3, 8), got (3, 8)", {"residual": X[0]}),
    (ValueError, "residual must be on cpu like the other tensors, got meta", {"residual": X.to("meta")}),
    (TypeError, "eps must be a number, got '1e-5' (str)", {"eps": "1e-5"}),
    (ValueError, "eps must be at least 0.0, got -1e-05", {"eps": -1e-5}),
    (ValueError, "eps must be finite, got nan", {"eps": float("nan")}),
    (
        ValueError,
        "backend must be one of 'cuda', 'triton', 'torch', 'reference', got 'trition'",
        {"backend": "trition"},
    ),
]


@ALL_OPS
@pytest.mark.parametrize(
    ("error", "message", "arguments"), BAD_INPUT, ids=[message[:40] for _, message, _ in BAD_INPUT]
)
def test_bad_input(op: str, error: type[Exception], message: str, arguments: dict[str, object]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        OPS[op][0](**{"x": X, "backend": ON_REQUEST, **arguments})


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "bias must be of dtype float32 or float16 or bfloat16 or float64, got int64", {"bias": W.long()}),
        (
            ValueError,
            "bias must have shape (width,), the last dimension of x, = (8), got (9,)",
            {"bias": torch.ones(9)},
        ),
    ],
)
def test_bad_bias(error: type[Exception], message: str, arguments: dict[str, object]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        layer_norm(X, **arguments, backend=ON_REQUEST)


@pytest.mark.parametrize(
    ("error", "message", "value"),
    [
        (TypeError, "weight_offset must be a number, got None (NoneType)", None),
        (ValueError, "weight_offset must be finite, got inf", float("inf")),
    ],
)
def test_bad_weight_offset(error: type[Exception], message: str, value: object) -> None:
    with pytest.raises(error, match=re.escape(message)):
        rms_norm(X, W, weight_offset=value, backend=ON_REQUEST)


@ALL_BACKENDS
@pytest.mark.parametrize("used", [0, 1], ids=["y alone", "s alone"])
def test_one_of_two_outputs_may_go_unused(used: int, backend: str, device: torch.device) -> None:
    """Autograd brings no gradient for the other one, and none of zeros is made."""
    x, residual = (torch.randn(3, 16, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(16, device=device, requires_grad=True)
    wanted, results = (x, residual, weight), []
    for name in (backend, "reference"):
        output = rms_norm(x, weight, residual=residual, backend=name)[used]
        results.append(torch.autograd.grad(output.sin().sum(), wanted, materialize_grads=True))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)


@ALL_OPS
@ALL_KERNELS
def test_weights_with_a_stride(op: str, backend: str, device: torch.device) -> None:
    tensors = draw(op, device, residual=None)
    strided = {
        name: torch.stack((tensor.detach(), torch.full_like(tensor, 7.0)), dim=-1)[..., 0].requires_grad_()
        if name in ("weight", "bias")
        else tensor.detach().requires_grad_()
        for name, tensor in tensors.items()
    }
    assert not strided["weight"].is_contiguous()
    (expected,), (y,) = run(OPS[op][0], tensors, backend=backend), run(OPS[op][0], strided, backend=backend)
    assert torch.equal(y, expected)
    for found, wanted in zip(
        *(torch.autograd.grad(out.sum(), [*of.values()]) for out, of in ((y, strided), (expected, tensors)))
    ):
        assert torch.equal(found, wanted)


@pytest.mark.skipif(EMULATED, reason="the extension's ops check each call themselves")
def test_a_call_like_one_that_was_checked_is_checked_where_it_differs(device: torch.device) -> None:
    """Calls checked once go straight to the launch that was kept for them, with Triton."""
    backend = "triton"
    x, weight = torch.randn(3, 8, device=device), torch.randn(8, device=device)
    for _ in range(3):
        y = rms_norm(x, weight, eps=1.0, weight_offset=1.0, backend=backend)
    assert torch.equal(y, rms_norm(x.clone(), weight.clone(), eps=1.0, weight_offset=1.0, backend=backend))
    unlike: list[tuple[type[Exception], tuple[object, ...], dict[str, object]]] = [
        (TypeError, (x, weight), {"eps": True, "weight_offset": 1.0}),
        (TypeError, (x, weight), {"eps": 1.0, "weight_offset": True}),
        (ValueError, (x, weight[:7]), {"eps": 1.0, "weight_offset": 1.0}),
        (ValueError, (x, weight.view(1, 8)), {"eps": 1.0, "weight_offset": 1.0}),
        (ValueError, (x, weight), {"eps": -1.0, "weight_offset": 1.0}),
        (ValueError, (x, weight.to("meta")), {"eps": 1.0, "weight_offset": 1.0}),
        (TypeError, (x, weight.long()), {"eps": 1.0, "weight_offset": 1.0}),
        (TypeError, (x, [1.0] * 8), {"eps": 1.0, "weight_offset": 1.0}),
        (ValueError, (x, weight), {"eps": 1.0, "weight_offset": 1.0, "residual": x[:2]}),
    ]
    for error, arguments, options in unlike:
        with pytest.raises(error):
            rms_norm(*arguments, **options, backend=backend)  # type: ignore[call-overload]
    # The same shape with other strides, and a gradient, are other calls too.
    transposed = x.t().contiguous().t()
    assert torch.equal(rms_norm(transposed, weight, eps=1.0, weight_offset=1.0, backend=backend), y)
    with_gradient = x.clone().requires_grad_()
    out = rms_norm(with_gradient, weight, eps=1.0, weight_offset=1.0, backend=backend)
    assert out.requires_grad and torch.equal(out.detach(), y)
