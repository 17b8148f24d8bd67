"""RoPE by the CUDA extension's ops, which check their arguments themselves."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pytransformer import extension
from pytransformer.ops.backend import Backend, Limit, Outputs, mark_changed, no_float64
from pytransformer.ops.rope.call import RopeCall


@functools.cache
def _ops() -> tuple[Any, ...]:
    # What OpOverload.__call__ calls: a tenth of the time of a small call is in that step. "at" takes fewer arguments: each absent one costs
    # its caller as much as a dictionary look-up.
    return tuple(extension.op(name)._op for name in ("rope", "rope_", "rope_at", "rope_at_"))


def _rotate(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, sequence_offsets: Tensor | None,
    cu_seqlens: Tensor | None, interleaved: bool, reverse: bool, offset: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if positions is sequence_offsets is cu_seqlens is None and not reverse:
        rotated = _ops()[2](q, k, cos, sin, offset, interleaved)
    else:
        rotated = _ops()[0](q, k, cos, sin, positions, sequence_offsets, offset, cu_seqlens, interleaved, reverse)
    return (rotated[0], None) if k is None else rotated


def _rotate_in_place(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, sequence_offsets: Tensor | None,
    cu_seqlens: Tensor | None, interleaved: bool, reverse: bool, offset: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if positions is sequence_offsets is cu_seqlens is None and not reverse:
        _ops()[3](q, k, cos, sin, offset, interleaved)
    else:
        _ops()[1](q, k, cos, sin, positions, sequence_offsets, offset, cu_seqlens, interleaved, reverse)
    mark_changed((q,) if k is None else (q, k))
    return q, k


def _run_in_place(call: RopeCall) -> Outputs:
    _rotate_in_place(*call)
    return ()


def _fake(q: Tensor, k: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    rotated_k = q.new_empty(0) if k is None else torch.empty(k.shape, dtype=k.dtype, device=k.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), rotated_k


for _name, _function in (
    ("rope", _fake),
    ("rope_", lambda *_: None),
    ("rope_at", _fake),
    ("rope_at_", lambda *_: None),
):
    extension.register_fake(_name, _function)

_LIMITS = (Limit("float64", no_float64),)
BACKEND = Backend("cuda", lambda call: _rotate(*call), _LIMITS, direct=_rotate)
IN_PLACE = Backend("cuda", _run_in_place, _LIMITS, direct=_rotate_in_place)
