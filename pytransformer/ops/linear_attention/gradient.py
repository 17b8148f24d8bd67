"""The backward pass of linear attention as a registered op: of its call, of what the forward pass returned, and of their gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from pytransformer.ops.linear_attention import by_torch, by_triton
from pytransformer.ops.linear_attention.call import LinearAttentionCall
from pytransformer.ops.registered import RegisteredOp, like


class GradientCall(NamedTuple):
    """A call of the backward pass. ``dout``, ``dlast_state`` and ``dlast_normalizer``: gradients of the three results, last dimension
    contiguous; ``denominator``: what out was divided by."""

    out: Tensor
    denominator: Tensor | None
    dout: Tensor
    dlast_state: Tensor | None
    dlast_normalizer: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    state: Tensor | None
    normalizer: Tensor | None
    feature_map: str
    causal: bool
    normalize: bool
    return_state: bool
    wants_decay: bool

    def call(self) -> LinearAttentionCall:
        """That of the forward pass."""
        return LinearAttentionCall(*self[5:15])


def _outputs(given: GradientCall, backend: str) -> tuple[Any, ...]:
    return (
        *(like(given.q), like(given.k), like(given.v), like(given.decay) if given.wants_decay else None),
        *(like(given.state), like(given.normalizer)),
    )


linear_attention_backward = RegisteredOp(
    "linear_attention_backward",
    GradientCall,
    (by_triton.BACKWARD, by_torch.BACKWARD, by_torch.REFERENCE_BACKWARD),
    _outputs,
    6,
)
