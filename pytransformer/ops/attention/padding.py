"""A head_dim that is no multiple of 8, for kernels that read 16 bytes at once.

Features of value 0 change no product and bring no value; what comes back for them is cut off. softmax_scale was chosen before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pytransformer.ops.attention.call import AttentionCall
from pytransformer.ops.backend import Outputs

_MULTIPLE = 8


def is_padded(call: AttentionCall) -> bool:
    """Whether the kernels are given copies of q and k, or of v."""
    return bool(call.q.shape[-1] % _MULTIPLE or call.v.shape[-1] % _MULTIPLE)


def padded(run: Callable[[AttentionCall], Outputs]) -> Callable[[AttentionCall], Outputs]:
    """``run`` for any head_dim: (out, lse)."""

    def run_padded(call: AttentionCall) -> Outputs:
        if not is_padded(call):
            return run(call)
        out, lse = run(_padded(call, ("q", "k", "v")))
        assert out is not None
        return _cut(out, call.v), lse

    return run_padded


def padded_backward(
    run: Callable[[Any, AttentionCall], Outputs],
) -> Callable[[Any, AttentionCall], Outputs]:
    """``run``, of the gradient's call and the forward pass's, for any head_dim: (dq, dk, dv, …)."""

    def run_padded(given: Any, call: AttentionCall) -> Outputs:
        if not is_padded(call):
            return run(given, call)
        wide = _padded(given, ("q", "k", "v", "out", "dout"))
        dq, dk, dv, *others = run(wide, call._replace(q=wide.q, k=wide.k, v=wide.v))
        assert dq is not None and dk is not None and dv is not None
        return (_cut(dq, call.q), _cut(dk, call.k), _cut(dv, call.v), *others)

    return run_padded


def _padded(call: Any, names: tuple[str, ...]) -> Any:
    tensors = {name: getattr(call, name) for name in names}
    return call._replace(
        **{name: F.pad(tensor, (0, -tensor.shape[-1] % _MULTIPLE)) for name, tensor in tensors.items()}
    )


def _cut(tensor: Tensor, like: Tensor) -> Tensor:
    """The features that ``like`` has; no view, which would keep the others too."""
    return tensor[..., : like.shape[-1]].contiguous()
