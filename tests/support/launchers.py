"""Kernels launched once, with options by name: what a launch class takes as one call, written as tests like to write it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pytransformer.kernels.activation import ActivationBackward, ActivationForward
from pytransformer.kernels.grouped_linear import GroupedBackward, GroupedForward
from pytransformer.kernels.linear_attention.backward import LinearBackward
from pytransformer.kernels.linear_attention.forward import LinearForward
from pytransformer.kernels.norm.backward import NormBackward
from pytransformer.kernels.norm.forward import NormForward
from pytransformer.kernels.quantized_linear import QuantizedBackward, QuantizedForward
from pytransformer.kernels.rope import RopeLaunch
from pytransformer.ops.activation import ActivationCall, ActivationGradientCall
from pytransformer.ops.grouped_linear.call import GroupedLinearCall, GroupedLinearGradientCall
from pytransformer.ops.linear_attention.call import LinearAttentionCall
from pytransformer.ops.linear_attention.gradient import GradientCall as LinearGradientCall
from pytransformer.ops.norm.call import NormCall, NormGradientCall
from pytransformer.ops.quantized_linear.call import QuantizedLinearCall, QuantizedLinearGradientCall
from pytransformer.ops.rope.call import RopeCall


def rope_rotate(
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
    reverse: bool = False,
    launch: Any = RopeLaunch,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """RoPE by the Triton kernel, or by the class ``launch`` of a broken copy."""
    tensor, number = (offsets, 0) if isinstance(offsets, Tensor) else (None, offsets)
    if positions is not None:
        tensor = None
    call = RopeCall(q, k, cos, sin, positions, tensor, cu_seqlens, interleaved, reverse, number)
    return launch(call, inplace=inplace, **options)(call)  # type: ignore[no-any-return]


def rope_by(module: Any) -> Any:
    """:func:`rope_rotate` by a broken copy of the kernel file."""
    return functools.partial(rope_rotate, launch=module.RopeLaunch)


def norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    eps: float,
    is_rms: bool,
    weight_offset: float = 0.0,
    launch: Any = NormForward,
    **options: Any,
) -> tuple[Any, ...]:
    """(y, s, mean, rstd) by the Triton kernel, or by the class ``launch`` of a broken copy."""
    call = NormCall(x, weight, bias, residual, eps, weight_offset, is_rms)
    return launch(call, **options)(call)  # type: ignore[no-any-return]


def norm_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    weight_offset: float = 0.0,
    need_dweight: bool = True,
    dbias_dtype: torch.dtype | None = None,
    launch: Any = NormBackward,
    **options: Any,
) -> tuple[Any, ...]:
    """(gradient of s, dweight, dbias) by the Triton kernels, or by the class ``launch`` of a broken copy; no mean: RMSNorm."""
    call = NormGradientCall(dy, ds, s, weight, mean, rstd, weight_offset, mean is None, need_dweight, dbias_dtype)
    return launch(call, **options)(call)  # type: ignore[no-any-return]


def norm_forward_by(module: Any) -> Any:
    """:func:`norm_forward` by a broken copy of the kernel file."""
    return functools.partial(norm_forward, launch=module.NormForward)


def norm_backward_by(module: Any) -> Any:
    """:func:`norm_backward` by a broken copy of the kernel file."""
    return functools.partial(norm_backward, launch=module.NormBackward)


def activation_forward(
    gate: Tensor, up: Tensor | None, *, activation: str, gated: bool, launch: Any = ActivationForward, **options: Any
) -> Tensor:
    """SwiGLU, GEGLU or GELU by the Triton kernel, or by the class ``launch`` of a broken copy."""
    call = ActivationCall(gate, up, activation, gated)
    return launch(call, **options)(call)  # type: ignore[no-any-return]


def activation_backward(
    dout: Tensor,
    gate: Tensor,
    up: Tensor | None,
    *,
    activation: str,
    gated: bool,
    launch: Any = ActivationBackward,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """(dgate, dup) by the Triton kernel, or by the class ``launch`` of a broken copy."""
    call = ActivationGradientCall(dout, gate, up, activation, gated)
    return launch(call, **options)(call)  # type: ignore[no-any-return]


def activation_by(module: Any) -> dict[str, Any]:
    """Both of them by a broken copy of the kernel file."""
    return {
        "forward": functools.partial(activation_forward, launch=module.ActivationForward),
        "backward": functools.partial(activation_backward, launch=module.ActivationBackward),
    }


def grouped_forward(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    launch: Any = GroupedForward,
    **options: Any,
) -> Tensor:
    """The grouped product by the Triton kernel, or by the class ``launch`` of a broken copy."""
    call = GroupedLinearCall(x, weight, offsets, bias)
    return launch(call, **options)(call)  # type: ignore[no-any-return]


def grouped_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    want_dx: bool = True,
    want_dweight: bool = True,
    want_dbias: bool = True,
    launch: Any = GroupedBackward,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias) by the Triton kernels, or by the class ``launch`` of a broken copy."""
    call = GroupedLinearGradientCall(dy, x, weight, offsets, want_dx, want_dweight, want_dbias)
    return launch(call, **options)(call)  # type: ignore[no-any-return]


def grouped_by(module: Any) -> dict[str, Any]:
    """Both by a broken copy of the kernel file, under the names ``forward`` and ``backward``."""
    return {
        "forward": functools.partial(grouped_forward, launch=module.GroupedForward),
        "backward": functools.partial(grouped_backward, launch=module.GroupedBackward),
    }


def linear_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    S: Tensor | None = None,
    z: Tensor | None = None,
    *,
    feature_map: str | None = "elu",
    causal: bool = True,
    normalize: bool = True,
    launch: Any = LinearForward,
    **options: Any,
) -> tuple[LinearAttentionCall, tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """The call of linear attention, and (out, S, z, denominators) by the Triton kernels, or by the class ``launch`` of a broken copy."""
    call = LinearAttentionCall(q, k, v, decay, S, z, feature_map or "identity", causal, normalize, True)
    return call, launch(call, **options)(call)


def linear_backward(
    call: LinearAttentionCall,
    results: tuple[Tensor, Tensor, Tensor, Tensor | None],
    dout: Tensor,
    dS: Tensor | None = None,
    dz: Tensor | None = None,
    *,
    launch: Any = LinearBackward,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v, decay, S and z by the Triton kernels, or by the class ``launch`` of a broken copy."""
    given = LinearGradientCall(results[0], results[3], dout, dS, dz, *call, call.decay is not None)
    return launch(given, **options)(given)  # type: ignore[no-any-return]


def quantized_forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    launch: Any = QuantizedForward,
    **options: Any,
) -> Tensor:
    """The product with codes by the Triton kernel, or by the class ``launch`` of a broken copy."""
    call = QuantizedLinearCall(x, weight, scale, zero_point, bias)
    return launch(call, **options)(call)  # type: ignore[no-any-return]


def quantized_backward(
    dy: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    launch: Any = QuantizedBackward,
    **options: Any,
) -> Tensor:
    """Its gradient to x by the Triton kernel, or by the class ``launch`` of a broken copy."""
    call = QuantizedLinearGradientCall(dy, weight, scale, zero_point)
    return launch(call, **options)(call)  # type: ignore[no-any-return]


def quantized_by(module: Any) -> dict[str, Any]:
    """Both by a broken copy of the kernel file, under the names ``forward`` and ``backward``."""
    return {
        "forward": functools.partial(quantized_forward, launch=module.QuantizedForward),
        "backward": functools.partial(quantized_backward, launch=module.QuantizedBackward),
    }
