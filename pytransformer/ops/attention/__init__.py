"""Scaled dot-product attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer.ops.attention import by_cuda, by_torch, by_triton
from pytransformer.ops.attention.call import AttentionCall, check_attention, is_empty, is_packed
from pytransformer.ops.attention.gradient import attention_backward
from pytransformer.ops.backend import Outputs
from pytransformer.ops.op import Op
from pytransformer.ops.registered import Differentiable, RegisteredOp


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
    block_mask: Tensor | None = None,
    block_size: int | tuple[int, int] = 64,
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
    holds: causal: d >= 0; window: -right <= d <= left; ``mask``; ``key_padding_mask``; ``block_mask``; ``bias`` is not -inf. A row that
    sees no key gives output 0, gradient 0 and lse -inf. Differentiable once with respect to q, k, v, bias, alibi_slopes and sinks, also
    through lse.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), or packed (total_q, num_heads, head_dim) with ``cu_seqlens_q``. float32, float16,
            bfloat16 (float64: torch and reference only); last dimension contiguous, other strides free. Any head_dim: up to 256 by the
            kernels, which copy what is no multiple of 8, and above by torch. Under autocast q, k and v are cast to its dtype.
        k: (batch, seqlen_k, num_kv_heads, head_dim) or (total_k, num_kv_heads, head_dim), dtype of q; num_kv_heads divides num_heads and
            query head h reads key head ``h // (num_heads // num_kv_heads)``.
        v: like k, with a head_dim of its own.
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
        block_mask: block-sparse attention: (batch or 1, num_heads or 1, blocks of queries, blocks of keys), boolean or integer, True = the
            queries ``I · block_size …`` may attend to the keys ``J · block_size …``, both counted from the start of the tensors (packed: of
            the sequence, blocks of max_seqlen_q and max_seqlen_k) whatever ``causal`` is aligned to; the last blocks may be short. Blocks
            that are not listed are neither read nor computed, forward or backward, so that time goes by the number of those that are, and
            what lies in them may be NaN. The values are read where the kernels run, without synchronisation. Patterns:
            ``pytransformer.block_masks``; when it pays: docs/sparse.md. (Not by "cuda".)
        block_size: queries and keys in a block, or (queries, keys); multiples of 16. The kernels' tiles divide a block: powers of two
            serve best, on a GPU 128.
        alibi_slopes: floating (num_heads) or (batch, num_heads): -slope · |d| is added to the scores. (No gradient by "cuda".)
        sinks: floating (num_heads): a logit that joins each row's denominator and brings no value.
        dropout_p: probability, 0 to 1, that a weight is dropped; the kept ones are divided by 1 - dropout_p. A weight is kept where
            ``philox(seed, offset, batch, head, i, j) >= dropout_p · 2^32``, the same on every backend and in every packing.
        dropout_seed: int (offset 0), int64 tensor (2) of seed and offset on q's device, or None: drawn from torch's generator of that
            device, without synchronisation.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1), starts of the packed sequences, ending at the number of tokens; both or neither.
        max_seqlen_q, max_seqlen_k: hints for packed sequences; nothing is read back from the device when they are absent.
        deterministic: whether gradients must have the same bits each run; None follows ``torch.use_deterministic_algorithms``. Without it
            some kernels, such as Hopper's, add up parts of dq in no fixed order.
        return_lse: return the log-sum-exp too.
        backend: "triton", "cuda", "torch" or "reference"; None takes what was set by ``use_backend`` or PYTRANSFORMER_BACKEND, else the
            first that can serve the call. The reference, which materialises the score matrix, serves by name only.

    Returns:
        (batch, seqlen_q, num_heads, value head_dim) or (total_q, num_heads, value head_dim) in q's dtype. With ``return_lse`` also the
        natural logarithm of each row's softmax denominator, sinks included and dropout not: (batch, num_heads, seqlen_q) or
        (num_heads, total_q), float32 (float64 for float64 inputs). No queries or no keys: an empty output, or zeros.

    Raises:
        TypeError: an argument of the wrong type or dtype, such as a floating-point ``mask`` (additive masks are
            passed as ``bias``, those of ones and zeros as ``mask.bool()``).
        ValueError: shapes, devices, strides, head counts, head_dim, values out of range, cu_seqlens or hints that do not fit.
        NotImplementedError: the named backend cannot serve this call; the message says why.

    Sources: Vaswani et al. 2017; Milakov & Gimelshein 2018 and Dao et al. 2022 (never materialising the scores); Ainslie et al. 2023 (GQA);
    Press et al. 2022 (ALiBi); Gemma 2 (softcap); gpt-oss (sinks); Salmon et al. 2011 (philox); Child et al. 2019 (block-sparse attention).
    """
    given = (
        q, k, v, mask, bias, key_padding_mask, block_mask, alibi_slopes, sinks, dropout_seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, softmax_scale, causal, window, softcap, dropout_p, deterministic, return_lse, block_size,
    )  # fmt: skip
    return _ATTENTION(given, backend)  # type: ignore[no-any-return]


def _outputs(call: AttentionCall, backend: str) -> tuple[Any, ...]:
    """(out, lse) as (shape, dtype)."""
    out = (*call.q.shape[:-1], call.v.shape[-1]), call.q.dtype
    if backend == "torch" and not is_empty(call) and not by_torch.gives_lse(call):
        return out, None
    q = call.q.shape
    lse = (q[1], q[0]) if is_packed(call) else (q[0], q[2], q[1])
    return out, (lse, torch.promote_types(call.q.dtype, torch.float32))


def _result(call: AttentionCall, outputs: Outputs) -> Tensor | tuple[Tensor, Tensor]:
    return outputs if call.return_lse else outputs[0]  # type: ignore[return-value]


# --- The gradient. ----------------------------------------------------------------------------------------------------------------------


def _save(ctx: Any, call: AttentionCall, outputs: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*outputs, *call[:_NUM_TENSORS])
    ctx.options, ctx.return_lse = call[_NUM_TENSORS:], call.return_lse
    if not call.return_lse:
        ctx.mark_non_differentiable(outputs[1])


def _gradients(ctx: Any, run: Any, dout: Tensor | None, dlse: Tensor | None) -> dict[str, Tensor | None]:
    out, lse, *tensors = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    wants_bias, wants_slopes = bool(ctx.needs_input_grad[_BIAS]), bool(ctx.needs_input_grad[_SLOPES])
    dlse = dlse if ctx.return_lse else None
    wanted = wants_bias, wants_slopes
    dq, dk, dv, dbias, dsinks, dslopes = run(dout, dlse, out, lse, *tensors, *ctx.options, *wanted, ctx.backend)
    has_sinks = tensors[_SINKS] is not None
    return {
        "q": dq,
        "k": dk,
        "v": dv,
        "bias": dbias if wants_bias else None,
        "alibi_slopes": dslopes if wants_slopes else None,
        "sinks": dsinks if has_sinks else None,
    }


_BACKENDS = (by_triton.BACKEND, by_cuda.BACKEND, by_torch.BACKEND, by_torch.REFERENCE)
_FORWARD = RegisteredOp(
    "attention_forward",
    AttentionCall,
    (by_triton.BACKEND, by_cuda.BACKEND, by_torch.REGISTERED, by_torch.REFERENCE),
    _outputs,
    2,
)
_NUM_TENSORS = _FORWARD.num_tensors
_BIAS, _SLOPES, _SINKS = map(AttentionCall._fields.index, ("bias", "alibi_slopes", "sinks"))
_ATTENTION = Op(
    "attention",
    _FORWARD,
    check_attention,
    _BACKENDS,
    result=_result,
    rule=Differentiable(_FORWARD, _save, _gradients, attention_backward, "attention"),
    grads=("q", "k", "v", "bias", "alibi_slopes", "sinks"),
    values=("cu_seqlens_q", "cu_seqlens_k"),
    casts=True,
)
CHOICE = _ATTENTION.choice
