"""Linear attention: time that grows with the length, and a state of fixed size instead of a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer.ops.backend import Outputs
from pytransformer.ops.linear_attention import by_torch, by_triton
from pytransformer.ops.linear_attention.call import LinearAttentionCall, check_linear_attention, split_state
from pytransformer.ops.linear_attention.gradient import linear_attention_backward
from pytransformer.ops.op import Op
from pytransformer.ops.registered import Differentiable, RegisteredOp


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str | None = "elu",
    causal: bool = True,
    normalize: bool = True,
    decay: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """``φ(q_t) S_t / (φ(q_t) · z_t)`` with ``S_t = decay · S_{t-1} + φ(k_t) v_tᵀ`` and ``z_t = decay · z_{t-1} + φ(k_t)``.

    The same as attention with weights ``decay^(t - j) · φ(q_t) · φ(k_j)`` in place of the softmax, in time and memory that grow with
    seqlen. Sums are taken in float32 and rounded once. Differentiable with respect to q, k, v, decay and initial_state, also through
    the returned state; by torch and the reference any number of times. Triton's gradients have the same bits each run.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), float32, float16 or bfloat16 (float64: torch and reference only); last dimension
            contiguous. It is not scaled: with ``normalize`` and "elu" a scale of q changes its features, without it the result in
            proportion. Under autocast q, k and v are cast to its dtype.
        k: (batch, seqlen_k, num_kv_heads, head_dim), dtype of q; num_kv_heads divides num_heads and query head h reads key head
            ``h // (num_heads // num_kv_heads)``.
        v: (batch, seqlen_k, num_kv_heads, value_dim), dtype of q.
        feature_map: "elu": φ(x) = elu(x) + 1, that is x + 1 above 0 and exp(x) below; None: φ(x) = x, for q and k to which another
            feature map has been applied.
        causal: query t reads S_t and z_t, for which seqlen_q = seqlen_k. False: every query reads the last of them.
        normalize: divide by φ(q_t) · z_t; a denominator of exactly 0, as without keys, counts as 1. For features that may be negative,
            whose denominators may come near 0, False is the usual choice, with a norm after it.
        decay: float32 (num_kv_heads), a factor from 0 to 1 for each key head; None = 1. Only with ``causal``. Values that live on a GPU
            are not read back; PYTRANSFORMER_DEBUG=1 checks them there too.
        initial_state: (S, z) as ``return_state`` gave it for the tokens before the first; None = zeros. It is not written to.
        return_state: return the last (S, z) too. A sequence in pieces, each with the state of the one before, gives the results of the
            whole; decoding is the same with pieces of one token, at a cost that does not depend on how many went before.
        backend: "triton", "torch" or "reference"; None = Triton on a GPU (head_dim and value_dim up to 256) and torch elsewhere, unless
            ``use_backend`` or PYTRANSFORMER_BACKEND says otherwise.

    Returns:
        (batch, seqlen_q, num_heads, value_dim) in q's dtype; with ``return_state`` also (S, z), float32 (float64 for float64 inputs):
        (batch, num_kv_heads, head_dim, value_dim) and (batch, num_kv_heads, head_dim). z is kept up without ``normalize`` too.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or strides that do not fit; head counts; an unknown feature map; lengths that differ with ``causal``;
            decay without it, or beyond 0 to 1.
        NotImplementedError: the named backend cannot serve this call; the message says why.

    Sources: Katharopoulos et al. 2020 (the features, the normaliser, the recurrence); Sun et al. 2023, RetNet (decay, chunks).
    """
    given = (q, k, v, decay, *split_state(initial_state), feature_map, causal, normalize, return_state)
    return _LINEAR_ATTENTION(given, backend)  # type: ignore[no-any-return]


def _outputs(call: LinearAttentionCall, backend: str) -> tuple[Any, ...]:
    """(out, S, z, denominators for the backward pass) as (shape, dtype)."""
    batch, _, num_kv_heads, head_dim = call.k.shape
    wide = torch.promote_types(call.q.dtype, torch.float32)
    normalizer = (batch, num_kv_heads, head_dim)
    _, seqlen, num_heads, _ = call.q.shape
    value_dim = call.v.shape[-1]
    return (
        ((*call.q.shape[:-1], value_dim), call.q.dtype),
        ((*normalizer, value_dim), wide),
        (normalizer, wide),
        ((batch, num_heads, seqlen), wide) if backend == "triton" and call.normalize else None,
    )


def _result(call: LinearAttentionCall, outputs: Outputs) -> Any:
    out, state, normalizer, _ = outputs
    return (out, (state, normalizer)) if call.return_state else out


# --- The gradient of the kernels. -------------------------------------------------------------------------------------------------------


def _save(ctx: Any, call: LinearAttentionCall, outputs: tuple[Tensor, ...]) -> None:
    out, state, normalizer, denominator = outputs
    ctx.save_for_backward(out, denominator, *call[:_NUM_TENSORS])
    ctx.options = call[_NUM_TENSORS:]
    ctx.mark_non_differentiable(denominator)
    if not call.return_state:
        ctx.mark_non_differentiable(state, normalizer)


def _dense(gradient: Tensor | None) -> Tensor | None:
    """A gradient may be expanded, like that of a sum."""
    return gradient if gradient is None or gradient.stride(-1) == 1 else gradient.contiguous()


def _gradients(
    ctx: Any,
    run: Any,
    dout: Tensor | None,
    dstate: Tensor | None,
    dnormalizer: Tensor | None,
    ddenominator: Tensor | None = None,
) -> dict[str, Tensor | None]:
    out, denominator, *tensors = ctx.saved_tensors
    decay, state = tensors[3:5]
    dout = torch.zeros_like(out) if dout is None else dout
    wants_decay = decay is not None and bool(ctx.needs_input_grad[3])
    incoming = (_dense(dout), _dense(dstate), _dense(dnormalizer))
    found = run(out, denominator, *incoming, *tensors, *ctx.options, wants_decay, ctx.backend)
    dq, dk, dv, ddecay, first, first_normalizer = found
    return {
        "q": dq,
        "k": dk,
        "v": dv,
        "decay": ddecay if wants_decay else None,
        "state": None if state is None else first,
        "normalizer": None if state is None else first_normalizer,
    }


_BACKENDS = (by_triton.BACKEND, by_torch.BACKEND, by_torch.REFERENCE)
_FORWARD = RegisteredOp("linear_attention", LinearAttentionCall, _BACKENDS, _outputs, 4)
_NUM_TENSORS = _FORWARD.num_tensors
_LINEAR_ATTENTION = Op(
    "linear_attention",
    _FORWARD,
    check_linear_attention,
    _BACKENDS,
    result=_result,
    rule=Differentiable(_FORWARD, _save, _gradients, linear_attention_backward, "linear_attention"),
    grads=("q", "k", "v", "decay", "state", "normalizer"),
    values=("decay",),
    casts=True,
)
CHOICE = _LINEAR_ATTENTION.choice
