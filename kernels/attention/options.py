"""The host's side of an attention call, normalised once for all of its kernels: sizes, strides, and what a score is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..launch import cdiv, next_power_of_2

# Sizes that only bound loops or pick programs: no variant of a kernel is compiled for their being 1 or a multiple of 16.
UNSPECIALISED = (
    "batch",
    "num_heads",
    "seqlen_q",
    "seqlen_k",
    "num_tiles",
    "num_slots",
    "slots_per_group",
    "stride_lse_batch",
    "stride_lse_head",
    "window_left",
    "window_right",
    "dropout_last_out",
    "dbias_rows",
    "tiles_m",
    "tiles_n",
)


@dataclass(frozen=True)
class Geometry:
    """Sizes of a call. Dense: ``seqlen_*`` are lengths; packed: they are the totals, and each sequence's length comes from cu_seqlens."""

    packed: bool
    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    value_dim: int

    def tiles(self, seqlen: int, block: int) -> int:
        """Tiles of ``block`` rows that cover every sequence whatever its length, and, packed, the rows past the last sequence.

        Sequence b starts at tile ``cu_seqlens[b] // block + b``: enough for its rows, found again by a search, with nothing read back.
        """
        return seqlen // block + self.batch + 1 if self.packed else cdiv(seqlen, block)

    def slots(self, heads: int) -> int:
        """Independent rows of tiles: a packed tile knows its sequence, a dense one is told."""
        return heads if self.packed else self.batch * heads


def geometry(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> Geometry:
    packed = cu_seqlens_q is not None
    return Geometry(
        packed=packed,
        batch=cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else q.shape[0],
        num_heads=q.shape[-2],
        num_kv_heads=k.shape[-2],
        seqlen_q=q.shape[-3],
        seqlen_k=k.shape[-3],
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
    )


def row_strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    """(batch, seqlen, head) strides; packed tensors have no batch to step over."""
    if tensor.dim() == 3:
        return 0, tensor.stride(0), tensor.stride(1)
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def statistic_strides(lse: torch.Tensor) -> tuple[int, int]:
    """(batch, head) strides of lse-like tensors: (batch, heads, seqlen_q) or (heads, total_q), last dimension contiguous."""
    return (0, lse.stride(0)) if lse.dim() == 2 else (lse.stride(0), lse.stride(1))


def block_dim(dim: int) -> int:
    """Features are padded to a power of two of at least 16, the least that the tensor cores take as depth."""
    return max(16, next_power_of_2(dim))


def window_limits(causal: bool, window: tuple[int, int]) -> tuple[int, int]:
    """Window with causality folded in; negative means unlimited."""
    left, right = window
    return left, (0 if causal else right)


def needs_wide_offsets(block: int, *tensors: torch.Tensor | None) -> bool:
    """Whether an offset *inside* a tile can pass 2^31 (between tiles they are 64-bit always)."""
    strides = [abs(stride) for tensor in tensors if tensor is not None for stride in tensor.stride()]
    return max(strides, default=0) * block >= 2**31


def dot_precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    """Only float32 has a choice: exact products, or tf32 where torch allows it."""
    return "tf32" if dtype == torch.float32 and allow_tf32 else "ieee"


@dataclass(frozen=True)
class ScoreOptions:
    """Kernel arguments that say what a score is, the same for the forward and the backward kernels, in the order of their signatures.

    Attributes:
        pressure: how many things need registers in the loops beside causality: options, dropout counted twice, and padded features.
    """

    tensors: tuple[Any, ...]
    scalars: tuple[Any, ...]
    constexprs: dict[str, Any]
    pressure: int


def score_options(
    shape: Geometry,
    causal: bool,
    window: tuple[int, int],
    softmax_scale: float,
    softcap: float,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    dtype: torch.dtype,
    allow_tf32: bool,
) -> ScoreOptions:
    """Folds causality into the window, the scale into the exponent where it may be, and broadcasting into strides of 0."""
    left, right = window_limits(causal, window)
    # What no pair of positions is far enough apart to leave is no limit. Packed, the totals stand for lengths.
    left = -1 if left >= shape.seqlen_k - 1 else left
    right = -1 if right >= shape.seqlen_q - 1 else right
    mask, key_padding_mask = _as_bytes(mask), _as_bytes(key_padding_mask)
    if dropout_p > 0.0 and dropout_seed is None:
        raise ValueError("dropout_seed must be an int64[2] tensor when dropout_p > 0")
    tensors = (bias, mask, key_padding_mask, alibi_slopes)
    pressure = (left >= 0) + (softcap > 0.0) + 2 * (dropout_p > 0.0) + sum(tensor is not None for tensor in tensors)
    pressure += shape.head_dim != block_dim(shape.head_dim) or shape.value_dim != block_dim(shape.value_dim)
    return ScoreOptions(
        tensors=(
            bias,
            *strides_of(bias, 4),
            mask,
            *strides_of(mask, 4),
            key_padding_mask,
            *strides_of(key_padding_mask, 2),
            alibi_slopes,
            *strides_of(alibi_slopes, 2),
            sinks,
            dropout_seed if dropout_p > 0.0 else None,
        ),
        scalars=(
            softmax_scale,
            softcap,
            left,
            right,
            math.ceil(dropout_p * 2**32) - 1,
            1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0,
        ),
        constexprs={
            "HEADS_PER_KV": shape.num_heads // shape.num_kv_heads,
            "HAS_LEFT": left >= 0,
            "HAS_RIGHT": right >= 0,
            # Folding the scale into the multiply-add also needs max(scale * s) = scale * max(s), so a positive one.
            "SCALE_FIRST": dtype == torch.float32
            or softcap > 0.0
            or bias is not None
            or alibi_slopes is not None
            or softmax_scale <= 0.0,
            "HAS_SOFTCAP": softcap > 0.0,
            "HEAD_DIM": shape.head_dim,
            "VALUE_DIM": shape.value_dim,
            "BLOCK_D": block_dim(shape.head_dim),
            "BLOCK_DV": block_dim(shape.value_dim),
            "PRECISION": dot_precision(dtype, allow_tf32),
            "STREAMED": dtype == torch.float32 and not allow_tf32 and max(shape.head_dim, shape.value_dim) > 64,
        },
        pressure=pressure,
    )


def _as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def strides_of(tensor: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides after broadcasting to ``dims`` dimensions: 0 where the tensor is repeated, so that nothing is ever expanded."""
    if tensor is None:
        return (0,) * dims
    strides = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (0,) * (dims - tensor.dim()) + tuple(strides)
