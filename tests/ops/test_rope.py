"""rope and rope_tables as people call them: every backend, autograd, transforms, compilation, in place, and what bad input gets."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import pytransformer
from pytransformer import reference, rope, rope_tables, use_backend
from pytransformer.verification import SEEDS, Contract
from tests.ops.rope_cases import (
    ALL_BACKENDS,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    LAYOUTS,
    WHERE,
    draw,
    place,
    results,
    tables,
)
from tests.support.dispatch import SeenOps, refuse_dispatch

# --- the contract -----------------------------------------------------------------------------------------------------------------------


@ALL_BACKENDS
@pytest.mark.parametrize("where", WHERE)
def test_contract(where: str, backend: str, device: torch.device) -> None:
    tokens, options = WHERE[where]
    dtype = BFLOAT16 if "packed" in where else FLOAT32
    contract = Contract(dtype)
    cpu = torch.device("cpu")
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        tensors = draw(device, dtype, tokens)
        # Both layouts, a part of the features rotated: 8 of 12.
        common = {"interleaved": seed % 2 == 1}
        actual = results(rope, tensors, dtype, device, backend=backend, **common, **place(options, device))
        plain = results(reference.rope, tensors, dtype, cpu, **common, **options)
        golden = results(reference.rope, tensors, torch.float64, cpu, **common, **options)
        for values, kind in zip(zip(actual, plain, golden), ("output", "gradient")):
            contract.add_all(*values, kind=kind)
    contract.check()


@ALL_BACKENDS
@LAYOUTS
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_in_place_has_the_same_bits(dtype: torch.dtype, interleaved: bool, backend: str, device: torch.device) -> None:
    q, k = (tensor.detach() for tensor in draw(device, dtype))
    holder = torch.full((2, 6, 5, 20), 7.0, device=device, dtype=dtype)
    inner_q, inner_k = holder[:, :, :3, :12], holder[:, :, 4:, 8:]
    inner_q.copy_(q)
    inner_k.copy_(k)
    options = {"offsets": 3, "interleaved": interleaved, "backend": backend}
    rotated = rope(q, k, *tables(device), **options)
    inside = rope(inner_q, inner_k, *tables(device), inplace=True, **options)
    assert inside[0] is inner_q and inside[1] is inner_k
    assert all(torch.equal(a, b) for a, b in zip(inside, rotated))
    inner_q.fill_(7.0)
    inner_k.fill_(7.0)
    assert bool((holder == 7.0).all()), "cells outside of q and k were written"


@ALL_BACKENDS
@LAYOUTS
def test_rotating_back_restores(interleaved: bool, backend: str, device: torch.device) -> None:
    q, _ = draw(device)
    rotated, none = rope(q, None, *tables(device), interleaved=interleaved, backend=backend)
    assert none is None and rotated.is_contiguous() and not torch.allclose(rotated[:, 1:], q[:, 1:])
    # The gradient of the rotation is its inverse.
    (restored,) = torch.autograd.grad(rotated, q, rotated.detach())
    torch.testing.assert_close(restored, q.detach())


@ALL_BACKENDS
def test_features_beyond_rotary_dim_pass_unchanged(backend: str, device: torch.device) -> None:
    q, k = draw(device, BFLOAT16)
    for rotated, given in zip(rope(q, k, *tables(device), backend=backend), (q, k)):
        assert torch.equal(rotated[..., 8:], given[..., 8:])
        assert torch.equal(rotated[:, 0], given[:, 0]), "position 0 is the identity"


# --- autograd ---------------------------------------------------------------------------------------------------------------------------


@ALL_BACKENDS
def test_second_derivatives(backend: str, device: torch.device) -> None:
    outcomes = []
    q, k = draw(device)
    for chosen in (backend, "reference"):
        rotated = rope(q, k, *tables(device), backend=chosen)
        first = torch.autograd.grad(sum((out**3).sum() for out in rotated), (q, k), create_graph=True)
        outcomes.append((*first, *torch.autograd.grad(sum(out.square().sum() for out in first), (q, k))))
    for ours, theirs in zip(*outcomes):
        torch.testing.assert_close(ours, theirs)


@ALL_BACKENDS
def test_in_place_under_grad_computes_out_of_place(backend: str, device: torch.device) -> None:
    q, k = draw(device)
    k = k.detach()
    before = q.detach().clone(), k.clone()
    rotated = rope(q, k, *tables(device), inplace=True, backend=backend)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
    rotated[0].sum().backward()
    assert q.grad is not None and bool(q.grad.any())
    with torch.no_grad():
        assert rope(q, k, *tables(device), inplace=True, backend=backend)[0] is q
    torch.testing.assert_close(q.detach(), rotated[0].detach())


@ALL_BACKENDS
def test_gradient_of_one_of_the_outputs(backend: str, device: torch.device) -> None:
    q, k = draw(device)
    rotated = rope(q, k, *tables(device), backend=backend)
    expected = reference.rope(q, k, *tables(device))
    for ours, theirs, given in zip(rotated, expected, (q, k)):
        (gradient,) = torch.autograd.grad(ours.sin().sum(), given, retain_graph=True)
        torch.testing.assert_close(gradient, torch.autograd.grad(theirs.sin().sum(), given, retain_graph=True)[0])
    # An expanded gradient, as a plain sum gives it.
    torch.testing.assert_close(*(torch.autograd.grad(out[1].sum(), k)[0] for out in (rotated, expected)))


@ALL_BACKENDS
@pytest.mark.parametrize("inplace", [False, True])
def test_functorch(inplace: bool, backend: str, device: torch.device) -> None:
    q, k = draw(device)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        rotated = rope(q, k, *tables(device), inplace=inplace, backend=backend)
        return sum(out.sin().sum() for out in rotated)

    expected = torch.autograd.grad(loss(q, k), (q, k))
    for ours, theirs in zip(torch.func.grad(loss, argnums=(0, 1))(q.detach(), k.detach()), expected):
        torch.testing.assert_close(ours, theirs)
    stacked = torch.stack([q.detach(), 2 * q.detach()])
    mapped = torch.func.vmap(lambda one: rope(one, None, *tables(device), backend=backend)[0])(stacked)
    torch.testing.assert_close(mapped[1], rope(stacked[1], None, *tables(device), backend=backend)[0])


@ALL_BACKENDS
def test_forward_mode(backend: str, device: torch.device) -> None:
    q, _ = (tensor.detach() for tensor in draw(device))
    tangent = torch.randn_like(q)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, tangent)
        if backend == "triton":
            with pytest.raises(NotImplementedError, match="jvp"):
                rope(dual, None, *tables(device), backend=backend)
            return
        rotated, _ = rope(dual, None, *tables(device), backend=backend)
        expected, _ = rope(tangent, None, *tables(device), backend=backend)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(rotated).tangent, expected)


# --- registration, compilation, modes ---------------------------------------------------------------------------------------------------


def test_opcheck(device: torch.device) -> None:
    q, k = (tensor.detach() for tensor in draw(device))
    cos, sin = tables(device)
    op, op_ = torch.ops.pytransformer.rope, torch.ops.pytransformer.rope_
    torch.library.opcheck(op, (q, k, cos, sin, None, None, None, False, False, 3, "triton"))
    torch.library.opcheck(
        op, (q[:, ::2], None, cos, sin, torch.arange(3, device=device), None, None, True, True, 0, "triton")
    )
    torch.library.opcheck(
        op_, (q, k, cos, sin, None, torch.tensor([1, 2], device=device), None, False, False, 0, "triton")
    )
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
    torch.library.opcheck(op_, (q[0], None, cos, sin, None, None, bounds, True, False, 0, "triton"))


def test_fake_tensors_are_like_the_real_ones(device: torch.device) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k = (tensor.detach().transpose(0, 1).contiguous().transpose(0, 1) for tensor in draw(device, BFLOAT16))
    real = rope(q, k, *tables(device), backend="triton")
    with FakeTensorMode() as mode:
        fake = rope(*(mode.from_tensor(tensor) for tensor in (q, k, *tables(device))), backend="triton")
    for one, other in zip(real, fake):
        assert (one.shape, one.dtype, one.stride(), one.device) == (
            other.shape,
            other.dtype,
            other.stride(),
            other.device,
        )


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_whole_with_dynamic_shapes(backend: str, device: torch.device) -> None:
    def block(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, offsets: int) -> Tensor:
        q, k = rope(2 * q, k, cos, sin, offsets=offsets, backend=backend)
        return q * k

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen, offset in ((6, 3), (9, 7)):
        q, k = draw(device, tokens=(2, seqlen))
        expected, actual = (function(q, k, *tables(device), offset) for function in (block, compiled))
        torch.testing.assert_close(actual, expected)
        for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), (q, k)) for out in (actual, expected))):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_in_place_and_packed_compile_whole(backend: str, device: torch.device) -> None:
    def step(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, offsets: Tensor) -> Tensor:
        q, _ = rope(q, k, cos, sin, cu_seqlens=cu_seqlens, offsets=offsets, inplace=True, backend=backend)
        return q + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    bounds, offsets = torch.tensor([0, 5, 6], dtype=torch.int32, device=device), torch.tensor([3, 1], device=device)
    with torch.no_grad():
        given = [tensor.detach() for tensor in draw(device, tokens=(6,))]
        copies = [tensor.clone() for tensor in given]
        expected, actual = (
            step(*given, *tables(device), bounds, offsets),
            compiled(*copies, *tables(device), bounds, offsets),
        )
    torch.testing.assert_close(actual, expected)
    for compiled_tensor, eager_tensor in zip(copies, given):
        torch.testing.assert_close(compiled_tensor, eager_tensor)


@ALL_BACKENDS
def test_exports(backend: str, device: torch.device) -> None:
    class Rotation(torch.nn.Module):
        def forward(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return rope(q, None, cos, sin, offsets=2, backend=backend)[0]

    arguments = draw(device)[0].detach(), *tables(device)
    program = torch.export.export(Rotation(), arguments)
    torch.testing.assert_close(program.module()(*arguments), Rotation()(*arguments))


def test_modes_see_registered_ops(device: torch.device) -> None:
    q, k = draw(device)
    expected = rope(q, k, *tables(device), backend="triton")
    with SeenOps() as seen:
        again = rope(q, k, *tables(device), backend="triton")
        torch.autograd.grad(again[0].sum(), q)
        with torch.no_grad():
            inside = rope(q, k, *tables(device), inplace=True, backend="triton")
    assert seen.names.count("pytransformer.rope.default") == 2 and "pytransformer.rope_.default" in seen.names
    for one, two, three in zip(expected, again, inside):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_plain_tensors_skip_the_dispatcher(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = draw(device)
    refuse_dispatch(monkeypatch)
    torch.autograd.grad(rope(q, k, *tables(device), backend="triton")[0].sum(), q)
    with torch.no_grad():
        for inplace in (False, True):
            rope(q, k, *tables(device), inplace=inplace, backend="triton")


@ALL_BACKENDS
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16])
def test_autocast_does_not_change_the_dtype(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    q, k = draw(device, dtype)
    expected = rope(q, k, *tables(device), backend=backend)
    with torch.autocast(device.type, BFLOAT16):
        actual = rope(q, k, *tables(device), backend=backend)
        (gradient,) = torch.autograd.grad(actual[0].sum(), q)
    assert torch.equal(gradient, torch.autograd.grad(expected[0].sum(), q)[0])
    assert all(a.dtype == dtype and torch.equal(a, b) for a, b in zip(actual, expected))


@ALL_BACKENDS
@pytest.mark.parametrize("tokens", [(0, 5), (2, 0), (0,)])
def test_nothing_to_rotate(tokens: tuple[int, ...], backend: str, device: torch.device) -> None:
    q, k = draw(device, tokens=tokens)
    rotated = rope(q, k, *tables(device), backend=backend)
    assert rotated[0].shape == q.shape and rotated[1].shape == k.shape
    rotated[0].sum().backward()
    assert q.grad.shape == q.shape


def test_choice(device: torch.device) -> None:
    q, k = (tensor.detach() for tensor in draw(device))
    cos, sin = tables(device)
    with use_backend("reference"):
        assert torch.equal(rope(q, k, cos, sin)[0], reference.rope(q, k, cos, sin)[0])
    default = "triton" if device.type == "cuda" else "torch"
    assert torch.equal(rope(q, k, cos, sin)[0], rope(q, k, cos, sin, backend=default)[0])
    with pytest.raises(NotImplementedError, match="rope: backend 'triton' cannot serve this call: float64"):
        rope(q.double(), None, cos, sin, backend="triton")
    assert rope(q.double(), None, cos.double(), sin.double())[0].dtype == torch.float64
    assert pytransformer.rope is rope


# --- tables -----------------------------------------------------------------------------------------------------------------------------

SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 8},
    "longrope": {
        **{"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        **{"factor": 4.0, "original_max_position_embeddings": 8},
    },
}


@pytest.mark.parametrize("scaling", [None, *SCALINGS])
def test_tables(scaling: str | None, device: torch.device) -> None:
    made = rope_tables(8, 20, base=500.0, scaling=SCALINGS.get(scaling), device=device)
    expected = reference.rope_tables(8, 20, base=500.0, scaling=SCALINGS.get(scaling))
    for ours, theirs in zip(made, expected):
        assert ours.shape == (20, 4) and ours.dtype == FLOAT32 and ours.device.type == device.type
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "rotary_dim must be an int, got 8.0 (float)", {"rotary_dim": 8.0}),
        (ValueError, "rotary_dim must be at least 2, got 0", {"rotary_dim": 0}),
        (ValueError, "rotary_dim must be even (features rotate in pairs), got 7", {"rotary_dim": 7}),
        (TypeError, "length must be an int, got None (NoneType)", {"length": None}),
        (ValueError, "length must be at least 0, got -1", {"length": -1}),
        (ValueError, "base must be greater than 0, got 0", {"base": 0}),
        (ValueError, "base must be finite, got nan", {"base": float("nan")}),
        (TypeError, "scaling must be a mapping or None, got 'yarn' (str)", {"scaling": "yarn"}),
        (ValueError, "scaling: rope_type must be one of", {"scaling": {"rope_type": "spiral"}}),
        (ValueError, "scaling: rope_type 'linear' needs the keys ['factor']", {"scaling": {"rope_type": "linear"}}),
        (ValueError, "scaling['factor'] must be greater than 0, got -2", {"scaling": {"rope_type": "linear", "factor": -2}}),
        (TypeError, "scaling['factor'] must be a number, got '2' (str)", {"scaling": {"rope_type": "linear", "factor": "2"}}),
        (
            ValueError,
            "scaling['long_factor'][1] must be greater than 0, got 0.0",
            {"scaling": {**SCALINGS["longrope"], "long_factor": [1.0, 0.0, 1.0, 1.0]}},
        ),
        (
            ValueError,
            "scaling: rope_type 'ntk' needs a rotary_dim of at least 4, got 2",
            {"rotary_dim": 2, "scaling": {"rope_type": "ntk", "factor": 2.0}},
        ),
        (
            ValueError,
            "scaling: low_freq_factor must be below high_freq_factor, got 4.0 and 1.0",
            {"scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
                         "original_max_position_embeddings": 8}},
        ),
    ],
    ids=str,
)  # fmt: skip
def test_bad_tables(error: type[Exception], message: str, arguments: dict[str, object]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        rope_tables(**{"rotary_dim": 8, "length": 16, **arguments})
