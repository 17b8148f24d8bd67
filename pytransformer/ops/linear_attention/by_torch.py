"""Linear attention by torch's own products, in chunks, and by the reference.

Within a chunk the scores of its queries and keys are a small matrix; all before it is in the state. Time and memory grow with the length,
also of what autograd keeps: a state and a matrix of scores for each chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.ops.backend import Backend, Outputs, always
from pytransformer.ops.linear_attention.call import LinearAttentionCall
from pytransformer.ops.registered import autograd_inside_an_op

# About a head_dim: the scores of a chunk then cost as much as the state.
CHUNK = 64


def _run(call: LinearAttentionCall) -> Outputs:
    """(out, S, z, None)."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    num_kv_heads = call.k.shape[2]
    # Query heads of a group share k, v and the state: (batch, num_kv_heads, group or 1, seqlen, dim).
    q = torch.unflatten(call.q, 2, (num_kv_heads, call.q.shape[2] // num_kv_heads)).permute(0, 2, 3, 1, 4)
    k, v = (tensor.transpose(1, 2).unsqueeze(2) for tensor in (call.k, call.v))
    state = _initial(call, wide)
    if call.causal:
        out, state = _by_chunks(call, q, k, v, state)
    else:
        q, k, v = (tensor.to(wide) for tensor in (q, k, v))
        state = state + _features(k, call).transpose(-1, -2) @ _with_ones(v)
        out = _read(_features(q, call) @ state, call)
    out = out.permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out, state[:, :, 0, :, :-1].contiguous(), state[:, :, 0, :, -1].contiguous(), None


def _by_chunks(call: LinearAttentionCall, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, num_kv_heads, group, seqlen, value_dim) and the last state."""
    decay = state.new_ones(state.shape[1]) if call.decay is None else call.decay.to(state.dtype)
    decay = decay[:, None, None, None]
    age = torch.arange(min(CHUNK, q.shape[3]) + 1, device=q.device)[:, None]
    powers, outputs = decay**age, []
    within = (decay ** (age - age.T).clamp(min=0)).tril()
    # Not slices: the gradient of each would be as long as the sequence.
    for chunk in zip(*(torch.split(tensor, CHUNK, dim=3) for tensor in (q, k, v))):
        q, k, v = (tensor.to(state.dtype) for tensor in chunk)
        q, k, v, length = _features(q, call), _features(k, call), _with_ones(v), q.shape[3]
        near = (q @ k.transpose(-1, -2) * within[..., :length, :length]) @ v
        outputs.append(_read(near + (q * powers[..., 1 : length + 1, :]) @ state, call))
        added = (k * powers[..., :length, :].flip(-2)).transpose(-1, -2) @ v
        state = powers[..., length : length + 1, :] * state + added
    return torch.cat(outputs, dim=3), state


def _initial(call: LinearAttentionCall, dtype: torch.dtype) -> Tensor:
    """S with z as its last column: (batch, num_kv_heads, 1, head_dim, value_dim + 1)."""
    if call.state is None or call.normalizer is None:
        batch, _, num_kv_heads, head_dim = call.k.shape
        return call.q.new_zeros((batch, num_kv_heads, 1, head_dim, call.v.shape[-1] + 1), dtype=dtype)
    return torch.cat((call.state, call.normalizer[..., None]), dim=-1).to(dtype)[:, :, None]


def _with_ones(v: Tensor) -> Tensor:
    # The sum of keys is that of keys times 1.
    return torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)


def _features(x: Tensor, call: LinearAttentionCall) -> Tensor:
    # elu(x) + 1, without taking 1 from exp(x) and adding it again.
    return x if call.feature_map == "identity" else x.clamp(max=0).exp() + x.relu()


def _read(sums: Tensor, call: LinearAttentionCall) -> Tensor:
    """Numerators and denominators, the last column, to results in q's dtype."""
    out = sums[..., :-1]
    if call.normalize:
        denominator = sums[..., -1:]
        out = out / denominator.masked_fill(denominator == 0, 1)
    return out.to(call.q.dtype)


def _by_reference(call: LinearAttentionCall) -> Outputs:
    out, (state, normalizer) = reference.linear_attention(
        *(call.q, call.k, call.v),
        feature_map=None if call.feature_map == "identity" else call.feature_map,
        causal=call.causal,
        normalize=call.normalize,
        decay=call.decay,
        initial_state=None if call.state is None or call.normalizer is None else (call.state, call.normalizer),
        return_state=True,
    )
    return out, state, normalizer, None


def _backward_of(run: Callable[[LinearAttentionCall], Outputs]) -> Callable[[Any], Outputs]:
    """The gradients through a forward pass that is run again: of the registered op, which nothing sees through."""

    def backward(given: Any) -> Outputs:
        call = given.call()
        with autograd_inside_an_op():
            leaves: list[Any] = [None if tensor is None else tensor.detach().requires_grad_() for tensor in call[:6]]
            out, state, normalizer, _ = run(LinearAttentionCall._make((*leaves, *call[6:])))
            outputs = ((out, given.dout), (state, given.dlast_state), (normalizer, given.dlast_normalizer))
            used = [(output, gradient) for output, gradient in outputs if gradient is not None]
            wanted = [leaf for leaf in leaves if leaf is not None]
            reached, gradients = zip(*used)
            found = iter(torch.autograd.grad(reached, wanted, gradients, materialize_grads=True))
        dq, dk, dv, ddecay, dstate, dnormalizer = (None if leaf is None else next(found) for leaf in leaves)
        return dq, dk, dv, ddecay if given.wants_decay else None, dstate, dnormalizer

    return backward


BACKWARD = Backend("torch", _backward_of(_run))
REFERENCE_BACKWARD = Backend("reference", _backward_of(_by_reference))
BACKEND = Backend("torch", _run, is_transparent=always)
REFERENCE = Backend("reference", _by_reference, is_transparent=always)
