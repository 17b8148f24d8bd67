"""Modules over the ops: attention, norms, positions, feed-forward, mixtures of experts. torch's constructor names and state_dict keys."""

from .attention import Attention, LayerCache
from .experts import Experts, MixtureOfExperts
from .feed_forward import FeedForward
from .linear import Linear, RowBlocks
from .multihead_attention import MultiheadAttention
from .norm import LayerNorm, RMSNorm
from .patch import PatchReport, patch, unpatch
from .position import AlibiBias, AlibiSlopes, RelativeBias, RelativeKeys, RotaryEmbedding, SinusoidalPositions
from .quantized import QuantizedLinear

__all__ = [
    "AlibiBias",
    "AlibiSlopes",
    "Attention",
    "Experts",
    "FeedForward",
    "LayerCache",
    "LayerNorm",
    "Linear",
    "MixtureOfExperts",
    "MultiheadAttention",
    "PatchReport",
    "QuantizedLinear",
    "RMSNorm",
    "RelativeBias",
    "RelativeKeys",
    "RotaryEmbedding",
    "RowBlocks",
    "SinusoidalPositions",
    "patch",
    "unpatch",
]
