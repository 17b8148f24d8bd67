"""Rotary position embedding of q and k in one launch, out of place or in place; its gradient is the same with the angle reversed.

    (x1, x2) -> (x1 · cos - x2 · sin, x2 · cos + x1 · sin)             for each pair of the first rotary_dim features
    half layout: x1 = x[i], x2 = x[i + rotary_dim / 2];  interleaved: x1 = x[2i], x2 = x[2i + 1]

Bound by memory: 3 FLOP per element; 2b bytes per element of b bytes of q and k, plus 4 · rotary_dim bytes of cos and sin per token,
which a program reads once for all heads of its tokens. Arithmetic in float32, one rounding. The first heads of q and k are under way before
it is known which rows of the tables they need; nothing goes through shared memory, no thread waits for another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .launch import COMMON_OPTIONS, NewTensor, cdiv, contiguous_strides, next_power_of_2
from .prepared import PreparedLaunch, Varying

if TYPE_CHECKING:
    from pytransformer.ops.rope.call import RopeCall

# ------------------------------------------------------------------------------------------------------------------ launch policy


@dataclass(frozen=True)
class RopeConfig:
    """Tile and launch shape of the RoPE kernel.

    Attributes:
        block_tokens: tokens per program.
        block_heads: heads of q per tile; a program loops over the rest.
        block_kv_heads: heads of k per tile.
        num_warps: warps per program.
    """

    block_tokens: int
    block_heads: int
    block_kv_heads: int
    num_warps: int


def rope_config(rotary_dim: int, num_heads: int, num_kv_heads: int) -> RopeConfig:
    """Tiles of 2048 pairs over 4 warps: 16 pairs a thread, two 128-bit loads of each half of a pair in 16-bit data.

    Few heads are made up for by more tokens, so that the loads stay wide: with one token and 8 heads of 128 features a thread would
    hold four pairs, 64 bits.
    """
    half = next_power_of_2(rotary_dim // 2)
    block_heads = min(next_power_of_2(num_heads), max(1, 1024 // half))
    block_kv_heads = min(next_power_of_2(num_kv_heads), max(1, 1024 // half))
    block_tokens = max(1, min(2048 // (half * block_heads), 16))
    return RopeConfig(block_tokens, block_heads, block_kv_heads, num_warps=4)


# ------------------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _heads_of_tokens(
    token_offsets, stride_head, token_mask, first_head, num_heads, ALIGNMENT: tl.constexpr, BLOCK_HEADS: tl.constexpr
):
    """(offsets, mask) of BLOCK_HEADS heads of each token, (BLOCK_TOKENS, BLOCK_HEADS, 1)."""
    heads = first_head + tl.arange(0, BLOCK_HEADS)
    rows = token_offsets[:, None, None] + tl.multiple_of(heads.to(tl.int64) * stride_head, ALIGNMENT)[None, :, None]
    return rows, token_mask[:, None, None] & (heads < num_heads)[None, :, None]


@triton.jit
def _read_heads(
    x_ptr, token_offsets, stride_head, token_mask, first_head, num_heads,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """The pairs of BLOCK_HEADS heads of each token as they are in memory: first and second halves, or twice the same neighbours."""
    rows, mask = _heads_of_tokens(token_offsets, stride_head, token_mask, first_head, num_heads, ALIGNMENT, BLOCK_HEADS)
    if INTERLEAVED:
        # Both of a pair come with one load, and are taken apart in registers.
        cols = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        x1 = tl.load(x_ptr + rows + cols, mask=mask & (cols < 2 * HALF), other=0.0)
        x2 = x1
    else:
        cols = tl.arange(0, BLOCK_HALF)[None, None, :]
        mask = mask & (cols < HALF)
        x1 = tl.load(x_ptr + rows + cols, mask=mask, other=0.0)
        x2 = tl.load(x_ptr + rows + (cols + HALF), mask=mask, other=0.0)
    return x1, x2


@triton.jit
def _read_tables(
    cos_ptr, sin_ptr, cos_offsets, sin_offsets, token_mask,
    HALF: tl.constexpr, REVERSE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """(cos, sin) of a tile, (BLOCK_TOKENS, BLOCK_HEADS, BLOCK_HALF).

    One for each element, though all heads share them: so each thread loads those of its own part of a tile, once for all tiles and from
    the first-level cache, where those of one head would be spread through shared memory, with a barrier each.
    """
    pairs = tl.arange(0, BLOCK_HALF)[None, None, :]
    columns = tl.broadcast_to(pairs, [BLOCK_TOKENS, BLOCK_HEADS, BLOCK_HALF])
    table_mask = token_mask[:, None, None] & (columns < HALF)
    cos = tl.load(cos_ptr + cos_offsets[:, None, None] + columns, mask=table_mask, other=0.0)
    sin = tl.load(sin_ptr + sin_offsets[:, None, None] + columns, mask=table_mask, other=0.0)
    if REVERSE:
        sin = -sin
    return cos, sin


@triton.jit
def _rotate_heads(
    x1, x2, x_ptr, token_offsets, stride_head, out_ptr, out_token_offsets, stride_out_head, token_mask, num_heads,
    cos, sin,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, COPY_REST: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Rotates all heads of BLOCK_TOKENS tokens, of which the first BLOCK_HEADS were read: x1, x2."""
    for first_head in range(0, num_heads, BLOCK_HEADS):
        out_rows, head_mask = _heads_of_tokens(
            out_token_offsets, stride_out_head, token_mask, first_head, num_heads, ALIGNMENT, BLOCK_HEADS
        )
        if INTERLEAVED:
            cols = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
            mask = head_mask & (cols < 2 * HALF)
            neighbours = tl.reshape(x1, [BLOCK_TOKENS, BLOCK_HEADS, BLOCK_HALF, 2])
            first, second = tl.split(neighbours.to(tl.float32))
            rotated = tl.join(first * cos - second * sin, second * cos + first * sin)
            rotated = tl.reshape(rotated, [BLOCK_TOKENS, BLOCK_HEADS, 2 * BLOCK_HALF])
            tl.store(out_ptr + out_rows + cols, rotated.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            cols = tl.arange(0, BLOCK_HALF)[None, None, :]
            mask = head_mask & (cols < HALF)
            first, second = x1.to(tl.float32), x2.to(tl.float32)
            new_first, new_second = first * cos - second * sin, second * cos + first * sin
            tl.store(out_ptr + out_rows + cols, new_first.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(out_ptr + out_rows + (cols + HALF), new_second.to(out_ptr.dtype.element_ty), mask=mask)
        if COPY_REST:
            rows, _ = _heads_of_tokens(
                token_offsets, stride_head, token_mask, first_head, num_heads, ALIGNMENT, BLOCK_HEADS
            )
            cols = 2 * HALF + tl.arange(0, BLOCK_REST)[None, None, :]
            mask = head_mask & (cols < HEAD_DIM)
            tl.store(out_ptr + out_rows + cols, tl.load(x_ptr + rows + cols, mask=mask, other=0.0), mask=mask)
        if first_head + BLOCK_HEADS < num_heads:
            x1, x2 = _read_heads(
                x_ptr, token_offsets, stride_head, token_mask, first_head + BLOCK_HEADS, num_heads,
                HALF, INTERLEAVED, ALIGNMENT, BLOCK_HEADS, BLOCK_HALF,
            )  # fmt: skip


# Integers that differ from call to call of one model must not make Triton compile again. What it would learn from strides that are
# multiples of 16, ALIGNMENT says.
UNSPECIALISED = [
    *(f"stride_{tensor}_{dim}" for tensor in ("q", "k", "q_out", "k_out") for dim in ("batch", "seqlen", "head")),
    *("stride_positions_batch", "num_tokens", "seqlen", "offset", "num_sequences", "table_length"),
]


@triton.jit(do_not_specialize=UNSPECIALISED)
def rope_kernel(
    q_ptr,
    stride_q_batch,
    stride_q_seqlen,
    stride_q_head,
    k_ptr,
    stride_k_batch,
    stride_k_seqlen,
    stride_k_head,
    q_out_ptr,
    stride_q_out_batch,
    stride_q_out_seqlen,
    stride_q_out_head,
    k_out_ptr,
    stride_k_out_batch,
    stride_k_out_seqlen,
    stride_k_out_head,
    cos_ptr,
    stride_cos_position,
    sin_ptr,
    stride_sin_position,
    positions_ptr,
    stride_positions_batch,
    stride_positions_seqlen,
    offsets_ptr,
    stride_offsets,
    cu_seqlens_ptr,
    num_tokens,
    seqlen,
    num_heads,
    num_kv_heads,
    offset,
    num_sequences,
    table_length,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HAS_K: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    IS_PACKED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    REVERSE: tl.constexpr,
    COPY_REST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
):
    """BLOCK_TOKENS tokens of the flattened (batch, seqlen), all their heads. Packed sequences are one batch of num_tokens."""
    # Unsigned, and as wide as the number of tokens is: 64-bit divisions would be calls, and what all loads wait for.
    COUNT: tl.constexpr = tl.uint64 if num_tokens.dtype.primitive_bitwidth == 64 else tl.uint32
    INTEGER: tl.constexpr = num_tokens.dtype
    num_tokens = num_tokens.to(COUNT)
    tokens = tl.program_id(0).to(COUNT) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS).to(COUNT)
    token_mask = tokens < num_tokens
    batch = (tokens // seqlen.to(COUNT)).to(INTEGER).to(tl.int64)
    index = (tokens % seqlen.to(COUNT)).to(INTEGER).to(tl.int64)

    # q and k are read before it is known where their tokens stand, which takes two loads, one after the other.
    q_offsets = tl.multiple_of(batch * stride_q_batch + index * stride_q_seqlen, ALIGNMENT)
    q1, q2 = _read_heads(
        q_ptr, q_offsets, stride_q_head, token_mask, 0, num_heads, HALF, INTERLEAVED, ALIGNMENT, BLOCK_HEADS, BLOCK_HALF
    )
    if HAS_K:
        k_offsets = tl.multiple_of(batch * stride_k_batch + index * stride_k_seqlen, ALIGNMENT)
        if not INTERLEAVED or BLOCK_KV_HEADS < BLOCK_HEADS:
            k1, k2 = _read_heads(
                k_ptr, k_offsets, stride_k_head, token_mask, 0, num_kv_heads,
                HALF, INTERLEAVED, ALIGNMENT, BLOCK_KV_HEADS, BLOCK_HALF,
            )  # fmt: skip

    if HAS_POSITIONS:
        places = batch * stride_positions_batch + index * stride_positions_seqlen
        positions = tl.load(positions_ptr + places, mask=token_mask, other=0).to(tl.int64)
    else:
        sequence = batch
        start = tl.zeros([BLOCK_TOKENS], dtype=tl.int64)
        if IS_PACKED:
            # The sequence of a token is the last one that starts at or before it: count the starts, keep the largest.
            # No binary search: its steps would wait for each other, these loads do not.
            count = tl.zeros([BLOCK_TOKENS], dtype=tl.int32)
            for first in range(0, num_sequences, BLOCK_SEQUENCES):
                entries = first + tl.arange(0, BLOCK_SEQUENCES)
                starts = tl.load(cu_seqlens_ptr + entries, mask=entries < num_sequences, other=0x7FFFFFFF).to(tl.int64)
                begun = starts[None, :] <= index[:, None]
                count += tl.sum(begun.to(tl.int32), axis=1)
                start = tl.maximum(start, tl.max(tl.where(begun, starts[None, :], 0), axis=1))
            sequence = tl.maximum(count - 1, 0).to(tl.int64)
        positions = index - start + offset
        if HAS_OFFSETS:
            positions += tl.load(offsets_ptr + sequence * stride_offsets, mask=token_mask, other=0).to(tl.int64)
    # A position outside of the table is an error that the host may not have seen: it must at least not read outside.
    positions = tl.minimum(tl.maximum(positions, 0), table_length - 1)

    cos_offsets, sin_offsets = positions * stride_cos_position, positions * stride_sin_position
    cos, sin = _read_tables(
        cos_ptr, sin_ptr, cos_offsets, sin_offsets, token_mask, HALF, REVERSE, BLOCK_TOKENS, BLOCK_HEADS, BLOCK_HALF
    )
    _rotate_heads(
        q1, q2, q_ptr, q_offsets, stride_q_head,
        q_out_ptr, tl.multiple_of(batch * stride_q_out_batch + index * stride_q_out_seqlen, ALIGNMENT), stride_q_out_head,
        token_mask, num_heads, cos, sin,
        HEAD_DIM, HALF, INTERLEAVED, COPY_REST, ALIGNMENT, BLOCK_TOKENS, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    if HAS_K:
        if INTERLEAVED and BLOCK_KV_HEADS >= BLOCK_HEADS:
            # Read now, as two tiles of this size spill in the loop on sm_80.
            k1, k2 = _read_heads(
                k_ptr, k_offsets, stride_k_head, token_mask, 0, num_kv_heads,
                HALF, INTERLEAVED, ALIGNMENT, BLOCK_KV_HEADS, BLOCK_HALF,
            )  # fmt: skip
        if BLOCK_KV_HEADS != BLOCK_HEADS:
            cos, sin = _read_tables(
                cos_ptr,
                sin_ptr,
                cos_offsets,
                sin_offsets,
                token_mask,
                HALF,
                REVERSE,
                BLOCK_TOKENS,
                BLOCK_KV_HEADS,
                BLOCK_HALF,
            )
        _rotate_heads(
            k1, k2, k_ptr, k_offsets, stride_k_head,
            k_out_ptr, tl.multiple_of(batch * stride_k_out_batch + index * stride_k_out_seqlen, ALIGNMENT), stride_k_out_head,
            token_mask, num_kv_heads, cos, sin,
            HEAD_DIM, HALF, INTERLEAVED, COPY_REST, ALIGNMENT, BLOCK_TOKENS, BLOCK_KV_HEADS, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------- launcher


class RopeLaunch:
    """The launch for calls of certain shapes, strides, dtypes and options, to be called with such any number of times.

    Args:
        call: a checked call, of whose tensors only shapes, strides and dtypes count.
        inplace: write into q and k.
        config: overrides the launch policy, for tests.
        refuse: is shown a call's tensors, in order, and raises if the kernel must not be launched with such addresses.
    """

    def __init__(
        self,
        call: RopeCall,
        *,
        inplace: bool = False,
        config: RopeConfig | None = None,
        refuse: Callable[[Sequence[Tensor | None]], None] | None = None,
    ) -> None:
        q, k, cos, sin, positions = call.q, call.k, call.cos, call.sin, call.positions
        offset_tensor, cu_seqlens = call.sequence_offsets, call.cu_seqlens
        self._new_q = None if inplace else NewTensor(q)
        self._new_k = None if inplace or k is None else NewTensor(k)
        self._launch: PreparedLaunch | None = None
        if q.numel() + (0 if k is None else k.numel()) == 0:
            return
        batch, seqlen = (1, q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[1])
        head_dim, half = q.shape[-1], cos.shape[-1]
        num_heads, num_kv_heads = q.shape[-2], 0 if k is None else k.shape[-2]
        rows = [_token_and_head_strides(tensor) for tensor in (q, k)]
        rows += rows if inplace else [_new_strides(tensor) for tensor in (q, k)]
        position_strides = (0, 0)
        if positions is not None:
            position_strides = (positions.stride(0) if positions.dim() == 2 else 0, positions.stride(-1))
        num_sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        config = config or rope_config(2 * half, num_heads, num_kv_heads)
        arguments = (
            *(q, *rows[0], k, *rows[1], None, *rows[2], None, *rows[3]),
            *(cos, cos.stride(0), sin, sin.stride(0), positions, *position_strides),
            *(offset_tensor, 0 if offset_tensor is None else offset_tensor.stride(0), cu_seqlens),
            *(batch * seqlen, seqlen, num_heads, num_kv_heads, Varying(0), num_sequences, cos.shape[0]),
        )
        constants = {
            "HEAD_DIM": head_dim,
            "HALF": half,
            "HAS_K": k is not None,
            "HAS_POSITIONS": positions is not None,
            "HAS_OFFSETS": offset_tensor is not None,
            "IS_PACKED": cu_seqlens is not None and positions is None,
            "INTERLEAVED": call.interleaved,
            "REVERSE": call.reverse,
            "COPY_REST": not inplace and head_dim > 2 * half,
            "ALIGNMENT": math.gcd(16, *(stride for strides in rows for stride in strides)),
            "BLOCK_TOKENS": config.block_tokens,
            "BLOCK_HEADS": config.block_heads,
            "BLOCK_KV_HEADS": config.block_kv_heads,
            "BLOCK_HALF": next_power_of_2(half),
            "BLOCK_REST": next_power_of_2(head_dim - 2 * half),
            # Two sizes rather than one for each power of two, which would all have to be compiled.
            "BLOCK_SEQUENCES": 1 if cu_seqlens is None else 16 if num_sequences <= 16 else 256,
            "num_warps": config.num_warps,
            **COMMON_OPTIONS,
        }
        grid, order = (cdiv(batch * seqlen, config.block_tokens),), (0, 1, 7, 8, 2, 3, 4, 5, 6)
        self._launch = PreparedLaunch(rope_kernel, grid, arguments, constants, order, refuse)

    def __call__(self, call: RopeCall) -> tuple[Tensor, Tensor | None]:
        """(q, k): new contiguous tensors, or the inputs if in place. ``call`` may be a plain tuple in the order of the arguments."""
        q, k, cos, sin, positions, sequence_offsets, cu_seqlens, _, _, offset = call
        new_q, new_k = self._new_q, self._new_k
        q_out = q if new_q is None else new_q(q)
        k_out = k if new_k is None or k is None else new_k(k)
        if self._launch is not None:
            self._launch((q, k, cos, sin, positions, sequence_offsets, cu_seqlens, q_out, k_out), (offset,))
        return q_out, k_out


def _new_strides(x: Tensor | None) -> tuple[int, int, int]:
    """What :func:`_token_and_head_strides` says of a new tensor of this shape."""
    if x is None:
        return 0, 0, 0
    batch, seqlen, head, _ = (0, *contiguous_strides(x.shape))[-4:]
    return batch, seqlen, head


def _token_and_head_strides(x: Tensor | None) -> tuple[int, int, int]:
    """(batch, seqlen, head) strides; a packed tensor is one batch."""
    if x is None:
        return 0, 0, 0
    return (0, x.stride(0), x.stride(1)) if x.dim() == 3 else (x.stride(0), x.stride(1), x.stride(2))
