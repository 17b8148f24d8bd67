"""Tensors on the meta device, which have a shape and no values: every op gives shapes and dtypes there, gradients too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pytransformer
import pytransformer.nn
from pytransformer.ops import op as hall
from pytransformer.ops import overview  # noqa: F401 (imports every op)

Make = Callable[..., Tensor]


def integers(make: Make, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Of meta tensors nothing but the shape counts; of others 1 everywhere."""
    device = make(1).device
    return torch.empty(*shape, dtype=dtype, device=device) if device.type == "meta" else torch.ones(*shape, dtype=dtype)


def starts(make: Make) -> Tensor:
    return torch.tensor([0, 4, 10], dtype=torch.int32).to(make(1).device)


def caches(make: Make, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return tuple(make(*(shape or (2, 8, 2, 16))).detach().to(dtype) for _ in range(2))  # type: ignore[return-value]


def append_with_everything(make: Make) -> Any:
    new = [make(2, 1, 2, 16).detach() for _ in range(3)]
    options = {"q_norm_weight": make(16).detach(), "k_norm_weight": make(16).detach()}
    tables = {"cos": make(8, 8).detach(), "sin": make(8, 8).detach()}
    return pytransformer.kv_append(
        *new[:2], *caches(make), cache_seqlens=integers(make, 2), q=new[2], **options, **tables
    )


# By the name of the op, calls of tensors that a function makes; those of ops with a gradient have one.
CALLS: dict[str, tuple[Callable[[Make], Any], ...]] = {
    "attention": (
        lambda make: pytransformer.attention(make(2, 5, 4, 16), make(2, 7, 2, 16), make(2, 7, 2, 24), causal=True),
        lambda make: pytransformer.attention(
            make(2, 5, 4, 16), make(2, 7, 2, 16), make(2, 7, 2, 16), bias=make(5, 7), alibi_slopes=make(4), sinks=make(4),
            dropout_p=0.2, dropout_seed=1, softcap=2.0, return_lse=True,
        ),
        lambda make: pytransformer.attention(
            make(10, 4, 16), make(10, 2, 16), make(10, 2, 16), cu_seqlens_q=starts(make), cu_seqlens_k=starts(make), window=(3, 0)
        ),
    ),
    "decode_attention": (
        lambda make: pytransformer.decode_attention(make(2, 1, 4, 16).detach(), *caches(make), integers(make, 2)),
        lambda make: pytransformer.decode_attention(
            make(2, 3, 4, 16).detach(), *caches(make, 5, 8, 2, 16), integers(make, 2) * 4, block_table=integers(make, 2, 3),
            cache_leftpad=integers(make, 2), mask=make(1, 1, 1, 20) > 0, alibi_slopes=make(4).detach(), return_lse=True,
        ),
    ),
    "kv_append": (
        lambda make: pytransformer.kv_append(
            make(2, 1, 2, 16).detach(), make(2, 1, 2, 16).detach(), *caches(make), cache_seqlens=integers(make, 2)
        ),
        append_with_everything,
        lambda make: pytransformer.kv_append(
            make(1, 1, 2, 16).detach(), make(1, 1, 2, 16).detach(), *caches(make, dtype=torch.int8), k_scale=make(2, 8, 2).detach(),
            slot_mapping=integers(make, 1, 1, dtype=torch.int64), v_scale=make(2, 8, 2).detach(), backend="reference",
        ),
    ),
    "rope": (
        lambda make: pytransformer.rope(make(2, 5, 4, 16), make(2, 5, 2, 16), make(8, 8).detach(), make(8, 8).detach()),
        lambda make: pytransformer.rope(
            make(10, 4, 32), None, make(9, 8).detach(), make(9, 8).detach(), cu_seqlens=starts(make), offsets=integers(make, 2)
        ),
        lambda make: pytransformer.rope(make(2, 5, 4, 16).detach(), None, make(8, 8).detach(), make(8, 8).detach(), inplace=True),
    ),
    "layer_norm": (
        lambda make: pytransformer.layer_norm(make(2, 16), make(16), make(16)),
        lambda make: pytransformer.layer_norm(make(2, 16), residual=make(2, 16)),
    ),
    "rms_norm": (
        lambda make: pytransformer.rms_norm(make(2, 16), make(16)),
        lambda make: pytransformer.rms_norm(make(2, 16), make(16), residual=make(2, 16), weight_offset=1.0),
    ),
    "swiglu": (lambda make: pytransformer.swiglu(make(2, 16)),),
    "geglu": (lambda make: pytransformer.geglu(make(2, 16), make(2, 16), approximate="tanh"),),
    "gelu": (lambda make: pytransformer.gelu(make(2, 16)),),
    "linear_cross_entropy": tuple(
        lambda make, reduction=reduction: pytransformer.linear_cross_entropy(
            make(4, 16), make(9, 16), integers(make, 4, dtype=torch.int64), bias=make(9), reduction=reduction
        )
        for reduction in ("mean", "sum", "none")
    ),
    "grouped_linear": (
        lambda make: pytransformer.grouped_linear(make(10, 16), make(2, 24, 16), starts(make), bias=make(2, 24)),
        lambda make: pytransformer.grouped_linear(make(10, 16), make(2, 24, 16), starts(make)),
    ),
    "quantized_linear": (
        lambda make: pytransformer.quantized_linear(
            make(3, 4, 64), integers(make, 24, 64, dtype=torch.int8), make(24).detach(), bias=make(24)
        ),
        lambda make: pytransformer.quantized_linear(
            make(12, 64), integers(make, 24, 32, dtype=torch.uint8), make(24, 2).detach(),
            zero_point=integers(make, 24, 2, dtype=torch.uint8),
        ),
    ),
    "linear_attention": (
        lambda make: pytransformer.linear_attention(
            make(2, 5, 4, 16), make(2, 5, 2, 16), make(2, 5, 2, 16), causal=True, decay=make(2), return_state=True
        ),
    ),
}  # fmt: skip
NAMED = [pytest.param(call, id=f"{name}-{index}") for name, calls in CALLS.items() for index, call in enumerate(calls)]


def test_every_op_is_here() -> None:
    assert {op.name for op in hall._EVERY} == set(CALLS)


def tensors_of(found: Any) -> list[Tensor]:
    return [each for each in torch.utils._pytree.tree_leaves(found) if isinstance(each, Tensor)]


@pytest.mark.parametrize("call", NAMED)
def test_shapes_and_gradients_without_values(call: Callable[[Make], Any]) -> None:
    """As of real tensors on a CPU: outputs, their dtypes, and which inputs have gradients."""
    seen: dict[str, Any] = {}
    for device in ("cpu", "meta"):
        made: list[Tensor] = []

        def make(*shape: int, device: str = device, made: list[Tensor] = made) -> Tensor:
            made.append(torch.full(shape, 0.25, device=device).requires_grad_())
            return made[-1]

        outputs = tensors_of(call(make))
        differentiable = [output for output in outputs if output.requires_grad]
        if differentiable:
            sum(output.double().sum() for output in differentiable).backward()
        gradients = [None if leaf.grad is None else (leaf.grad.shape, leaf.grad.dtype) for leaf in made]
        seen[device] = [(output.shape, output.dtype) for output in outputs], gradients
    assert seen["meta"] == seen["cpu"]


def test_a_call_on_the_meta_device_is_not_kept_for_others(device: torch.device) -> None:
    """Real tensors of the same sizes get values afterwards, and meta tensors after them none."""
    for where in ("meta", device, "meta"):
        x = torch.full((2, 16), 3.0, device=where)
        lengths = torch.ones(2, dtype=torch.int32, device=where)
        q, cache = torch.ones(2, 1, 2, 16, device=where), torch.ones(2, 8, 2, 16, device=where)
        normed, decoded = pytransformer.rms_norm(x), pytransformer.decode_attention(q, cache, cache, lengths)
        assert normed.device == decoded.device == x.device
        if where != "meta":
            torch.testing.assert_close(normed, torch.ones_like(x))
            torch.testing.assert_close(decoded, q)


def test_a_model_on_the_meta_device() -> None:
    """Its logits, and its loss with gradients."""
    with torch.device("meta"):
        config = pytransformer.TransformerConfig.llama(
            vocab_size=32, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, max_seqlen=8
        )
        model = pytransformer.Transformer(config)
    ids = torch.empty(1, 4, dtype=torch.int64, device="meta")
    logits = model(ids)
    assert logits.is_meta and logits.shape == (1, 4, 32)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "module", [torch.nn.LayerNorm(16), torch.nn.RMSNorm(16), torch.nn.MultiheadAttention(16, 2)], ids=repr
)
def test_a_patched_module_on_the_meta_device(module: torch.nn.Module) -> None:
    module.to("meta")
    pytransformer.nn.patch(module)
    x = torch.empty(2, 3, 16, device="meta")
    for need_weights in (True, False):
        out = (
            module(x, x, x, need_weights=need_weights)[0]
            if isinstance(module, torch.nn.MultiheadAttention)
            else module(x)
        )
        assert out.is_meta and out.shape == x.shape
