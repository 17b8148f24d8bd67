"""Modules over the ops: attention, norms, positions, feed-forward. torch's constructor names and state_dict keys."""

from .attention import Attention, LayerCache
from .feed_forward import FeedForward
from .linear import Linear
from .norm import LayerNorm, RMSNorm
from .position import AlibiSlopes, RotaryEmbedding, SinusoidalPositions

__all__ = [
    "AlibiSlopes",
    "Attention",
    "FeedForward",
    "LayerCache",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "RotaryEmbedding",
    "SinusoidalPositions",
]
