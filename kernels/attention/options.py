"""The host's side of an attention call, normalised once for all of its kernels: sizes, strides, and what a score is made of."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton.language as tl

from ..launch import NewTensor, cdiv, contiguous_strides, next_power_of_2
from .tile import OptionStrides, RowStrides, ScoreStrides, Traits

if TYPE_CHECKING:
    from pytransformer.ops.attention.call import AttentionCall

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

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """In the order of the kernels' signatures."""
        return self.batch, self.num_heads, self.seqlen_q, self.seqlen_k

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """Of lse and of what else there is one of per row."""
        return (self.num_heads, self.seqlen_q) if self.packed else (self.batch, self.num_heads, self.seqlen_q)

    @property
    def lse_strides(self) -> tuple[int, int]:
        """(batch, head) strides of such a tensor, contiguous."""
        return (0 if self.packed else self.num_heads * self.seqlen_q), self.seqlen_q

    def tiles(self, seqlen: int, block: int) -> int:
        """Tiles of ``block`` rows that cover every sequence whatever its length, and, packed, the rows past the last sequence.

        Sequence b starts at tile ``cu_seqlens[b] // block + b``: enough for its rows, found again by a search, with nothing read back.
        """
        return seqlen // block + self.batch + 1 if self.packed else cdiv(seqlen, block)

    def slots(self, heads: int) -> int:
        """Independent rows of tiles: a packed tile knows its sequence, a dense one is told."""
        return heads if self.packed else self.batch * heads


def geometry(call: AttentionCall) -> Geometry:
    """The sizes of a call."""
    q, k, v, cu_seqlens_q = call.q, call.k, call.v, call.cu_seqlens_q
    return Geometry(
        packed=cu_seqlens_q is not None,
        batch=cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else q.shape[0],
        num_heads=q.shape[-2],
        num_kv_heads=k.shape[-2],
        seqlen_q=q.shape[-3],
        seqlen_k=k.shape[-3],
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
    )


def row_strides(tensor: torch.Tensor) -> RowStrides:
    """(batch, seqlen, head) strides; packed tensors have no batch to step over."""
    if tensor.dim() == 3:
        return RowStrides(0, tensor.stride(0), tensor.stride(1))
    return RowStrides(tensor.stride(0), tensor.stride(1), tensor.stride(2))


def new_row_strides(shape: tuple[int, ...]) -> RowStrides:
    """What :func:`row_strides` says of a new tensor of this shape."""
    return RowStrides(*(0, *contiguous_strides(shape))[-4:-1])


def maker(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Callable[[Any], Any]:
    """A function that makes a new contiguous tensor of this shape; it is given a tensor with the properties of ``like``."""
    if shape == tuple(like.shape):
        return NewTensor(like, dtype)
    strides, dtype, device = contiguous_strides(shape), dtype or like.dtype, like.device
    return lambda like: torch.empty_strided(shape, strides, dtype=dtype, device=device)


def block_dim(dim: int) -> int:
    """Features are padded to a power of two of at least 16, the least that the tensor cores take as depth."""
    return max(16, next_power_of_2(dim))


def window_limits(causal: bool, window: tuple[int, int]) -> tuple[int, int]:
    """Window with causality folded in; negative means unlimited."""
    left, right = window
    return left, (0 if causal else right)


def needs_wide_offsets(block: int, *strides: RowStrides) -> bool:
    """Whether an offset *inside* a tile of ``block`` rows can pass 2^31. Inside one, only rows and features are stepped over: between
    tiles, heads and sequences offsets are 64-bit always, so that no stride of theirs counts."""
    return max(abs(of_tensor.seq) for of_tensor in strides) * block >= 2**31


def dot_precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    """Only float32 has a choice: exact products, or tf32 where torch allows it."""
    return "tf32" if dtype == torch.float32 and allow_tf32 else "ieee"


# Tensors of a call in the order in which the kernels take them after their own, and for each an argument that a prepared launch fills in.
OPTIONAL = ("cu_seqlens_q", "cu_seqlens_k", "bias", "mask", "key_padding_mask", "alibi_slopes", "sinks", "dropout_seed")
OPTIONAL_ARGUMENTS = (None,) * len(OPTIONAL)


class CallTensors:
    """Takes the tensors that the kernels need out of calls that are like one, as the first of what a prepared launch is given.

    Args:
        call: says which tensors there are.
        others: names of the tensors that follow them.
    """

    __slots__ = ("_places", "take")

    def __init__(self, call: AttentionCall, *others: str) -> None:
        names = ["q", "k", "v", *(name for name in OPTIONAL if getattr(call, name) is not None)]
        if call.dropout_p == 0.0 and "dropout_seed" in names:
            names.remove("dropout_seed")
        #: ``take(call)``: the tensors, q first.
        self.take: Callable[[AttentionCall], tuple[torch.Tensor, ...]] = operator.attrgetter(*names)
        self._places = {name: place for place, name in enumerate((*names, *others))}
        if "cu_seqlens_q" in names:
            self._places.setdefault("cu_seqlens_k", self._places["cu_seqlens_q"])

    def order(self, *names: str | None) -> list[int | None]:
        """Where the pointers of a kernel are found: its own, by name or None for one that it does not get, and the optional ones."""
        return [None if name is None else self._places.get(name) for name in (*names, *OPTIONAL)]


class ScoreOptions(NamedTuple):
    """Kernel arguments that say what a score is, the same for the forward and the backward kernels.

    Attributes:
        strides: of the optional tensors.
        scalars: in the order of the signatures.
        traits: the constants.
        pressure: how many things need registers in the loops beside causality: options, dropout counted twice, and padded features.
    """

    strides: OptionStrides
    scalars: tuple[Any, ...]
    traits: Traits
    pressure: int


def score_options(call: AttentionCall, shape: Geometry, allow_tf32: bool) -> ScoreOptions:
    """Folds causality into the window, the scale into the exponent where it may be, and broadcasting into strides of 0."""
    left, right = window_limits(call.causal, call.window)
    # What no pair of positions is far enough apart to leave is no limit. Packed, the totals stand for lengths.
    left = -1 if left >= shape.seqlen_k - 1 else left
    right = -1 if right >= shape.seqlen_q - 1 else right
    dropout_p, softcap, dtype = call.dropout_p, call.softcap, call.q.dtype
    if dropout_p > 0.0 and not isinstance(call.dropout_seed, torch.Tensor):
        raise ValueError("dropout_seed must be an int64[2] tensor when dropout_p > 0")
    tensors = (call.bias, call.mask, call.key_padding_mask, call.alibi_slopes)
    pressure = (left >= 0) + (softcap > 0.0) + 2 * (dropout_p > 0.0) + sum(tensor is not None for tensor in tensors)
    pressure += shape.head_dim != block_dim(shape.head_dim) or shape.value_dim != block_dim(shape.value_dim)
    constants = {
        "HEADS_PER_KV": shape.num_heads // shape.num_kv_heads,
        "HAS_LEFT": left >= 0,
        "HAS_RIGHT": right >= 0,
        # Folding the scale into the multiply-add also needs max(scale * s) = scale * max(s), so a positive one.
        "SCALE_FIRST": dtype == torch.float32
        or softcap > 0.0
        or call.bias is not None
        or call.alibi_slopes is not None
        or call.softmax_scale <= 0.0,
        "HAS_SOFTCAP": softcap > 0.0,
        "HEAD_DIM": shape.head_dim,
        "VALUE_DIM": shape.value_dim,
        "BLOCK_D": block_dim(shape.head_dim),
        "BLOCK_DV": block_dim(shape.value_dim),
        "PRECISION": dot_precision(dtype, allow_tf32),
        "STREAMED": dtype == torch.float32 and not allow_tf32 and max(shape.head_dim, shape.value_dim) > 64,
        "EXACT": dtype == torch.float32,
    }
    return ScoreOptions(
        strides=OptionStrides(*map(_option_strides, OPTION_DIMS, tensors)),
        scalars=(
            call.softmax_scale,
            softcap,
            left,
            right,
            math.ceil(dropout_p * 2**32) - 1,
            1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0,
        ),
        traits=Traits(**{name: tl.constexpr(value) for name, value in constants.items()}),
        pressure=pressure,
    )


# What the dimensions of bias, mask, key_padding_mask and alibi_slopes are among (batch, heads, seqlen_q, seqlen_k), from the last one back.
OPTION_DIMS = ((0, 1, 2, 3), (0, 1, 2, 3), (0, 3), (0, 1))


def _option_strides(dims: tuple[int, ...], tensor: torch.Tensor | None) -> ScoreStrides | None:
    if tensor is None:
        return None
    strides = [0, 0, 0, 0]
    for dim, stride in zip(reversed(dims), reversed(broadcast_strides(tensor.shape, tensor.stride()))):
        strides[dim] = stride
    return ScoreStrides(*strides)


def new_score_strides(like: torch.Tensor | None) -> ScoreStrides:
    """Of a new tensor of the same shape, whose columns lie side by side; zeros without one."""
    if like is None:
        return ScoreStrides(0, 0, 0, 0)
    batch, head, row, _ = (0, 0, 0, *broadcast_strides(like.shape, contiguous_strides(like.shape)))[-4:]
    return ScoreStrides(batch, head, row, 0)


def broadcast_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Strides of 0 where one element serves all, so that nothing is ever expanded."""
    return tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))
