"""Attention forward: ``out = softmax(q kᵀ · softmax_scale + …) v`` and the log-sum-exp of each row, the score matrix never in memory.

One program owns BLOCK_M queries of one head and walks over the key tiles they may see, keeping the running maximum, the running sum and the
unnormalised output of each row (Milakov & Gimelshein 2018; Dao et al. 2022). Cost: 4 · batch · heads · Lq · Lk · d FLOP (half if causal),
q, k, v read and out, lse written once as far as L2 serves the other programs' reads of k and v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..launch import COMMON_OPTIONS, device_limits, on_device
from ..mathematics import LN2, LOG2E
from . import tile as common
from .options import (
    UNSPECIALISED,
    Geometry,
    block_dim,
    geometry,
    needs_wide_offsets,
    row_strides,
    score_options,
    statistic_strides,
)

# Keys and values of the heads that run at the same time should stay in L2 (60 MB on an H200, part of it for everything else).
L2_BYTES = 32 * 2**20


@dataclass(frozen=True)
class ForwardConfig:
    """Tile sizes and pipeline of the forward kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def forward_config(head_dim: int, value_dim: int, dtype: torch.dtype, arch: int, options: int = 0) -> ForwardConfig:
    """Launch policy. ``options``: how much there is beside causality, each part of which needs registers (see ``ScoreOptions``).

    Registers decide: at 8 warps a thread holds block_m · dv / 256 values of the output and block_m · block_n / 256 scores. Shared memory
    holds q once and block_n rows of k and v for each stage. Figures are for sm_90.
    """
    width = max(block_dim(head_dim), block_dim(value_dim))
    if dtype == torch.float32:
        return ForwardConfig(32, 32, 4, 1)  # exact products run on the FMA units from registers: 168 to 215 of them
    if arch < 90:
        # mma.sync keeps q in registers and both operands of a product: half the tile, and 163 KB hold two stages up to d = 128.
        if width <= 64:
            return ForwardConfig(128, 64 if options < 2 else 32, 8, 2)
        return ForwardConfig(128 if width <= 128 else 64, 32, 8, 2)
    if width <= 128:
        # Up to 255 registers and 160 KB without a spill; 4 warps spill.
        return ForwardConfig(128, {0: 128, 1: 64}.get(options, 32), 8, 2)
    if options == 0 and arch == 90:
        return ForwardConfig(
            128, 64, 8, 2
        )  # 255 registers and 16 bytes of spills before the loop, 192 KB; sm_100 spills more
    return ForwardConfig(128 if options < 2 else 64, 32, 8, 2)


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_forward_kernel(
    q_ptr, stride_q_batch, stride_q_seq, stride_q_head,
    k_ptr, stride_k_batch, stride_k_seq, stride_k_head,
    v_ptr, stride_v_batch, stride_v_seq, stride_v_head,
    out_ptr, stride_out_batch, stride_out_seq, stride_out_head,
    lse_ptr, stride_lse_batch, stride_lse_head,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    bias_ptr, stride_bias_batch, stride_bias_head, stride_bias_row, stride_bias_col,
    mask_ptr, stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_col,
    padding_ptr, stride_padding_batch, stride_padding_col,
    alibi_ptr, stride_alibi_batch, stride_alibi_head,
    sinks_ptr, dropout_seed_ptr,
    batch, num_heads, seqlen_q, seqlen_k, num_tiles, num_slots, slots_per_group,
    softmax_scale, softcap, window_left, window_right, dropout_last_out, dropout_scale,
    HEADS_PER_KV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SCALE_FIRST: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    HAS_DATA_MASK: tl.constexpr = (bias_ptr is not None) or (mask_ptr is not None) or (padding_ptr is not None)

    # Which queries, of which head, of which sequence.
    tile_m, slot = common.program_tile(num_tiles, num_slots, slots_per_group, HAS_RIGHT)
    if cu_seqlens_q_ptr is not None:
        head = slot
        sequence, tile_m, first_q, seqlen_q, first_k, seqlen_k = common.packed_tile(
            cu_seqlens_q_ptr, cu_seqlens_k_ptr, batch, seqlen_q, seqlen_k, tile_m, BLOCK_M
        )
    else:
        head = slot % num_heads
        sequence = slot // num_heads
        first_q = 0
        first_k = 0
    start_m = tile_m * BLOCK_M
    if start_m >= seqlen_q:
        return
    sequence = sequence.to(tl.int64)
    head = head.to(tl.int64)
    kv_head = head // HEADS_PER_KV
    first_row = (first_q + start_m).to(tl.int64)
    q_ptr += sequence * stride_q_batch + first_row * stride_q_seq + head * stride_q_head
    out_ptr += sequence * stride_out_batch + first_row * stride_out_seq + head * stride_out_head
    lse_ptr += sequence * stride_lse_batch + head * stride_lse_head + first_row
    first_key = tl.cast(first_k, tl.int64)
    k_ptr += sequence * stride_k_batch + first_key * stride_k_seq + kv_head * stride_k_head
    v_ptr += sequence * stride_v_batch + first_key * stride_v_seq + kv_head * stride_v_head
    sequence = tl.minimum(sequence, batch - 1)  # rows of no sequence see nothing, but must not read past the options
    alibi_slope = None
    if bias_ptr is not None:
        bias_ptr += sequence * stride_bias_batch + head * stride_bias_head
    if mask_ptr is not None:
        mask_ptr += sequence * stride_mask_batch + head * stride_mask_head
    if padding_ptr is not None:
        padding_ptr += sequence * stride_padding_batch
    if alibi_ptr is not None:
        alibi_slope = tl.load(alibi_ptr + sequence * stride_alibi_batch + head * stride_alibi_head).to(tl.float32)
    if dropout_seed_ptr is not None:
        seed = tl.load(dropout_seed_ptr)
        offset = tl.load(dropout_seed_ptr + 1)

    offs_m = common.tile_offsets(BLOCK_M, WIDE)
    offs_n = common.tile_offsets(BLOCK_N, WIDE)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows_left = seqlen_q - start_m
    q = common.load_tile(q_ptr, stride_q_seq, rows_left, offs_m, offs_d, HEAD_DIM, BLOCK_D, True)
    factor = softmax_scale * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:  # a logit that every row has seen already
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        if not SCALE_FIRST:
            sink = sink * LOG2E
        row_max = tl.zeros([BLOCK_M], tl.float32) + sink
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)

    bounds = common.tile_ranges(
        start_m, tl.minimum(start_m + BLOCK_M, seqlen_q) - 1, seqlen_k - seqlen_q - window_left, seqlen_k - seqlen_q + window_right,
        seqlen_k, BLOCK_N, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    # Whole tiles come first, and only their loads run ahead: the buffers and addresses of all three runs together would spill, and a run
    # without look-ahead that comes first makes ptxas serialise the wgmma of the others.
    for run in tl.static_range(3 if HAS_LEFT else 2):
        for tile_n in tl.range(bounds[2 * run], bounds[2 * run + 1], num_stages=None if run == 0 else 1):
            start_n = tile_n * BLOCK_N
            first_key = tl.cast(start_n, tl.int64)
            keys_left = seqlen_k - start_n
            k_tile_ptr = k_ptr + first_key * stride_k_seq
            v_tile_ptr = v_ptr + first_key * stride_v_seq
            k = common.load_tile(k_tile_ptr, stride_k_seq, keys_left, offs_n, offs_d, HEAD_DIM, BLOCK_D, run > 0)
            scores = common.row_products(
                q, q_ptr, stride_q_seq, rows_left, offs_m, k, k_tile_ptr, stride_k_seq, keys_left, offs_n, HEAD_DIM, PRECISION, STREAMED
            )  # fmt: skip
            scores = common.scaled_scores(scores, softmax_scale, softcap, SCALE_FIRST, HAS_SOFTCAP, EXACT)
            scores = common.score_terms(
                scores, (start_m + offs_m)[:, None], (start_n + offs_n)[None, :], seqlen_q, seqlen_k,
                bias_ptr, stride_bias_row, stride_bias_col, mask_ptr, stride_mask_row, stride_mask_col,
                padding_ptr, stride_padding_col, alibi_slope, window_left, window_right, run > 0, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            tile_max = tl.max(scores, 1)
            if not SCALE_FIRST:
                tile_max = tile_max * factor
            new_max = tl.maximum(row_max, tile_max)
            shift = new_max
            if HAS_DATA_MASK or run > 0:  # a row may have seen nothing yet
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = common.exponentials(scores, shift[:, None], factor, SCALE_FIRST)
            rescale = common.exponentials(row_max, shift, 1.0, SCALE_FIRST)
            row_sum = row_sum * rescale + tl.sum(p, 1)
            if dropout_seed_ptr is not None:
                place = sequence * num_heads + head
                keep = common.dropout_keep(seed, offset, place, start_m, start_n, dropout_last_out, BLOCK_M, BLOCK_N)
                p = tl.where(keep, p, 0.0)
            v = common.load_tile(v_tile_ptr, stride_v_seq, keys_left, offs_n, offs_dv, VALUE_DIM, BLOCK_DV, run > 0)
            acc = acc * rescale[:, None]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            row_max = new_max

    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    if SCALE_FIRST:
        lse = row_max + tl.log2(row_sum) * LN2
    else:
        lse = (row_max + tl.log2(row_sum)) * LN2
    lse = tl.where(empty, float("-inf"), lse)
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < rows_left)
    acc = acc / row_sum[:, None]
    if dropout_seed_ptr is not None:
        acc = acc * dropout_scale
    common.store_tile(out_ptr, stride_out_seq, rows_left, offs_m, offs_dv, acc, VALUE_DIM, BLOCK_DV)


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    allow_tf32: bool = False,
    config: ForwardConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel on checked tensors.

    Args:
        q, k, v: (batch, seqlen, heads, head_dim), or packed (total, heads, head_dim) with cu_seqlens; last dimension contiguous.
        mask, bias: broadcastable to (batch, num_heads, seqlen_q, seqlen_k), of four dimensions or fewer; never expanded in memory.
        max_seqlen_q, max_seqlen_k: accepted and not needed.
        allow_tf32: whether float32 products may be rounded to tf32.
        config: replaces the launch policy (tests use small tiles).

    The other arguments mean what they mean in ``pytransformer.ops.attention``.

    Returns:
        out like q with v's head_dim, and lse, float32, (batch, num_heads, seqlen_q) or packed (num_heads, total_q).
    """
    shape = geometry(q, k, v, cu_seqlens_q)
    out = torch.empty(*q.shape[:-1], shape.value_dim, dtype=q.dtype, device=q.device)
    lse_shape = (shape.num_heads, shape.seqlen_q) if shape.packed else (shape.batch, shape.num_heads, shape.seqlen_q)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    options = score_options(
        shape,
        causal,
        window,
        softmax_scale,
        softcap,
        mask,
        bias,
        key_padding_mask,
        alibi_slopes,
        sinks,
        dropout_p,
        dropout_seed,
        q.dtype,
        allow_tf32,
    )
    if config is None:
        arch = device_limits(q.device).arch
        config = forward_config(shape.head_dim, shape.value_dim, q.dtype, arch, options.pressure)
    num_tiles = shape.tiles(shape.seqlen_q, config.block_m)
    num_slots = shape.slots(shape.num_heads)
    with on_device(q):
        attention_forward_kernel[(num_tiles * num_slots,)](
            q, *row_strides(q),
            k, *row_strides(k),
            v, *row_strides(v),
            out, *row_strides(out),
            lse, *statistic_strides(lse),
            cu_seqlens_q, cu_seqlens_k if cu_seqlens_k is not None else cu_seqlens_q,
            *options.tensors,
            shape.batch, shape.num_heads, shape.seqlen_q, shape.seqlen_k, num_tiles, num_slots, slots_per_group(shape, k),
            *options.scalars,
            **options.constexprs,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            WIDE=needs_wide_offsets(max(config.block_m, config.block_n), q, k, v, out),
            num_warps=config.num_warps, num_stages=config.num_stages, **COMMON_OPTIONS,
        )  # fmt: skip
    return out, lse


def slots_per_group(shape: Geometry, k: torch.Tensor) -> int:
    """Heads that share the L2 cache: whole GQA groups, as many as their keys and values fit."""
    heads_per_kv = shape.num_heads // shape.num_kv_heads
    bytes_per_kv_head = max(1, shape.seqlen_k * (shape.head_dim + shape.value_dim) * k.element_size())
    return min(shape.slots(shape.num_heads), heads_per_kv * max(1, L2_BYTES // bytes_per_kv_head))
