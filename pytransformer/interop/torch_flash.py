"""This package in torch's registry of flash attention kernels (``torch.nn.attention.register_flash_attention_impl``).

Once activated, the operators below ``scaled_dot_product_attention`` and ``torch.nn.attention.varlen`` that torch's own build of
flash-attention serves are served here, in every thread and in the backward pass. In those operators causality is aligned bottom-right;
``scaled_dot_product_attention`` itself only gets there where that makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from pytransformer.ops.attention import CHOICE, attention
from pytransformer.ops.attention.call import AttentionCall
from pytransformer.ops.backend import requested_backend

IMPLEMENTATION = "pytransformer"


def register_flash_attention() -> str:
    """Registers this package under the name "pytransformer" and returns the name; nothing changes until it is activated.

    Activate with ``torch.nn.attention.activate_flash_attention_impl("pytransformer")``, which replaces torch's flash kernels for GPUs in
    the whole process; ``torch.nn.attention.restore_flash_attention_impl()`` (where torch has it) gives them back.

    Raises:
        NotImplementedError: this version of torch has no such registry.
    """
    registry = torch.nn.attention
    if not hasattr(registry, "register_flash_attention_impl"):
        raise NotImplementedError(f"torch {torch.__version__} has no torch.nn.attention.register_flash_attention_impl")
    registry.register_flash_attention_impl(IMPLEMENTATION, register_fn=activate)
    return IMPLEMENTATION


@dataclass
class Activation:
    """The registrations of an active implementation; the registry calls :meth:`remove` to end them."""

    library: Library | None

    def remove(self) -> None:
        """Gives torch's own kernels back."""
        self.library = None  # torch withdraws what a library registered when the library is freed


def activate(dispatch_key: str = "CUDA") -> Activation:
    """Registers the kernels of the flash operators for a kind of device."""
    library = Library("aten", "IMPL", dispatch_key)  # type: ignore[no-untyped-call]
    for name, function in KERNELS.items():
        if hasattr(torch.ops.aten, name):
            library.impl(name, function, dispatch_key)  # type: ignore[no-untyped-call]
    return Activation(library)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **unsupported: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(output, logsumexp, rng_state, unused, debug_attn_mask) of q, k, v (batch, seqlen, heads, head_dim), or packed with cum_seq_*."""
    for name, given in {"return_debug_mask": return_debug_mask or None, **unsupported}.items():
        if given is not None and not (name == "num_splits" and given <= 1):
            raise NotImplementedError(f"flash attention by pytransformer does not serve {name}, got {given!r}")
    window = _window(window_size_left, window_size_right)
    backend = _backend(query, key, value, is_causal, window, dropout_p, cum_seq_q, cum_seq_k)
    rng_state = torch.empty(2, dtype=torch.int64, device=query.device)
    if dropout_p > 0.0:
        rng_state.random_(-(2**63), 2**63 - 1)
    with torch.no_grad():
        result = attention(
            query,
            key,
            value,
            causal=is_causal,
            window=window,
            softmax_scale=scale,
            dropout_p=dropout_p,
            dropout_seed=rng_state if dropout_p > 0.0 else None,
            cu_seqlens_q=cum_seq_q,
            cu_seqlens_k=cum_seq_k,
            max_seqlen_q=None if cum_seq_q is None else max_q,
            max_seqlen_k=None if cum_seq_k is None else max_k,
            return_lse=True,
            backend=backend,
        )
    out, lse = result
    nothing = torch.empty(0, dtype=query.dtype, device=query.device)
    unused = torch.empty((), dtype=torch.uint64, device=query.device)
    return _like(query, out), lse, rng_state.view(torch.uint64), unused, nothing


def _forward_inplace(out: Tensor, *args: Any, **options: Any) -> Tensor:
    """Writes the output into ``out``; returns logsumexp."""
    result, lse, *_ = _forward(*args, **options)
    out.copy_(result)
    return lse


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the layout of :func:`_forward`."""
    window = _window(window_size_left, window_size_right)
    packed = cum_seq_q is not None
    call = AttentionCall(
        query,
        key,
        value,
        dropout_seed=rng_state.view(torch.int64) if dropout_p > 0.0 else None,
        cu_seqlens_q=cum_seq_q,
        cu_seqlens_k=cum_seq_k,
        max_seqlen_q=max_q if packed else None,
        max_seqlen_k=max_k if packed else None,
        softmax_scale=query.shape[-1] ** -0.5 if scale is None else scale,
        causal=is_causal,
        window=window,
        dropout_p=dropout_p,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        return_lse=True,
    )
    backend = _backend(query, key, value, is_causal, window, dropout_p, cum_seq_q, cum_seq_k)
    gradients = torch.ops.pytransformer.attention_backward(grad_out, None, out, logsumexp, *call, False, False, backend)
    dq, dk, dv, *_ = gradients
    return _like(query, dq), _like(key, dk), _like(value, dv)


def _sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """The dense forward pass with (batch, heads, seqlen, head_dim), as ``scaled_dot_product_attention`` calls it."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    max_q, max_k = q.shape[1], k.shape[1]
    out, lse, rng_state, unused, debug_mask = _forward(
        q, k, v, None, None, max_q, max_k, dropout_p, is_causal, return_debug_mask, scale=scale
    )
    return out.transpose(1, 2), lse, None, None, max_q, max_k, rng_state, unused, debug_mask


def _sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    dout, q, k, v, attended = (tensor.transpose(1, 2) for tensor in (grad_out, query, key, value, out))
    gradients = _backward(
        dout, q, k, v, attended, logsumexp, None, None, max_q, max_k, dropout_p, is_causal, philox_seed, philox_offset,
        scale=scale,
    )  # fmt: skip
    return tuple(gradient.transpose(1, 2) for gradient in gradients)


KERNELS: dict[str, Callable[..., Any]] = {
    "_flash_attention_forward": _forward,
    "_flash_attention_forward_no_dropout_inplace": _forward_inplace,
    "_flash_attention_backward": _backward,
    "_scaled_dot_product_flash_attention": _sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
}


def _window(left: int | None, right: int | None) -> tuple[int, int]:
    return -1 if left is None else left, -1 if right is None else right


def _like(pattern: Tensor, tensor: Tensor) -> Tensor:
    """The tensor in the memory order of ``pattern``, as torch's fake kernels promise."""
    wanted = torch.empty_like(pattern)
    return tensor if tensor.stride() == wanted.stride() else wanted.copy_(tensor)


def _backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: tuple[int, int],
    dropout_p: float,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
) -> str:
    """The kernels that serve both passes; torch's own attention would end here again."""
    named = requested_backend(None)
    if named is not None and named != "torch":
        return named
    call = AttentionCall(
        q,
        k,
        v,
        causal=causal,
        window=window,
        dropout_p=dropout_p,
        cu_seqlens_q=starts_q,
        cu_seqlens_k=starts_k,
        return_lse=True,
    )
    reasons = []
    for candidate in CHOICE.candidates:
        if candidate.name not in ("torch", "reference"):
            reason = CHOICE.why_not(candidate.name, call, q.device.type)
            if reason is None:
                return candidate.name
            reasons.append(f"{candidate.name}: {reason}")
    raise NotImplementedError(f"no kernel serves this call in place of torch's flash attention: {'; '.join(reasons)}")
