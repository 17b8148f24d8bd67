"""RoPE by the Triton kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pytransformer.ops.backend import Backend, Limit, Outputs, no_float64
from pytransformer.ops.launches import kept
from pytransformer.ops.rope.call import RopeCall, refusal


def _prepare(call: RopeCall, *, inplace: bool = False) -> Any:
    # Triton is imported when the first kernel is wanted, not with the package.
    from pytransformer.kernels.rope import RopeLaunch

    return RopeLaunch(call, inplace=inplace, refuse=refusal(call) if inplace else None)


def _plan(call: RopeCall, *, inplace: bool = False) -> Callable[[RopeCall], tuple[Tensor, Tensor | None]]:
    """A launch for any offset for which the tables have a row for each position."""
    launch, length = _prepare(call, inplace=inplace), call.cos.shape[0]
    highest = length if call.cu_seqlens is not None else length - call.q.shape[-3]
    if call.positions is not None:
        highest = 0

    def launch_at(given: RopeCall) -> tuple[Tensor, Tensor | None]:
        if not 0 <= given[-1] <= highest:
            raise ValueError(f"offsets must be from 0 to {highest}, got {given[-1]}")
        return launch(given)  # type: ignore[no-any-return]

    return launch_at


_launch, _launch_in_place = kept(_prepare, varying=-1), kept(lambda call: _prepare(call, inplace=True), varying=-1)


def _run_in_place(call: RopeCall) -> Outputs:
    _launch_in_place(call)
    return ()


_LIMITS = (Limit("float64", no_float64),)
BACKEND = Backend("triton", _launch, _LIMITS, plan=_plan)
IN_PLACE = Backend("triton", _run_in_place, _LIMITS, plan=lambda call: _plan(call, inplace=True))
