"""Scaled dot-product attention: the public function, which backend serves it, and its autograd rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.ops import attention_cuda, attention_torch
from pytransformer.ops.attention_checks import (
    AttentionCall,
    check_attention,
    is_autocasting,
    is_empty,
    is_packed,
    tensors_of,
)
from pytransformer.ops.autograd import (
    autograd_inside_an_op,
    is_recorded,
    records_backward,
    refuse_double_backward,
    vmap_by_loop,
)
from pytransformer.ops.backend import (
    BackendChoice,
    Candidate,
    is_plain,
    requested_backend,
    serves_all,
    warn_once,
)


def _triton_why_not(call: AttentionCall) -> str | None:
    if call.q.dtype == torch.float64:
        return "the kernels compute in float32; float64 is served by torch and the reference"
    return None


CHOICE = BackendChoice(
    "attention",
    (
        Candidate("triton", _triton_why_not, "float64"),
        Candidate("cuda", attention_cuda.why_not, attention_cuda.LIMITS),
        Candidate("torch", attention_torch.why_not, "softcap, sinks, return_lse, dropout_p; packed sequences on a GPU"),
        Candidate("reference", serves_all),
    ),
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``dropout(softmax(softcap(q kᵀ · softmax_scale) + bias + alibi)) v`` over the keys each query may see.

    With ``d = i + seqlen_k - seqlen_q - j`` (the last query stands at the last key), query i sees key j iff every given condition
    holds: causal: d >= 0; window: -right <= d <= left; ``mask``; ``key_padding_mask``; ``bias`` is not -inf. A row that sees no key gives
    output 0, gradient 0 and lse -inf. Differentiable once with respect to q, k, v, bias, sinks, also through lse.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), or packed (total_q, num_heads, head_dim) with ``cu_seqlens_q``. float32, float16,
            bfloat16 (float64: torch and reference only); head_dim a multiple of 8 from 8 to 256; last dimension contiguous, other strides
            free. Under autocast q, k and v are cast to its dtype.
        k: (batch, seqlen_k, num_kv_heads, head_dim) or (total_k, num_kv_heads, head_dim), dtype of q; num_kv_heads divides num_heads and
            query head h reads key head ``h // (num_heads // num_kv_heads)``.
        v: like k, with a head_dim of its own (multiple of 8 from 8 to 256).
        causal: see above; it is aligned bottom-right when the lengths differ.
        window: (left, right), inclusive, -1 = unlimited.
        softmax_scale: finite; 1 / sqrt(head_dim) if None.
        softcap: c > 0 replaces a scaled score s by c · tanh(s / c).
        mask: boolean (True = attend) or integer (nonzero = attend), broadcast to (batch, num_heads, seqlen_q, seqlen_k). Packed: to
            (batch, num_heads, max_seqlen_q, max_seqlen_k), indexed from the start of each sequence.
        bias: floating, broadcast like ``mask``, added to the scores; -inf hides, any finite number is just a number. Its gradient is summed
            over what was broadcast.
        key_padding_mask: (batch, seqlen_k), packed (batch, max_seqlen_k), boolean or integer, True = attend. Does not shift the causal
            alignment. (torch's MultiheadAttention means the opposite by True.)
        alibi_slopes: floating (num_heads) or (batch, num_heads): -slope · |d| is added to the scores. Not differentiable.
        sinks: floating (num_heads): a logit that joins each row's denominator and brings no value.
        dropout_p: probability, 0 to 1, that a weight is dropped; the kept ones are divided by 1 - dropout_p. A weight is kept where
            ``philox(seed, offset, batch, head, i, j) >= dropout_p · 2^32``, the same on every backend and in every packing.
        dropout_seed: int (offset 0), int64 tensor (2) of seed and offset on q's device, or None: drawn from torch's generator of that
            device, without synchronisation.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1), starts of the packed sequences, ending at the number of tokens; both or neither.
        max_seqlen_q, max_seqlen_k: hints for packed sequences; nothing is read back from the device when they are absent.
        deterministic: whether gradients must have the same bits each run; None follows ``torch.use_deterministic_algorithms``.
        return_lse: return the log-sum-exp too.
        backend: "triton", "cuda", "torch" or "reference"; None takes what was set by ``use_backend`` or PYTRANSFORMER_BACKEND, else the
            first that can serve the call. The reference materialises the score matrix and warns once when it was not asked for by name.

    Returns:
        (batch, seqlen_q, num_heads, value head_dim) or (total_q, num_heads, value head_dim) in q's dtype. With ``return_lse`` also the
        natural logarithm of each row's softmax denominator, sinks included and dropout not: (batch, num_heads, seqlen_q) or
        (num_heads, total_q), float32 (float64 for float64 inputs). No queries or no keys: an empty output, or zeros.

    Raises:
        TypeError: an argument of the wrong type or dtype, such as a floating-point ``mask`` (additive masks are passed as ``bias``).
        ValueError: shapes, devices, strides, head counts, head_dim, values out of range, cu_seqlens or hints that do not fit.
        NotImplementedError: the named backend cannot serve this call; the message says why.

    Sources: Vaswani et al. 2017; Milakov & Gimelshein 2018 and Dao et al. 2022 (never materialising the scores); Ainslie et al. 2023 (GQA);
    Press et al. 2022 (ALiBi); Gemma 2 (softcap); gpt-oss (sinks); Salmon et al. 2011 (philox).
    """
    call = AttentionCall(
        q, k, v, causal, window, 1.0, softcap, mask, bias, key_padding_mask, alibi_slopes, sinks, dropout_p, dropout_seed,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic, return_lse,
    )  # fmt: skip
    call = check_attention(call, softmax_scale)
    named = requested_backend(backend)
    chosen = CHOICE.select(call, call.q.device.type, named)
    if chosen == "reference" and named is None:
        warn_once(_materialises(call))
    if is_autocasting(call.q.device.type):
        # q, k and v have been cast; what a backend computes in float32 inside must stay so.
        with torch.autocast(call.q.device.type, enabled=False):
            return _run(call, chosen)
    return _run(call, chosen)


def _materialises(call: AttentionCall) -> str:
    device_type = call.q.device.type
    by_request = "interpreted kernels serve on request only"
    reasons = "; ".join(
        f"{name}: {CHOICE.why_not(name, call, device_type) or by_request}" for name in ("triton", "cuda", "torch")
    )
    return (
        "attention: no fused backend serves this call, so the reference does, which materialises the "
        f"(batch, num_heads, seqlen_q, seqlen_k) score matrix. {reasons}"
    )


def _run(call: AttentionCall, backend: str) -> Tensor | tuple[Tensor, Tensor]:
    if not is_empty(call) and backend in ("torch", "reference"):
        # The tracer of torch.compile cannot read cu_seqlens, nor need it see the reference: there both hide behind the registered ops.
        traced = torch.compiler.is_compiling()
        if backend == "torch" and not (traced and is_packed(call)):
            return attention_torch.attend(call)
        if backend == "reference" and not traced:
            return _reference_attention(call)
    args = _to_args(call, backend)
    if torch.compiler.is_compiling():
        out, lse = torch.ops.pytransformer.attention_forward(*args)
    elif is_recorded(*tensors_of(call)):
        out, lse = _Attention.apply(*args)  # type: ignore[no-untyped-call]
    else:
        out, lse = _forward_op(*args)
    return (out, lse) if call.return_lse else out


def _reference_attention(call: AttentionCall) -> Tensor | tuple[Tensor, Tensor]:
    """The reference in at least float32, rounded once at the end."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    result = reference.attention(
        call.q.to(wide),
        call.k.to(wide),
        call.v.to(wide),
        causal=call.causal,
        window=call.window,
        softmax_scale=call.softmax_scale,
        softcap=call.softcap,
        mask=call.mask,
        bias=None if call.bias is None else call.bias.to(wide),
        key_padding_mask=call.key_padding_mask,
        alibi_slopes=call.alibi_slopes,
        sinks=call.sinks,
        dropout_p=call.dropout_p,
        dropout_seed=_seed_tensor(call),
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k,
        return_lse=call.return_lse,
    )
    if isinstance(result, tuple):
        return result[0].to(call.q.dtype), result[1]
    return result.to(call.q.dtype)


def _seed_tensor(call: AttentionCall) -> Tensor | None:
    """(seed, offset), int64 on q's device, or None without dropout; made without synchronising."""
    if call.dropout_p == 0.0:
        return None
    seed, device = call.dropout_seed, call.q.device
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)
    signed = (seed + 2**63) % 2**64 - 2**63
    return torch.stack(
        (torch.full((), signed, dtype=torch.int64, device=device), torch.zeros((), dtype=torch.int64, device=device))
    )


# --- The registered ops: functional forward and backward, with everything but the tensors of the result as plain arguments. ---------------

_OPTIONS = (
    "Tensor? mask, Tensor? bias, Tensor? key_padding_mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? dropout_seed, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, float softmax_scale, bool causal, "
    "SymInt window_left, SymInt window_right, float softcap, float dropout_p, bool deterministic, bool return_lse, str backend"
)
_NUM_OPTIONS = _OPTIONS.count(",") + 1
_BIAS, _SINKS = 1, 4  # their places among the options: the differentiable ones
_TAGS = (torch.Tag.pt2_compliant_tag,)

torch.library.define(
    "pytransformer::attention_forward", f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)", tags=_TAGS
)
torch.library.define(
    "pytransformer::attention_backward",
    f"(Tensor dout, Tensor? dlse, bool want_dbias, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _to_args(call: AttentionCall, backend: str) -> tuple[Any, ...]:
    """The call as the flat arguments of the registered ops."""
    deterministic = call.deterministic
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return (
        call.q, call.k, call.v, call.mask, call.bias, call.key_padding_mask, call.alibi_slopes, call.sinks, _seed_tensor(call),
        call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k, call.softmax_scale, call.causal, *call.window,
        call.softcap, call.dropout_p, deterministic, call.return_lse, backend,
    )  # fmt: skip


def _from_args(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, key_padding_mask: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, dropout_seed: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, max_seqlen_q: int | None, max_seqlen_k: int | None, softmax_scale: float, causal: bool,
    window_left: int, window_right: int, softcap: float, dropout_p: float, deterministic: bool, return_lse: bool, backend: str,
) -> tuple[AttentionCall, str]:  # fmt: skip
    call = AttentionCall(
        q, k, v, causal, (window_left, window_right), softmax_scale, softcap, mask, bias, key_padding_mask, alibi_slopes, sinks, dropout_p,
        dropout_seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic, return_lse,
    )  # fmt: skip
    return call, backend


def _kernel_options(call: AttentionCall) -> dict[str, Any]:
    return {"allow_tf32": call.q.dtype == torch.float32 and allows_tf32()}


def allows_tf32() -> bool:
    """Whether torch's settings let float32 matrix products on a GPU be rounded to tf32 (both of torch's ways to say it are followed)."""
    precision = torch.backends.cuda.matmul.fp32_precision
    if precision != "none":
        return bool(precision == "tf32")
    return torch.get_float32_matmul_precision() != "highest"


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    call, backend = _from_args(q, k, v, *options)
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    return out, torch.empty(_lse_shape(call, backend), dtype=_lse_dtype(call), device=q.device)


def _lse_shape(call: AttentionCall, backend: str) -> tuple[int, ...]:
    if backend == "torch":
        return (0,)  # scaled_dot_product_attention does not give it, and its gradient does not need it
    if is_packed(call):
        return (call.q.shape[1], call.q.shape[0])
    return (call.q.shape[0], call.q.shape[2], call.q.shape[1])


def _lse_dtype(call: AttentionCall) -> torch.dtype:
    return torch.promote_types(call.q.dtype, torch.float32)


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    call, backend = _from_args(q, k, v, *options)
    if is_empty(call):
        return _forward_of_nothing(call, backend)
    if backend == "triton":
        from pytransformer.kernels.attention.forward import attention_forward

        return attention_forward(call, **_kernel_options(call))
    if backend == "cuda":
        return attention_cuda.forward(call)
    with torch.no_grad():
        out, lse = _composite(call, backend)
    # A view or another layout would break the promise of the fake tensors.
    return out.contiguous(), lse.contiguous()


def _composite(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse) computed by torch's own functions."""
    if backend == "torch":
        return attention_torch.attend(call), call.q.new_empty(0, dtype=_lse_dtype(call))
    result = _reference_attention(call._replace(return_lse=True))
    assert isinstance(result, tuple)
    return result


def _forward_of_nothing(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor]:
    """Without keys each row is empty: out is 0; lse is -inf, or the sink's logit, which alone is in the denominator."""
    out = call.q.new_zeros((*call.q.shape[:-1], call.v.shape[-1]))
    lse = torch.full(_lse_shape(call, backend), -torch.inf, dtype=_lse_dtype(call), device=call.q.device)
    if call.sinks is not None and lse.numel() > 0:
        lse.copy_(call.sinks.to(lse.dtype)[:, None].expand(lse.shape))
    return out, lse


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, want_dbias: bool, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    bias, sinks = options[_BIAS] if want_dbias else None, options[_SINKS]
    dq, dk, dv = (torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (q, k, v))
    dbias, dsinks = (
        q.new_empty(0) if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for tensor in (bias, sinks)
    )
    return dq, dk, dv, dbias, dsinks


def _backward(
    dout: Tensor, dlse: Tensor | None, want_dbias: bool, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dbias, dsinks), contiguous; what does not exist or is not wanted is an empty tensor."""
    call, backend = _from_args(q, k, v, *options)
    gradients: Sequence[Tensor | None]
    if is_empty(call):
        gradients = _backward_of_nothing(call, want_dbias, dlse)
    elif backend == "triton":
        from pytransformer.kernels.attention.backward import attention_backward

        gradients = attention_backward(call, dout, out, lse, dlse, want_dbias=want_dbias, **_kernel_options(call))
    elif backend == "cuda":
        gradients = attention_cuda.backward(call, dout, dlse, out, lse)
    else:
        gradients = _recompute(call, backend, want_dbias, dout, dlse)
    dq, dk, dv, dbias, dsinks = (
        q.new_empty(0) if gradient is None else gradient.contiguous() for gradient in gradients
    )
    return dq, dk, dv, dbias, dsinks


def _backward_of_nothing(call: AttentionCall, want_dbias: bool, dlse: Tensor | None) -> Sequence[Tensor | None]:
    differentiable = (call.q, call.k, call.v, call.bias if want_dbias else None)
    gradients = [None if tensor is None else torch.zeros_like(tensor) for tensor in differentiable]
    if call.sinks is None:
        return (*gradients, None)
    if dlse is None or dlse.numel() == 0:
        return (*gradients, torch.zeros_like(call.sinks))
    axes = (-1,) if is_packed(call) else (0, -1)
    return (*gradients, dlse.sum(dim=axes).to(call.sinks.dtype))


def _recompute(
    call: AttentionCall, backend: str, want_dbias: bool, dout: Tensor, dlse: Tensor | None
) -> Sequence[Tensor | None]:
    """Gradients of torch's own functions, by running them again."""
    differentiable = (call.q, call.k, call.v, call.bias if want_dbias else None, call.sinks)
    inputs = [None if tensor is None else tensor.detach().requires_grad_() for tensor in differentiable]
    q, k, v, bias, sinks = inputs
    assert q is not None and k is not None and v is not None
    with autograd_inside_an_op():
        out, lse = _composite(
            call._replace(q=q, k=k, v=v, bias=call.bias if bias is None else bias, sinks=sinks), backend
        )
    outputs, gradients = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
    wanted = [tensor for tensor in inputs if tensor is not None]
    found = iter(torch.autograd.grad(outputs, wanted, gradients, materialize_grads=True))
    return [None if tensor is None else next(found) for tensor in inputs]


torch.library.register_fake("pytransformer::attention_forward", _fake_forward)
torch.library.register_fake("pytransformer::attention_backward", _fake_backward)
torch.library.impl("pytransformer::attention_forward", "CompositeExplicitAutograd", _forward)
torch.library.impl("pytransformer::attention_backward", "CompositeExplicitAutograd", _backward)


def _forward_op(*args: Any) -> tuple[Tensor, Tensor]:
    """The registered op, or without the dispatcher's detour its implementation."""
    if is_plain(*(arg for arg in args if isinstance(arg, Tensor))):
        return _forward(*args)
    result: tuple[Tensor, Tensor] = torch.ops.pytransformer.attention_forward(*args)
    return result


class _Attention(torch.autograd.Function):
    """(out, lse) of the registered ops, differentiable once."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _forward_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(*output, *(value for value in inputs if isinstance(value, Tensor)))
        ctx.plain = [None if tensor else value for value, tensor in zip(inputs, is_tensor)]
        ctx.is_tensor = is_tensor
        ctx.return_lse = inputs[-2]
        ctx.set_materialize_grads(False)  # an output that was not used costs no tensor of zeros
        if not ctx.return_lse:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *saved = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        tensors = iter(saved)
        inputs = [next(tensors) if tensor else value for value, tensor in zip(ctx.plain, ctx.is_tensor)]
        want_dbias = bool(ctx.needs_input_grad[3 + _BIAS])
        args = (dout, dlse if ctx.return_lse else None, want_dbias, out, lse, *inputs)
        if records_backward():
            gradients = _AttentionBackward.apply(*args)  # type: ignore[no-untyped-call]
        elif is_plain(dout, *saved):
            gradients = _backward(*args)
        else:
            gradients = torch.ops.pytransformer.attention_backward(*args)
        of_options: list[Tensor | None] = [None] * _NUM_OPTIONS
        of_options[_BIAS] = gradients[3] if want_dbias else None
        of_options[_SINKS] = gradients[4] if ctx.is_tensor[3 + _SINKS] else None
        return (*gradients[:3], *of_options)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return vmap_by_loop(_Attention, info, in_dims, *args)


class _AttentionBackward(torch.autograd.Function):
    """The backward op where it is itself recorded: a second derivative is refused rather than silently zero."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = torch.ops.pytransformer.attention_backward(*args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        refuse_double_backward("attention")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return vmap_by_loop(_AttentionBackward, info, in_dims, *args)


# torch.compile sees the op rather than the Function, so the op has the same rule. (In eager mode the Function comes first: torch.func
# refuses rules that are registered.)
torch.library.register_autograd(
    "pytransformer::attention_forward", _Attention.backward, setup_context=_Attention.setup_context
)
