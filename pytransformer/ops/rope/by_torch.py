"""RoPE by torch's own functions, which the compiler fuses, and by the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.ops.backend import Backend, Outputs, always, is_plain
from pytransformer.ops.rope.call import RopeCall


def _token_positions(call: RopeCall) -> Tensor:
    """Row of cos and sin for each token, (batch, seqlen), (seqlen) or (total); clamped to the table as in the kernel."""
    q = call.q
    if call.positions is not None:
        positions = call.positions
    else:
        index = torch.arange(q.shape[-3], device=q.device)
        if call.cu_seqlens is not None:
            # The number of sequences that end at or before a token is the number of its own.
            sequence = torch.searchsorted(call.cu_seqlens[1:].long(), index, right=True)
            sequence = sequence.clamp(max=max(call.cu_seqlens.shape[0] - 2, 0))
            positions = index - call.cu_seqlens[sequence] + call.offset
            if call.sequence_offsets is not None:
                positions = positions + call.sequence_offsets[sequence]
        elif call.sequence_offsets is not None:
            offsets = call.sequence_offsets if q.ndim == 3 else call.sequence_offsets[:, None]
            positions = index + offsets
        else:
            positions = index + call.offset
    return positions.clamp(0, max(call.cos.shape[0] - 1, 0))


def _rotate(call: RopeCall) -> tuple[Tensor, Tensor | None]:
    seqlen, half = call.q.shape[-3], call.cos.shape[1]
    if call.positions is None and call.cu_seqlens is None and call.sequence_offsets is None:
        cos, sin = (table[call.offset : call.offset + seqlen] for table in (call.cos, call.sin))
    elif call.cos.shape[0] == 0:  # nothing to rotate, and nothing that an index could point to
        return call.q.clone(), None if call.k is None else call.k.clone()
    else:
        positions = _token_positions(call)
        cos, sin = call.cos[positions], call.sin[positions]
    # The members of a pair are neighbours along an axis of their own: (half, 2) or (2, half).
    axis = -1 if call.interleaved else -2
    cos, sin = cos.unsqueeze(-2).unsqueeze(axis), sin.unsqueeze(-2)
    signed_sin = torch.stack((sin, -sin) if call.reverse else (-sin, sin), dim=axis)

    def rotate(x: Tensor) -> Tensor:
        pairs = x[..., : 2 * half].reshape(*x.shape[:-1], *((half, 2) if call.interleaved else (2, half)))
        pairs = pairs.to(torch.promote_types(x.dtype, torch.float32))
        rotated = torch.addcmul(pairs * cos, pairs.flip(axis), signed_sin).flatten(-2).to(x.dtype)
        if 2 * half == x.shape[-1]:
            return rotated
        # Not torch.cat: a backward pass may run under autocast, which would change its dtype.
        out = x.clone(memory_format=torch.contiguous_format)
        out[..., : 2 * half] = rotated
        return out

    return rotate(call.q), None if call.k is None else rotate(call.k)


def _rotate_by_reference(call: RopeCall) -> tuple[Tensor, Tensor | None]:
    offsets = call.offset if call.sequence_offsets is None else call.sequence_offsets
    return reference.rope(
        *(call.q, call.k, call.cos, call.sin),
        positions=call.positions,
        offsets=offsets,
        cu_seqlens=call.cu_seqlens,
        interleaved=call.interleaved,
    )


def _is_transparent(call: RopeCall) -> bool:
    # In eager mode the op's own rule saves time and memory; elsewhere torch differentiates, maps and fuses its own operations.
    return not is_plain(call.q, call.k)


def _write(call: RopeCall, rotated: tuple[Tensor, Tensor | None]) -> Outputs:
    q, k = rotated
    call.q.copy_(q)
    if call.k is not None and k is not None:
        call.k.copy_(k)
    return ()


BACKEND = Backend("torch", _rotate, is_transparent=_is_transparent)
REFERENCE = Backend("reference", _rotate_by_reference, is_transparent=always)
IN_PLACE = Backend("torch", lambda call: _write(call, _rotate(call)), is_transparent=always)
REFERENCE_IN_PLACE = Backend("reference", lambda call: _write(call, _rotate_by_reference(call)), is_transparent=always)
