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
    # 4 KB per program of 4 warps is two 128-bit loads per thread, and as many again for the pairs' partners, cos and sin: with 8 blocks
    # per SM that covers the latency. With 8 KB the interleaved layout spills.
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
    tokens, exists, sequence, index, cache_seqlens_ptr, slot_mapping_ptr, block_table_ptr, stride_block_table_batch, cache_batch_idx_ptr,
    max_pages, num_pages, page_size,
):  # fmt: skip
    """(page or row, offset in it, whether there is such a place, position in the sequence) of each token."""
    position = index
    if slot_mapping_ptr is not None:
        slot = tl.load(slot_mapping_ptr + tokens, mask=exists, other=-1)
        exists = exists & (slot >= 0)
        page = slot // page_size
        offset = slot % page_size
    else:
        position = index + tl.load(cache_seqlens_ptr + sequence, mask=exists, other=0)
        exists = exists & (position >= 0)
        if block_table_ptr is not None:
            entry = position // page_size
            exists = exists & (entry < max_pages)
            page = tl.load(block_table_ptr + sequence * stride_block_table_batch + entry, mask=exists, other=-1).to(
                tl.int64
            )
            offset = (position % page_size).to(tl.int64)
        else:
            page = sequence
            if cache_batch_idx_ptr is not None:
                page = tl.load(cache_batch_idx_ptr + sequence, mask=exists, other=-1).to(tl.int64)
            offset = position.to(tl.int64)
            exists = exists & (position < page_size)
    exists = exists & (page >= 0) & (page < num_pages)
    return page, offset, exists, position


@triton.jit
def _normalise(x, mean_square, weight, eps, weight_offset):
    # Rounded to x's dtype before the rotation, as the two operations one after the other would.
    return (
        x.to(tl.float32)
        * (1.0 / tl.sqrt_rn(mean_square + eps))[:, None]
        * (weight.to(tl.float32) + weight_offset)[None, :]
    ).to(x.dtype)


@triton.jit
def _transform(
    rows_ptr, rows_mask, position, weight_ptr, eps, weight_offset, cos_ptr, sin_ptr, stride_table,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The rows' features after QK-norm and RoPE, in their own dtype; 0 where masked."""
    dims = tl.arange(0, BLOCK_DIM)
    HALF: tl.constexpr = ROTARY_DIM // 2
    mask = rows_mask[:, None] & (dims < DIM)[None, :]
    x = tl.load(rows_ptr[:, None] + dims[None, :], mask=mask, other=0.0)
    mean_square = tl.zeros_like(position).to(tl.float32)
    if weight_ptr is not None:
        wide = x.to(tl.float32)
        mean_square = tl.sum(wide * wide, 1) / DIM
        x = _normalise(x, mean_square, tl.load(weight_ptr + dims, mask=dims < DIM, other=0.0), eps, weight_offset)
    if ROTARY_DIM > 0:
        if INTERLEAVED:
            pairs = tl.arange(0, BLOCK_DIM // 2)
            angles = position.to(tl.int64)[:, None] * stride_table + pairs[None, :]
            rotates = rows_mask[:, None] & (pairs < HALF)[None, :]
            cos = tl.load(cos_ptr + angles, mask=rotates, other=1.0)
            sin = tl.load(sin_ptr + angles, mask=rotates, other=0.0)
            first, second = tl.split(tl.reshape(x, [x.shape[0], BLOCK_DIM // 2, 2]))
            wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
            # Features that do not rotate are chosen, not multiplied by 1 and 0, which would turn an infinity into NaN.
            new_first = tl.where(rotates, (wide_first * cos - wide_second * sin).to(x.dtype), first)
            new_second = tl.where(rotates, (wide_second * cos + wide_first * sin).to(x.dtype), second)
            x = tl.reshape(tl.join(new_first, new_second), [x.shape[0], BLOCK_DIM])
        else:
            # The other feature of the pair comes from the cache line that was just read.
            partner_dims = tl.where(dims < HALF, dims + HALF, dims - HALF)
            rotates = rows_mask[:, None] & (dims < ROTARY_DIM)[None, :]
            partner = tl.load(rows_ptr[:, None] + partner_dims[None, :], mask=rotates, other=0.0)
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + partner_dims, mask=dims < ROTARY_DIM, other=0.0)
                partner = _normalise(partner, mean_square, weight, eps, weight_offset)
            angles = position.to(tl.int64)[:, None] * stride_table + tl.where(dims < HALF, dims, dims - HALF)[None, :]
            cos = tl.load(cos_ptr + angles, mask=rotates, other=1.0)
            sin = tl.load(sin_ptr + angles, mask=rotates, other=0.0)
            signed = tl.where((dims < HALF)[None, :], -partner.to(tl.float32), partner.to(tl.float32))
            x = tl.where(rotates, (x.to(tl.float32) * cos + signed * sin).to(x.dtype), x)
    return x


@triton.jit
def _encode(x, scale, FORMAT: tl.constexpr):
    """Codes of x / scale: int8, or the bits of float8_e4m3fn (by hand: only parts from sm_89 on convert). Both round half to even."""
    # Adding 1.5 · 2^23 leaves no bits below 1: the sum is the number rounded to an integer.
    INTEGER: tl.constexpr = 12582912.0
    scaled = tl.div_rn(x.to(tl.float32), tl.broadcast_to(scale[:, None], x.shape))
    if FORMAT == "int8":
        scaled = tl.minimum(tl.maximum(scaled, -128.0), 127.0)
        codes = ((scaled + INTEGER) - INTEGER).to(tl.int8)
    else:
        magnitude = tl.minimum(tl.abs(scaled), 448.0)
        # Normal numbers keep 3 bits of mantissa, and the exponent's bias changes from 127 to 7; a carry moves into the exponent.
        bits = magnitude.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        subnormal = ((magnitude * 512.0 + INTEGER) - INTEGER).to(tl.int32)
        code = tl.where(magnitude < 0.015625, subnormal, normal)
        code = tl.where(scaled != scaled, 0x7F, code)
        sign = (scaled.to(tl.int32, bitcast=True) >> 24) & 0x80
        codes = (code | sign).to(tl.uint8)
    return codes


@triton.jit
def _write(
    x, cache_ptr, stride_page, stride_token, stride_head, scale_ptr, stride_scale_page, stride_scale_token, stride_scale_head,
    page, offset, head, exists, highest,
    DIM: tl.constexpr, FORMAT: tl.constexpr, SCALE_PER_TOKEN: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, BLOCK_DIM)
    if FORMAT != "native":
        if SCALE_PER_TOKEN:
            scale = tl.div_rn(tl.max(tl.abs(x.to(tl.float32)), 1), tl.zeros_like(head).to(tl.float32) + highest)
            scale = tl.where(scale > 0.0, scale, 1.0)
            tl.store(
                scale_ptr + page * stride_scale_page + offset * stride_scale_token + head * stride_scale_head,
                scale,
                mask=exists,
            )
        else:
            scale = tl.load(scale_ptr + head * stride_scale_head, mask=exists, other=1.0)
        x = _encode(x, scale, FORMAT)
    rows_ptr = cache_ptr + page * stride_page + offset * stride_token + head * stride_head
    tl.store(rows_ptr[:, None] + dims[None, :], x, mask=exists[:, None] & (dims < DIM)[None, :])


# Integers that differ from call to call of one model, or with the size of a cache, must not make Triton compile again.
UNSPECIALISED = [
    "tokens", "seqlen", "batch", "search_steps", "max_pages", "num_pages", "page_size", "table_length", "stride_block_table_batch",
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
    tokens, seqlen, batch, search_steps, max_pages, num_pages, page_size, table_length,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr, Q_BLOCKS: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    FORMAT: tl.constexpr, SCALE_PER_TOKEN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head_block = pid % HEAD_BLOCKS
    rows = tl.arange(0, BLOCK_TOKENS * BLOCK_HEADS)
    token = (pid // HEAD_BLOCKS).to(tl.int64) * BLOCK_TOKENS + rows // BLOCK_HEADS
    exists = token < tokens

    # Where k, v and q of the token are; packed tensors have one row, of all tokens.
    row = token // seqlen
    column = token % seqlen
    sequence = row
    index = column
    in_sequence = exists
    if cu_seqlens_ptr is not None:
        sequence = _find_sequence(cu_seqlens_ptr, token, batch, search_steps)
        in_sequence = exists & (sequence < batch)
        index = token - tl.load(cu_seqlens_ptr + sequence, mask=in_sequence, other=0)
    page, offset, has_place, position = _place(
        token, in_sequence, sequence, index, cache_seqlens_ptr, slot_mapping_ptr, block_table_ptr, stride_block_table_batch,
        cache_batch_idx_ptr, max_pages, num_pages, page_size,
    )  # fmt: skip
    if ROTARY_DIM > 0:
        if positions_ptr is not None:
            position = tl.load(positions_ptr + token, mask=exists, other=0).to(tl.int64)
        else:
            position = tl.where(in_sequence, position, 0)
        # A dropped token may lie beyond the table; it takes the last row, and nobody reads the result.
        position = tl.minimum(tl.maximum(position, 0), table_length - 1)

    # Two questions: without q there is no pointer that Triton could compile the branch for.
    if q_ptr is not None:  # noqa: SIM102
        if head_block < Q_BLOCKS:
            head = (head_block * BLOCK_HEADS + rows % BLOCK_HEADS).to(tl.int64)
            mask = exists & (head < NUM_HEADS)
            q_rows_ptr = q_ptr + row * stride_q_batch + column * stride_q_token + head * stride_q_head
            x = _transform(
                q_rows_ptr, mask, position, q_norm_weight_ptr, eps, weight_offset, cos_ptr, sin_ptr, stride_cos,
                DIM, BLOCK_DIM, ROTARY_DIM, INTERLEAVED,
            )  # fmt: skip
            dims = tl.arange(0, BLOCK_DIM)
            new_rows_ptr = new_q_ptr + (token * NUM_HEADS + head) * DIM
            tl.store(new_rows_ptr[:, None] + dims[None, :], x, mask=mask[:, None] & (dims < DIM)[None, :])
    if head_block >= Q_BLOCKS:
        head = ((head_block - Q_BLOCKS) * BLOCK_HEADS + rows % BLOCK_HEADS).to(tl.int64)
        mask = has_place & (head < NUM_KV_HEADS)
        k_rows_ptr = k_ptr + row * stride_k_batch + column * stride_k_token + head * stride_k_head
        k = _transform(
            k_rows_ptr, mask, position, k_norm_weight_ptr, eps, weight_offset, cos_ptr, sin_ptr, stride_cos,
            DIM, BLOCK_DIM, ROTARY_DIM, INTERLEAVED,
        )  # fmt: skip
        _write(
            k, k_cache_ptr, stride_k_cache_page, stride_k_cache_token, stride_k_cache_head,
            k_scale_ptr, stride_k_scale_page, stride_k_scale_token, stride_k_scale_head,
            page, offset, head, mask, highest, DIM, FORMAT, SCALE_PER_TOKEN, BLOCK_DIM,
        )  # fmt: skip
        v_rows_ptr = v_ptr + row * stride_v_batch + column * stride_v_token + head * stride_v_head
        value_dims = tl.arange(0, BLOCK_VALUE_DIM)
        v = tl.load(
            v_rows_ptr[:, None] + value_dims[None, :], mask=mask[:, None] & (value_dims < VALUE_DIM)[None, :], other=0.0
        )
        _write(
            v, v_cache_ptr, stride_v_cache_page, stride_v_cache_token, stride_v_cache_head,
            v_scale_ptr, stride_v_scale_page, stride_v_scale_token, stride_v_scale_head,
            page, offset, head, mask, highest, VALUE_DIM, FORMAT, SCALE_PER_TOKEN, BLOCK_VALUE_DIM,
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
        values = {
            **_strides(call), **_options(call, tokens, seqlen),
            "NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "HEAD_BLOCKS": head_blocks, "Q_BLOCKS": q_blocks,
            "DIM": head_dim, "VALUE_DIM": value_dim,
            "BLOCK_TOKENS": config.block_tokens, "BLOCK_HEADS": config.block_heads,
            "BLOCK_DIM": next_power_of_2(head_dim), "BLOCK_VALUE_DIM": next_power_of_2(value_dim),
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
    return {
        "eps": call.norm_eps, "weight_offset": call.norm_weight_offset,
        "highest": HIGHEST_CODE[torch.int8 if call.k_cache.dtype == torch.int8 else torch.float8_e4m3fn],
        "tokens": tokens, "seqlen": seqlen, "batch": batch, "search_steps": (batch + 1).bit_length(),
        "max_pages": 0 if table is None else table.shape[1],
        "num_pages": call.k_cache.shape[0], "page_size": call.k_cache.shape[1],
        "table_length": 0 if cos is None else cos.shape[0],
        "ROTARY_DIM": 0 if cos is None else 2 * cos.shape[1], "INTERLEAVED": call.interleaved,
        "FORMAT": FORMATS.get(call.k_cache.dtype, "native"),
        "SCALE_PER_TOKEN": call.k_scale is not None and call.k_scale.dim() > 1,
    }  # fmt: skip
