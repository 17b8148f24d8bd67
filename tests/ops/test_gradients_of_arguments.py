"""Every tensor argument of every op: on each backend that serves the call it has the gradient of the float64 reference, or on each it is
refused; never is it left out in silence on one of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import pytransformer
from pytransformer import reference
from pytransformer.ops import op as hall
from pytransformer.ops import overview  # noqa: F401 (imports every op)
from tests.ops.attention_cases import packed_qkv, qkv

BACKENDS = ("reference", "torch", "triton")


def tables() -> dict[str, Tensor]:
    cos, sin = pytransformer.rope_tables(16, 8)
    return {"cos": cos, "sin": sin}


def norm_inputs(*more: str) -> dict[str, Tensor]:
    shapes = {"x": (4, 16), "weight": (16,), "bias": (16,), "residual": (4, 16)}
    return {name: torch.randn(shapes[name]) for name in ("x", "weight", *more)}


def cache(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    caches = {name: torch.randn(2, 8, 2, 16).to(dtype) for name in ("k_cache", "v_cache")}
    if dtype != torch.float32:
        caches |= {name: torch.rand(2) for name in ("k_scale", "v_scale")}
    return caches


LENGTHS = torch.tensor([3, 5], dtype=torch.int32)
TARGETS = torch.tensor([1, 2, 0, 4])


@dataclass(frozen=True)
class Call:
    """A call of an op by tensors and other arguments of these names; ``refused``: tensors for which it has no gradient anywhere."""

    op: str
    inputs: Callable[[], dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()

    def __call__(self, tensors: dict[str, Tensor], backend: str | None) -> Tensor:
        """The sum of what it returns, each output weighed."""
        tensors, options = dict(tensors), dict(self.options)
        if "S" in tensors:
            options["initial_state"] = tensors.pop("S"), tensors.pop("z")
        where: Any = reference if backend is None else pytransformer
        if backend is not None:
            options["backend"] = backend
        found = getattr(where, self.op)(**tensors, **options)
        outputs, _ = torch.utils._pytree.tree_flatten(found)
        outputs = [output for output in outputs if output is not None]
        return torch.stack([(output.double() ** 2).sum() for output in outputs]).sum()


APPEND = ("k", "v", "k_cache", "v_cache", "q", "q_norm_weight", "k_norm_weight", "cos", "sin", "k_scale", "v_scale")
DECODE = ("q", "k_cache", "v_cache", "bias", "alibi_slopes", "sinks", "k_scale", "v_scale")


def appended(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    new = {name: torch.randn(2, 1, 2, 16) for name in "kvq"}
    return {**new, **cache(dtype), **tables(), "q_norm_weight": torch.randn(16), "k_norm_weight": torch.randn(16)}


def decoded(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    terms = {"bias": torch.randn(1, 1, 1, 8), "alibi_slopes": torch.rand(2), "sinks": torch.randn(2)}
    return {"q": torch.randn(2, 1, 2, 16), **cache(dtype), **terms}


CALLS = {
    "attention": Call(
        "attention",
        lambda: {**qkv(2, 5, 6), "bias": torch.randn(1, 2, 5, 6), "alibi_slopes": torch.rand(2), "sinks": torch.randn(2)},
        {"causal": True, "return_lse": True},
    ),
    "attention, slopes of each sequence": Call(
        "attention", lambda: {**qkv(2, 5, 6), "alibi_slopes": torch.rand(2, 2)}, {"window": (3, 2)}
    ),
    "attention, softcap": Call(
        "attention", lambda: {**qkv(2, 5, 6), "alibi_slopes": torch.rand(2), "bias": torch.randn(6)}, {"softcap": 2.0}
    ),
    "attention, packed": Call(
        "attention", lambda: {**packed_qkv([5, 0, 3], [4, 2, 6]), "alibi_slopes": torch.rand(2)}, {"causal": True}
    ),
    "attention, packed, slopes of each sequence": Call(
        "attention", lambda: {**packed_qkv([5, 0, 3], [4, 2, 6]), "alibi_slopes": torch.rand(3, 2)}
    ),
    "attention, no keys": Call("attention", lambda: {**qkv(2, 5, 0), "alibi_slopes": torch.rand(2)}),
    "decode_attention": Call("decode_attention", decoded, {"cache_seqlens": LENGTHS}, DECODE),
    "decode_attention, int8": Call(
        "decode_attention", lambda: decoded(torch.int8), {"cache_seqlens": LENGTHS}, DECODE
    ),
    "kv_append": Call("kv_append", appended, {"cache_seqlens": LENGTHS}, APPEND),
    "kv_append, int8": Call("kv_append", lambda: appended(torch.int8), {"cache_seqlens": LENGTHS}, APPEND),
    "rope": Call("rope", lambda: {"q": torch.randn(1, 6, 2, 32), "k": torch.randn(1, 6, 1, 32), **tables()}, {}, ("cos", "sin")),
    "rope, in place": Call(
        "rope",
        lambda: {"q": torch.randn(1, 6, 2, 32), "k": torch.randn(1, 6, 1, 32), **tables()},
        {"inplace": True},
        ("cos", "sin"),
    ),
    "layer_norm": Call("layer_norm", lambda: norm_inputs("bias", "residual")),
    "rms_norm": Call("rms_norm", lambda: norm_inputs("residual"), {"weight_offset": 1.0}),
    "swiglu": Call("swiglu", lambda: {"gate": torch.randn(4, 16), "up": torch.randn(4, 16)}),
    "geglu": Call("geglu", lambda: {"gate": torch.randn(4, 32)}),
    "gelu": Call("gelu", lambda: {"x": torch.randn(4, 16)}),
    "linear_cross_entropy": Call(
        "linear_cross_entropy",
        lambda: {"x": torch.randn(4, 16), "weight": torch.randn(9, 16), "bias": torch.randn(9)},
        {"targets": TARGETS, "z_loss": 1e-2},
    ),
    "linear_cross_entropy, none": Call(
        "linear_cross_entropy",
        lambda: {"x": torch.randn(4, 16), "weight": torch.randn(9, 16), "bias": torch.randn(9)},
        {"targets": TARGETS, "reduction": "none"},
    ),
    "grouped_linear": Call(
        "grouped_linear",
        lambda: {"x": torch.randn(6, 16), "weight": torch.randn(3, 8, 16), "bias": torch.randn(3, 8)},
        {"offsets": torch.tensor([0, 2, 2, 6], dtype=torch.int32)},
    ),
    "quantized_linear": Call(
        "quantized_linear",
        lambda: {
            "x": torch.randn(6, 64),
            "weight": torch.randint(256, (8, 32), dtype=torch.uint8),
            "scale": torch.rand(8, 2) / 16,
            "zero_point": torch.randint(16, (8, 2), dtype=torch.uint8),
            "bias": torch.randn(8),
        },
        {},
        ("scale",),
    ),
    "linear_attention": Call(
        "linear_attention",
        lambda: {**qkv(), "decay": torch.rand(2), "S": torch.randn(2, 2, 16, 16), "z": torch.rand(2, 2, 16)},
        {"causal": True, "return_state": True},
    ),
}  # fmt: skip


def arguments() -> list[Any]:
    torch.manual_seed(0)
    found = []
    for name, call in CALLS.items():
        floating = [key for key, tensor in call.inputs().items() if tensor.is_floating_point()]
        found += [pytest.param(name, key, id=f"{name}-{key}") for key in floating]
    return found


def test_every_op_and_each_of_its_tensors_is_here() -> None:
    """By the schemas: a new floating argument must be tried, or be one of those that hold indices and flags."""
    without = {
        "mask", "key_padding_mask", "block_mask", "dropout_seed", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens", "cache_seqlens",
        "block_table", "cache_batch_idx", "cache_leftpad", "slot_mapping", "positions", "sequence_offsets", "targets", "offsets",
    }  # fmt: skip
    named = {"state": "S", "normalizer": "z"}
    for op in hall._EVERY:
        tried = {key for call in CALLS.values() if call.op == op.name for key in call.inputs()}
        tried |= {"gate"} if op.name == "gelu" and "x" in tried else set()
        wanted = {named.get(key, key) for key in op.call._fields[: op.num_tensors]} - without
        if op.name == "rms_norm":
            wanted.discard("bias")
        if op.name in ("gelu", "geglu"):
            wanted.discard("up")
        assert wanted <= tried, (op.name, wanted - tried)


def drawn(name: str, device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {key: tensor.to(device) for key, tensor in CALLS[name].inputs().items()}


@functools.cache
def serves(name: str, backend: str, device: torch.device) -> bool:
    """Whether a backend serves a call at all, nothing of which requires grad."""
    try:
        with torch.no_grad():
            CALLS[name](drawn(name, device), backend)
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize(("name", "argument"), arguments())
def test_a_gradient_on_every_backend_or_a_refusal_on_every_backend(
    name: str, argument: str, device: torch.device
) -> None:
    call, tensors = CALLS[name], drawn(name, device)
    for key, value in call.options.items():
        if isinstance(value, Tensor):
            call.options[key] = value.to(device)
    backends = [backend for backend in BACKENDS if serves(name, backend, device)]
    assert "reference" in backends
    if argument in call.refused:
        for backend in backends:
            wanted = {**tensors, argument: tensors[argument].clone().requires_grad_()}
            before = {key: tensor.detach().clone() for key, tensor in wanted.items()}
            with pytest.raises((RuntimeError, NotImplementedError), match=argument):
                call(wanted, backend)
            assert all(torch.equal(tensor, before[key]) for key, tensor in wanted.items()), (
                "written before it was refused"
            )
            with torch.no_grad():
                call(wanted, backend)
        return
    wide = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    wide[argument] = wide[argument].clone().requires_grad_()
    options = {key: value for key, value in call.options.items() if key != "inplace"}
    golden = torch.autograd.grad(Call(call.op, call.inputs, options)(wide, None), wide[argument])[0]
    for backend in backends:
        leaf = tensors[argument].clone().requires_grad_()
        call({**tensors, argument: leaf}, backend).backward()
        assert leaf.grad is not None, backend
        torch.testing.assert_close(leaf.grad, golden.to(leaf.dtype))


def test_cuda_leaves_slopes_that_train_to_others_and_never_forgets_them() -> None:
    """Its kernels give them no gradient: the call is refused, and so is a backward pass that wants it all the same, as of torch.func."""
    from pytransformer.ops.attention import by_cuda
    from pytransformer.ops.attention.call import AttentionCall
    from pytransformer.ops.attention.gradient import attention_backward

    tensors = {name: tensor.bfloat16() for name, tensor in qkv().items()}
    slopes = torch.rand(2, requires_grad=True)
    call = AttentionCall(**tensors, alibi_slopes=slopes)
    assert "no gradient of alibi_slopes" in (by_cuda.BACKEND.why_not(call) or "")
    with torch.no_grad():
        assert by_cuda.BACKEND.why_not(call) is None
    assert by_cuda.BACKEND.why_not(call._replace(alibi_slopes=slopes.detach())) is None
    out, lse = tensors["q"], torch.zeros(2, 2, 7)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="'cuda' gives no gradient of alibi_slopes"):
        attention_backward(out, None, out, lse, *call, False, True, "cuda")
