"""Kernels launched once, with options by name: what a launch class takes as one call, written as tests like to write it."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from pytransformer.kernels.rope import RopeLaunch
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
