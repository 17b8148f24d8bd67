"""Rotary position embedding of q and k, and the tables of cosines and sines it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.ops import checks
from pytransformer.ops.backend import Outputs
from pytransformer.ops.op import Op, requires_grad
from pytransformer.ops.registered import Differentiable, RegisteredOp, like
from pytransformer.ops.rope import by_cuda, by_torch, by_triton
from pytransformer.ops.rope.call import (
    WRITTEN_IN_PLACE,
    RopeCall,
    check_positive,
    check_rope,
    check_rope_in_place,
    check_scaling,
    refusal,
)


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rotates the first rotary_dim features of q and k by position-dependent angles (Su et al. 2021), q and k in one launch.

    Each pair (x1, x2) becomes (x1 · cos - x2 · sin, x2 · cos + x1 · sin), computed in float32 and rounded once. Linear in q and k, so
    differentiable any number of times with respect to them; cos and sin are constants. Keeps its dtype under autocast.

    Args:
        q: (batch, seqlen, num_heads, head_dim), or packed (total, num_heads, head_dim); without ``cu_seqlens`` a packed tensor is one
            sequence. float32, float16 or bfloat16 (or float64); last dimension contiguous.
        k: as q, with num_kv_heads; or None, which is returned as None.
        cos, sin: float32 (length, rotary_dim / 2) from :func:`rope_tables`; rotary_dim ≤ head_dim, the other features pass unchanged.
        positions: int32 or int64, (seqlen) or (batch, seqlen), packed (total); from 0 to length - 1. If None, the position of a token is
            its sequence's offset plus its index in the sequence.
        offsets: position of each sequence's first token, at least 0: an int, or int32 or int64 (batch). Not with ``positions``.
        cu_seqlens: int32 (batch + 1), starts of the packed sequences and the total.
        interleaved: True rotates adjacent pairs (x[2i], x[2i + 1]) as GPT-J and the paper do; False rotates (x[i], x[i + rotary_dim / 2])
            as Llama does.
        inplace: write into q and k and return them; they may be views of one buffer, but may share no element with each other or with
            another argument. Where a gradient is needed (grad mode on and q or k requires it) the result is computed out of place all
            the same.
        backend: "cuda", "triton", "torch" or "reference"; None = the first of them that can serve, unless ``use_backend`` or
            PYTRANSFORMER_BACKEND says otherwise.

    Returns:
        (q, k): new contiguous tensors in the dtype of q, or the inputs.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or strides that do not fit; with ``inplace``, tensors that share memory; positions outside of the
            table. Positions that live on a GPU are not read back: there, those outside are clamped to the table, and
            PYTRANSFORMER_DEBUG=1 makes them raise.
        NotImplementedError: cos or sin requires grad, or the named backend cannot serve this call; the message says why.
    """
    tensor, number = (offsets, 0) if isinstance(offsets, Tensor) else (None, offsets)
    given = (q, k, cos, sin, positions, tensor, cu_seqlens, interleaved, False, number)
    if checks.check_bool("inplace", inplace) and not (torch.is_grad_enabled() and requires_grad((q, k))):
        return _IN_PLACE(given, backend)  # type: ignore[no-any-return]
    return _OUT_OF_PLACE(given, backend)  # type: ignore[no-any-return]


def rope_tables(
    rotary_dim: int,
    length: int,
    *,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of ``position · base^(-2i / rotary_dim)``, times the attention factor of the scaling method.

    Angles are computed in float64 on the host, the same on every device, and only the results are rounded.

    Args:
        rotary_dim: number of features that rotate, positive and even.
        length: number of positions, at least 0. The methods "dynamic" and "longrope" choose frequencies for a context of this length.
        base: positive. ``scaling["rope_theta"]``, where present, takes its place.
        scaling: None, or a mapping as in the ``rope_scaling`` / ``rope_parameters`` of Hugging Face configurations: "rope_type" is
            "default", "linear", "ntk", "dynamic", "yarn", "llama3" or "longrope"; the keys of each are listed at
            :func:`pytransformer.reference.rope_frequencies`.
        device: where the tables are wanted; None = CPU.

    Returns:
        cos, sin: float32 (length, rotary_dim / 2).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, an unknown method, a missing key or a key's value out of range.
    """
    rotary_dim = checks.check_int("rotary_dim", rotary_dim, minimum=2)
    if rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even (features rotate in pairs), got {rotary_dim}")
    length, base = checks.check_int("length", length, minimum=0), check_positive("base", base)
    if scaling is not None:
        check_scaling(scaling, rotary_dim)
    return reference.rope_tables(rotary_dim, length, base=base, scaling=scaling, device=device)


# --- The ops: out of place, linear in q and k; and in place, without a gradient. --------------------------------------------------------


def _outputs(call: RopeCall, backend: str) -> tuple[Any, ...]:
    return like(call.q), like(call.k)


def _save(ctx: Any, call: RopeCall, outputs: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*call[2:7])
    ctx.interleaved, ctx.reverse, ctx.offset = call[7:]
    ctx.names = ("q",) if call.k is None else ("q", "k")


def _gradients(ctx: Any, run: Any, *gradients: Tensor | None) -> dict[str, Tensor | None]:
    """The transpose is the rotation by the opposite angle, of which the same holds; of one gradient alone as of two."""
    wanted = zip(ctx.names, gradients, ctx.needs_input_grad)
    # A gradient may be expanded, like that of a sum.
    given = {name: gradient.contiguous() for name, gradient, want in wanted if gradient is not None and want}
    if not given:
        return {}
    options = (ctx.interleaved, not ctx.reverse, ctx.offset, ctx.backend)
    rotated = run(*given.values(), *(None,) * (2 - len(given)), *ctx.saved_tensors, *options)
    return dict(zip(given, rotated))


def _results(call: RopeCall, outputs: Outputs) -> tuple[Tensor, Tensor | None]:
    q, k = outputs
    assert q is not None
    return q, None if call.k is None else k


# The checks refuse a gradient for them.
_TABLES = ("cos", "sin")
_INDICES = ("positions", "sequence_offsets", "cu_seqlens")
_BACKENDS = (by_cuda.BACKEND, by_triton.BACKEND, by_torch.BACKEND, by_torch.REFERENCE)
_ROPE = RegisteredOp("rope", RopeCall, _BACKENDS, _outputs, 2)
_OUT_OF_PLACE = Op(
    "rope",
    _ROPE,
    check_rope,
    _BACKENDS,
    result=_results,
    rule=Differentiable(_ROPE, _save, _gradients),
    grads=("q", "k", *_TABLES),
    values=_INDICES,
    varying=True,
)
_BACKENDS_IN_PLACE = (by_cuda.IN_PLACE, by_triton.IN_PLACE, by_torch.IN_PLACE, by_torch.REFERENCE_IN_PLACE)
_IN_PLACE = Op(
    "rope",
    RegisteredOp(
        *("rope_", RopeCall, _BACKENDS_IN_PLACE, lambda call, backend: (), 0), written=WRITTEN_IN_PLACE, refusal=refusal
    ),
    check_rope_in_place,
    _BACKENDS_IN_PLACE,
    result=lambda call, outputs: (call.q, call.k),
    grads=_TABLES,
    values=_INDICES,
    varying=True,
)
CHOICE = _OUT_OF_PLACE.choice
