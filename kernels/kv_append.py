"""KV-cache append: QK-norm, RoPE, quantisation and the write of new keys and values, in one launch.

    k' = rope(rms_norm(k)),  v' = v,  q' = rope(rms_norm(q));   cache[place of the token] = k', v', or their codes round(clamp(x / scale))

Cost: k, v and q are read once and written once, ``2 · tokens · (2 · num_kv_heads + num_heads) · head_dim`` elements, a handful of FLOP
each: memory-bound, and for a decode step (a few tokens) nothing but the latency of one small launch.

A program takes a few tokens × a few heads, either of q or of k and v, as the rows of one tile. Where a token goes is worked out by
every program for its own rows: from ``slot_mapping``, or from the sequence's length before appending and, paged, the block table. A
token without a place (negative slot; a position, page or row that does not exist) is dropped. Results round where the separate
operations would: norm and rotation each to the dtype of k; the divisions of quantisation are IEEE float32 divisions, so that codes
match bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention.options import row_strides
from .features import (
    encode,
    load_part,
    load_parts,
    normalise_parts,
    rotate_halves,
    rotate_neighbours,
    store_part,
    store_parts,
)
from .launch import (
    COMMON_OPTIONS,
    NewTensor,
    as_bytes,
    cdiv,
    device_limits,
    next_power_of_2,
    scale_strides,
    strides_by_name,
    viewed,
)
from .prepared import PreparedLaunch, by_name

if TYPE_CHECKING:
    from pytransformer.ops.kv_append.call import AppendCall

HIGHEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}


# ---------------------------------------------------------------------------------------------------------------------------------------
# Launch policy.


@dataclass(frozen=True)
class AppendConfig:
    """Tile of a program: ``block_tokens`` × ``block_heads`` rows (powers of two)."""

    block_tokens: int
    block_heads: int
    num_warps: int


def append_config(tokens: int, num_kv_heads: int, head_dim: int, itemsize: int, device: torch.device) -> AppendConfig:
    """Rows per program from the size of a row, tokens per program from the number of tokens."""
    row_bytes = next_power_of_2(head_dim) * itemsize
    # 4 KB per program of 4 warps is two 128-bit loads per thread, as many of v, and twice as many of cos and sin: with nine blocks per SM
    # that covers the latency.
    rows = max(1, 4096 // row_bytes)
    block_heads = min(next_power_of_2(num_kv_heads), 8, rows)
    # A decode step has fewer tokens than SMs: one token per program spreads it; there is no bandwidth to win.
    few = tokens <= 4 * device_limits(device).num_sms
    block_tokens = 1 if few else max(1, rows // block_heads)
    num_warps = 4 if block_tokens * block_heads * row_bytes >= 2048 else 1
    return AppendConfig(block_tokens, block_heads, num_warps)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Device side.


@triton.jit
def _find_sequence(cu_seqlens_ptr, tokens, batch, search_steps):
    """The sequence of each packed token: the last b in [0, batch] with ``cu_seqlens[b] <= token``; ``batch`` = past the last one."""
    low = tl.zeros_like(tokens)
    high = low + batch + 1
    for _ in range(search_steps):
        middle = (low + high) // 2
        inside = high - low > 1
        start = tl.load(cu_seqlens_ptr + middle, mask=inside, other=0)
        low = tl.where(inside & (start <= tokens), middle, low)
        high = tl.where(inside & (start > tokens), middle, high)
    return low


@triton.jit
def _place(
    token, exists, sequence, index, cache_seqlens_ptr, slot_mapping_ptr, block_table_ptr, stride_block_table_batch, cache_batch_idx_ptr,
    num_pages, page_size, num_places,
):  # fmt: skip
    """(page or row, offset in it, whether there is such a place, position in the sequence) of each token."""
    # Places that exist have numbers as wide as their number is; others are dropped before these are taken apart.
    COUNT: tl.constexpr = tl.uint64 if num_places.dtype.primitive_bitwidth == 64 else tl.uint32
    position = index.to(tl.int64)
    if slot_mapping_ptr is not None:
        place = tl.load(slot_mapping_ptr + token, mask=exists, other=-1)
    else:
        position += tl.load(cache_seqlens_ptr + sequence, mask=exists, other=0)
        place = position
    exists = exists & (place >= 0) & (place < num_places)
    page = sequence
    offset = place
    if slot_mapping_ptr is not None or block_table_ptr is not None:
        place = tl.where(exists, place, 0).to(COUNT)
        page = (place // page_size.to(COUNT)).to(num_places.dtype)
        offset = (place % page_size.to(COUNT)).to(num_places.dtype)
    if block_table_ptr is not None:
        page = tl.load(block_table_ptr + sequence.to(tl.int64) * stride_block_table_batch + page, mask=exists, other=-1)
    if cache_batch_idx_ptr is not None:
        page = tl.load(cache_batch_idx_ptr + sequence, mask=exists, other=-1)
    exists = exists & (page >= 0) & (page < num_pages)
    return page.to(tl.int64), offset.to(tl.int64), exists, position


@triton.jit
def _load_features(
    rows_ptr, weight_ptr, other_weight_ptr, rows, mask,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """(parts of rows, parts of the weight of their norm): of the other norm where this has none, of no norm again the rows."""
    first, second, rest = load_parts(rows_ptr, mask, DIM, HALF, BLOCK_DIM, BLOCK_HALF, BLOCK_REST)
    weight_first, weight_second, weight_rest = first, second, rest
    if weight_ptr is not None or other_weight_ptr is not None:
        # For each row, though all share it: so each thread has what belongs to its features, and nothing goes through shared memory.
        weights_ptr = (other_weight_ptr if weight_ptr is None else weight_ptr) + rows * 0
        weight_first, weight_second, weight_rest = load_parts(
            weights_ptr, mask, DIM, HALF, BLOCK_DIM, BLOCK_HALF, BLOCK_REST
        )
        if weight_ptr is not None and other_weight_ptr is not None:  # noqa: SIM102
            if weight_ptr.dtype != other_weight_ptr.dtype:
                weight_first = weight_first.to(tl.float32)
                weight_second, weight_rest = weight_second.to(tl.float32), weight_rest.to(tl.float32)
    return first, second, rest, weight_first, weight_second, weight_rest


@triton.jit
def _write_codes(
    first, second, rest, cache_rows_ptr, scale_ptr, stride_scale_page, stride_scale_token, stride_scale_head, page, offset, head, exists,
    highest, DIM: tl.constexpr, HALF: tl.constexpr, FORMAT: tl.constexpr, SCALE_PER_TOKEN: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Writes the codes of rows, and their scales if each has its own."""
    scale_place = scale_ptr + page * stride_scale_page + offset * stride_scale_token + head * stride_scale_head
    if SCALE_PER_TOKEN:
        largest = tl.max(tl.abs(first.to(tl.float32)), 1)
        if HALF > 0:
            largest = tl.maximum(largest, tl.max(tl.abs(second.to(tl.float32)), 1))
            if 2 * HALF < DIM:
                largest = tl.maximum(largest, tl.max(tl.abs(rest.to(tl.float32)), 1))
        scale = tl.div_rn(largest, tl.zeros_like(largest) + highest)
        scale = tl.where(scale > 0.0, scale, 1.0)
        tl.store(scale_place, scale, mask=exists)
    else:
        scale = tl.load(scale_place, mask=exists, other=1.0)
    first = encode(first, scale, FORMAT)
    if HALF > 0:
        second = encode(second, scale, FORMAT)
        if 2 * HALF < DIM:
            rest = encode(rest, scale, FORMAT)
    store_parts(cache_rows_ptr, first, second, rest, exists, DIM, HALF, BLOCK_DIM, BLOCK_HALF, BLOCK_REST)


# Integers that differ from call to call of one model, or with the size of a cache, must not make Triton compile again.
UNSPECIALISED = [
    "tokens", "seqlen", "batch", "search_steps", "num_pages", "page_size", "num_places", "table_length", "stride_block_table_batch",
    "stride_k_scale_page", "stride_v_scale_page",
]  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def _kv_append_kernel(
    k_ptr, stride_k_batch, stride_k_token, stride_k_head,
    v_ptr, stride_v_batch, stride_v_token, stride_v_head,
    q_ptr, stride_q_batch, stride_q_token, stride_q_head,
    new_q_ptr,
    k_cache_ptr, stride_k_cache_page, stride_k_cache_token, stride_k_cache_head,
    v_cache_ptr, stride_v_cache_page, stride_v_cache_token, stride_v_cache_head,
    k_scale_ptr, stride_k_scale_page, stride_k_scale_token, stride_k_scale_head,
    v_scale_ptr, stride_v_scale_page, stride_v_scale_token, stride_v_scale_head,
    cache_seqlens_ptr, slot_mapping_ptr, block_table_ptr, stride_block_table_batch, cu_seqlens_ptr, cache_batch_idx_ptr,
    positions_ptr, cos_ptr, sin_ptr, stride_cos, q_norm_weight_ptr, k_norm_weight_ptr, eps, weight_offset, highest,
    tokens, seqlen, batch, search_steps, num_pages, page_size, num_places, table_length,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr, Q_BLOCKS: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    FORMAT: tl.constexpr, SCALE_PER_TOKEN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    # The half of the features that parts are cut by; neighbours that rotate are in one thread anyway.
    HALF: tl.constexpr = 0 if INTERLEAVED else ROTARY_DIM // 2
    pid = tl.program_id(0)
    head_block = pid % HEAD_BLOCKS
    is_q = head_block < Q_BLOCKS
    rows = tl.arange(0, BLOCK_TOKENS * BLOCK_HEADS)
    # Unsigned, and as wide as the number of tokens is: 64-bit divisions would be calls, and what all loads wait for.
    COUNT: tl.constexpr = tl.uint64 if tokens.dtype.primitive_bitwidth == 64 else tl.uint32
    token = (pid // HEAD_BLOCKS).to(COUNT) * BLOCK_TOKENS + (rows // BLOCK_HEADS).to(COUNT)
    exists = token < tokens.to(COUNT)
    # Where k, v and q of the token are; packed tensors have one row, of all tokens.
    row = (token // seqlen.to(COUNT)).to(tokens.dtype).to(tl.int64)
    column = (token % seqlen.to(COUNT)).to(tokens.dtype).to(tl.int64)
    token = token.to(tokens.dtype)
    head = tl.where(is_q, head_block, head_block - Q_BLOCKS) * BLOCK_HEADS + rows % BLOCK_HEADS
    read = exists & (head < tl.where(is_q, NUM_HEADS, NUM_KV_HEADS))
    head = head.to(tl.int64)

    # The features are read before it is known where they go and how they turn, which takes one load after the other.
    # Branches, not a choice between pointers: of such Triton does not see that they are aligned.
    k_rows_ptr = k_ptr + (row * stride_k_batch + column * stride_k_token + head * stride_k_head)
    if q_ptr is not None:
        if head_block < Q_BLOCKS:
            q_rows_ptr = q_ptr + (row * stride_q_batch + column * stride_q_token + head * stride_q_head)
            first, second, rest, weight_first, weight_second, weight_rest = _load_features(
                q_rows_ptr,
                q_norm_weight_ptr,
                k_norm_weight_ptr,
                rows,
                read,
                DIM,
                HALF,
                BLOCK_DIM,
                BLOCK_HALF,
                BLOCK_REST,
            )
        else:
            first, second, rest, weight_first, weight_second, weight_rest = _load_features(
                k_rows_ptr,
                k_norm_weight_ptr,
                q_norm_weight_ptr,
                rows,
                read,
                DIM,
                HALF,
                BLOCK_DIM,
                BLOCK_HALF,
                BLOCK_REST,
            )
    else:
        first, second, rest, weight_first, weight_second, weight_rest = _load_features(
            k_rows_ptr, k_norm_weight_ptr, q_norm_weight_ptr, rows, read, DIM, HALF, BLOCK_DIM, BLOCK_HALF, BLOCK_REST
        )
    v_rows_ptr = v_ptr + row * stride_v_batch + column * stride_v_token + head * stride_v_head
    v = load_part(v_rows_ptr, exists & (head < tl.where(is_q, 0, NUM_KV_HEADS)), 0, VALUE_DIM, BLOCK_VALUE_DIM)

    sequence, index, in_sequence = row, column, exists
    if cu_seqlens_ptr is not None:
        sequence = _find_sequence(cu_seqlens_ptr, token, batch, search_steps)
        in_sequence = exists & (sequence < batch)
        index = token - tl.load(cu_seqlens_ptr + sequence, mask=in_sequence, other=0)
    page, offset, has_place, position = _place(
        token, in_sequence, sequence, index, cache_seqlens_ptr, slot_mapping_ptr, block_table_ptr, stride_block_table_batch,
        cache_batch_idx_ptr, num_pages, page_size, num_places,
    )  # fmt: skip

    if q_norm_weight_ptr is not None or k_norm_weight_ptr is not None:
        scaled_first, scaled_second, scaled_rest = normalise_parts(
            first, second, rest, weight_first, weight_second, weight_rest, eps, weight_offset, DIM, HALF
        )
        # Both are normed, or one is.
        normed = True
        if q_norm_weight_ptr is None:
            normed = head_block >= Q_BLOCKS
        if k_norm_weight_ptr is None:
            normed = is_q
        first, second = tl.where(normed, scaled_first, first), tl.where(normed, scaled_second, second)
        rest = tl.where(normed, scaled_rest, rest)
    if ROTARY_DIM > 0:
        if positions_ptr is not None:
            position = tl.load(positions_ptr + token, mask=exists, other=0).to(tl.int64)
        else:
            position = tl.where(in_sequence, position, 0)
        # A dropped token may lie beyond the table; it takes the last row, and nobody reads the result.
        angles = tl.minimum(tl.maximum(position, 0), table_length - 1) * stride_cos
        TABLE_BLOCK: tl.constexpr = BLOCK_DIM // 2 if INTERLEAVED else BLOCK_HALF
        cos = load_part(cos_ptr + angles, read, 0, ROTARY_DIM // 2, TABLE_BLOCK)
        sin = load_part(sin_ptr + angles, read, 0, ROTARY_DIM // 2, TABLE_BLOCK)
        if INTERLEAVED:
            first = rotate_neighbours(first, cos, sin, ROTARY_DIM // 2, BLOCK_DIM)
        else:
            first, second = rotate_halves(first, second, cos, sin)

    written = read & has_place
    # Two questions: without q there is no pointer that Triton could compile the branch for.
    if q_ptr is not None:  # noqa: SIM102
        if head_block < Q_BLOCKS:
            new_q_rows_ptr = new_q_ptr + (token.to(tl.int64) * NUM_HEADS + head) * DIM
            store_parts(new_q_rows_ptr, first, second, rest, read, DIM, HALF, BLOCK_DIM, BLOCK_HALF, BLOCK_REST)
    if head_block >= Q_BLOCKS:
        k_place_ptr = k_cache_ptr + (
            page * stride_k_cache_page + offset * stride_k_cache_token + head * stride_k_cache_head
        )
        v_place_ptr = v_cache_ptr + (
            page * stride_v_cache_page + offset * stride_v_cache_token + head * stride_v_cache_head
        )
        if FORMAT == "native":
            store_parts(k_place_ptr, first, second, rest, written, DIM, HALF, BLOCK_DIM, BLOCK_HALF, BLOCK_REST)
            store_part(v_place_ptr, v, written, 0, VALUE_DIM, BLOCK_VALUE_DIM)
        else:
            _write_codes(
                first, second, rest, k_place_ptr,
                k_scale_ptr, stride_k_scale_page, stride_k_scale_token, stride_k_scale_head, page, offset, head, written, highest,
                DIM, HALF, FORMAT, SCALE_PER_TOKEN, BLOCK_DIM, BLOCK_HALF, BLOCK_REST,
            )  # fmt: skip
            _write_codes(
                v, v, v, v_place_ptr,
                v_scale_ptr, stride_v_scale_page, stride_v_scale_token, stride_v_scale_head, page, offset, head, written, highest,
                VALUE_DIM, 0, FORMAT, SCALE_PER_TOKEN, BLOCK_VALUE_DIM, 1, 1,
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------------------------
# Launcher.


class AppendLaunch:
    """The launch of a call, prepared once and made for any number of calls alike.

    Args:
        call: of its tensors only types, shapes, strides, dtypes and the device count.
        config: replaces the launch policy.
        refuse: is shown a call's tensors, in order, and raises if the kernel must not be launched with such addresses.
    """

    __slots__ = ("_launch", "_new_q", "_q", "_views")

    def __init__(
        self,
        call: AppendCall,
        *,
        config: AppendConfig | None = None,
        refuse: Callable[[Sequence[Tensor | None]], None] | None = None,
    ) -> None:
        fields = call._fields
        self._q = fields.index("q")
        self._new_q = None if call.q is None else NewTensor(call.q)
        by_hand = ("k_cache", "v_cache") if call.k_cache.dtype == torch.float8_e4m3fn else ()
        self._views = [(fields.index(name), as_bytes) for name in by_hand]
        seqlen = call.k.shape[-3]
        tokens = seqlen if call.k.dim() == 3 else call.k.shape[0] * seqlen
        self._launch: PreparedLaunch | None = None
        if tokens == 0:
            return
        num_kv_heads, head_dim, value_dim = *call.k.shape[-2:], call.v.shape[-1]
        if config is None:
            dim = max(head_dim, value_dim)
            config = append_config(tokens, num_kv_heads, dim, call.k.element_size(), call.k.device)
        num_heads = 0 if call.q is None else call.q.shape[-2]
        q_blocks = cdiv(num_heads, config.block_heads)
        head_blocks = q_blocks + cdiv(num_kv_heads, config.block_heads)
        rotary_dim = 0 if call.cos is None else 2 * call.cos.shape[1]
        values = {
            **_strides(call), **_options(call, tokens, seqlen),
            "NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "HEAD_BLOCKS": head_blocks, "Q_BLOCKS": q_blocks,
            "DIM": head_dim, "VALUE_DIM": value_dim,
            "BLOCK_TOKENS": config.block_tokens, "BLOCK_HEADS": config.block_heads,
            "BLOCK_DIM": next_power_of_2(head_dim), "BLOCK_HALF": next_power_of_2(rotary_dim // 2),
            "BLOCK_REST": next_power_of_2(head_dim - rotary_dim), "BLOCK_VALUE_DIM": next_power_of_2(value_dim),
        }  # fmt: skip
        if call.slot_mapping is not None:
            values["cu_seqlens_ptr"] = None  # a slot says all: nothing depends on the sequence
        arguments = by_name(
            _kv_append_kernel, values, (*fields, "new_q"), {"num_warps": config.num_warps, **COMMON_OPTIONS}
        )
        grid = (head_blocks * cdiv(tokens, config.block_tokens),)
        self._launch = PreparedLaunch(_kv_append_kernel, grid, *arguments, refuse)

    def __call__(self, call: AppendCall) -> Tensor | None:
        """Writes into the caches (and per-token scales) of a call that is like the one prepared for, or a plain tuple of its fields.

        Returns the new q.
        """
        new_q = None if self._new_q is None else self._new_q(call[self._q])  # type: ignore[arg-type]
        given = (*call, new_q)
        if self._views:
            given = viewed(given, self._views)
        if self._launch is not None:
            self._launch(given)
        return new_q


def kv_append_forward(call: AppendCall, *, config: AppendConfig | None = None) -> Tensor | None:
    """Writes into the caches (and per-token scales) of a checked call, once; returns the new q. See :class:`AppendLaunch`."""
    return AppendLaunch(call, config=config)(call)


def _strides(call: AppendCall) -> dict[str, int]:
    """The kernel's strides by name: 0 where there is no tensor."""
    table, cos = call.block_table, call.cos
    named = strides_by_name(
        {
            "k": ("batch token head", row_strides(call.k)),
            "v": ("batch token head", row_strides(call.v)),
            "q": ("batch token head", (0, 0, 0) if call.q is None else row_strides(call.q)),
            "k_cache": ("page token head", call.k_cache.stride()),
            "v_cache": ("page token head", call.v_cache.stride()),
            "k_scale": ("page token head", scale_strides(call.k_scale)),
            "v_scale": ("page token head", scale_strides(call.v_scale)),
            "block_table": ("batch", (0,) if table is None else table.stride()),
        }
    )
    return {**named, "stride_cos": 0 if cos is None else cos.stride(0)}


def _options(call: AppendCall, tokens: int, seqlen: int) -> dict[str, Any]:
    """What the kernel takes beside strides and tiles."""
    cos, table = call.cos, call.block_table
    batch = 1 if call.cache_seqlens is None else call.cache_seqlens.shape[0]
    num_pages, page_size = call.k_cache.shape[:2]
    # Pages that a place can be in: any by its slot, those of a sequence's table, or the sequence's own row.
    reachable = num_pages if call.slot_mapping is not None else 1 if table is None else table.shape[1]
    return {
        "eps": call.norm_eps, "weight_offset": call.norm_weight_offset,
        "highest": HIGHEST_CODE[torch.int8 if call.k_cache.dtype == torch.int8 else torch.float8_e4m3fn],
        "tokens": tokens, "seqlen": seqlen, "batch": batch, "search_steps": (batch + 1).bit_length(),
        "num_pages": num_pages, "page_size": page_size, "num_places": reachable * page_size,
        "table_length": 0 if cos is None else cos.shape[0],
        "ROTARY_DIM": 0 if cos is None else 2 * cos.shape[1], "INTERLEAVED": call.interleaved,
        "FORMAT": FORMATS.get(call.k_cache.dtype, "native"),
        "SCALE_PER_TOKEN": call.k_scale is not None and call.k_scale.dim() > 1,
    }  # fmt: skip
