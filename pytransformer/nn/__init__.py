"""Modules over the ops: attention, norms, positions, feed-forward. torch's constructor names and state_dict keys."""

from .attention import Attention, LayerCache
from .feed_forward import FeedForward
from .linear import Linear
from .multihead_attention import MultiheadAttention
from .norm import LayerNorm, RMSNorm
from .patch import PatchReport, patch, unpatch
from .position import AlibiBias, AlibiSlopes, RelativeBias, RotaryEmbedding, SinusoidalPositions

__all__ = [
    "AlibiBias",
    "AlibiSlopes",
    "Attention",
    "FeedForward",
    "LayerCache",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "PatchReport",
    "RMSNorm",
    "RelativeBias",
    "RotaryEmbedding",
    "SinusoidalPositions",
    "patch",
    "unpatch",
]
