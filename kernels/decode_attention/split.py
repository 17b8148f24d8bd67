"""The split kernel of decode attention: one split of a sequence's keys for one tile of its query rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .cache import (
    UNSPECIALISED,
    cache_places,
    join_sink,
    load_cache,
    load_rows,
    row_pointers,
    sequence_extent,
    split_start,
    tanh,
    tile_keys,
)


@triton.jit
def _program(batch, num_tiles, NUM_KV_HEADS: tl.constexpr):
    """(key head, sequence, tile of rows, split) of this program."""
    # Heads run fastest (neighbours in memory), then sequences; low splits first, as every sequence has those.
    pid = tl.program_id(0)
    kv_head = (pid % NUM_KV_HEADS).to(tl.int64)
    pid = pid // NUM_KV_HEADS
    sequence = (pid % batch).to(tl.int64)
    pid = pid // batch
    return kv_head, sequence, num_tiles - 1 - pid % num_tiles, pid // num_tiles


@triton.jit
def _softmax_step(scores, row_max, row_sum):
    """(exp(scores - new maximum), factor of the output so far, new maximum, new sum) of the rows."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # A row that has seen nothing yet keeps -inf as its maximum; subtracting that would give NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp(scores - shift[:, None])
    rescale = tl.exp(row_max - shift)
    return p, rescale, new_max, row_sum * rescale + tl.sum(p, 1)


@triton.jit
def _visible_scores(
    scores, n, keep, row_exists, position, window_left, window_right, slope,
    bias_rows_ptr, stride_bias_key, mask_rows_ptr, stride_mask_key, ROW_LEFT: tl.constexpr, ROW_RIGHT: tl.constexpr,
):  # fmt: skip
    """A tile of capped scores with bias and ALiBi, and -inf where a row does not see a key; ``keep`` are the keys that some row sees."""
    visible = keep[None, :]
    if ROW_LEFT:
        visible = visible & (n[None, :] >= position[:, None] - window_left)
    if ROW_RIGHT:
        visible = visible & (n[None, :] <= position[:, None] + window_right)
    present = row_exists[:, None] & keep[None, :]
    if bias_rows_ptr is not None:
        bias = tl.load(bias_rows_ptr[:, None] + n[None, :].to(tl.int64) * stride_bias_key, mask=present, other=0.0)
        scores += bias.to(tl.float32)
    if slope is not None:
        scores -= slope[:, None] * tl.abs(position[:, None] - n[None, :]).to(tl.float32)
    if mask_rows_ptr is not None:
        seen = tl.load(mask_rows_ptr[:, None] + n[None, :].to(tl.int64) * stride_mask_key, mask=present, other=0)
        visible = visible & (seen != 0)
    return tl.where(visible, scores, float("-inf"))


@triton.jit(do_not_specialize=UNSPECIALISED)
def _decode_split_kernel(
    q_ptr, stride_q_batch, stride_q_token, stride_q_head,
    k_cache_ptr, stride_k_cache_page, stride_k_cache_token, stride_k_cache_head,
    v_cache_ptr, stride_v_cache_page, stride_v_cache_token, stride_v_cache_head,
    out_ptr, stride_out_batch, stride_out_token, stride_out_head,
    lse_ptr, stride_lse_batch, stride_lse_head,
    partial_out_ptr, partial_stats_ptr,
    cache_seqlens_ptr, cu_seqlens_q_ptr, cache_leftpad_ptr, cache_batch_idx_ptr,
    block_table_ptr, stride_block_table_batch,
    mask_ptr, stride_mask_batch, stride_mask_head, stride_mask_token, stride_mask_key,
    bias_ptr, stride_bias_batch, stride_bias_head, stride_bias_token, stride_bias_key,
    alibi_slopes_ptr, stride_alibi_slopes_batch,
    sinks_ptr,
    k_scale_ptr, stride_k_scale_page, stride_k_scale_token, stride_k_scale_head,
    v_scale_ptr, stride_v_scale_page, stride_v_scale_token, stride_v_scale_head,
    batch, num_tiles, num_splits, seqlen_q, capacity, window_left, window_right, softmax_scale, softcap,
    fine_keys, fine_splits, coarse_keys, scratch_rows,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS_ABOVE: tl.constexpr, ROWS_UP_TO: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ONE_PAGE: tl.constexpr, ROW_LEFT: tl.constexpr, ROW_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr, FORMAT: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    kv_head, sequence, tile, split = _program(batch, num_tiles, NUM_KV_HEADS)
    first_token, seqlen_q, seqlen_k, leftpad = sequence_extent(
        cache_seqlens_ptr, cu_seqlens_q_ptr, cache_leftpad_ptr, sequence, seqlen_q
    )
    num_rows = seqlen_q * GROUP
    if (num_rows <= ROWS_ABOVE) | (num_rows > ROWS_UP_TO) | (tile * BLOCK_M >= num_rows):
        return
    low, high = tile_keys(tile, seqlen_q, seqlen_k, capacity, leftpad, window_left, window_right, GROUP, BLOCK_M)
    first_key = split_start(split, fine_keys, fine_splits, coarse_keys)
    end = tl.minimum(high, split_start(split + 1, fine_keys, fine_splits, coarse_keys))
    begin = tl.maximum(first_key, low // BLOCK_N * BLOCK_N)
    # A None test and a run-time test do not mix in Triton's `and`.
    if partial_out_ptr is not None:  # noqa: SIM102
        if begin >= end:
            return

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_exists = rows < num_rows
    token = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    position = seqlen_k - seqlen_q + token
    offs_dim = tl.arange(0, BLOCK_DIM)
    offs_value_dim = tl.arange(0, BLOCK_VALUE_DIM)

    q_rows_ptr = row_pointers(q_ptr, stride_q_batch, stride_q_token, stride_q_head, sequence, first_token + token, head)
    q = load_rows(q_rows_ptr, row_exists, offs_dim, DIM, BLOCK_DIM)

    cache_row = sequence
    if cache_batch_idx_ptr is not None:
        cache_row = tl.load(cache_batch_idx_ptr + sequence).to(tl.int64)
    block_table_row_ptr = None
    if block_table_ptr is not None:
        block_table_row_ptr = block_table_ptr + sequence * stride_block_table_batch
    k_cache_ptr += kv_head * stride_k_cache_head
    v_cache_ptr += kv_head * stride_v_cache_head
    score_scale = softmax_scale
    if k_scale_ptr is not None:
        k_scale_ptr += kv_head * stride_k_scale_head
        v_scale_ptr += kv_head * stride_v_scale_head
        if not SCALE_PER_TOKEN:
            score_scale = softmax_scale * tl.load(k_scale_ptr)
    # None where there is none: their absence is compiled.
    mask_rows_ptr, bias_rows_ptr, slope = None, None, None
    if mask_ptr is not None:
        mask_rows_ptr = row_pointers(
            mask_ptr, stride_mask_batch, stride_mask_token, stride_mask_head, sequence, token, head
        )
    if bias_ptr is not None:
        bias_rows_ptr = row_pointers(
            bias_ptr, stride_bias_batch, stride_bias_token, stride_bias_head, sequence, token, head
        )
    if alibi_slopes_ptr is not None:
        slopes_ptr = alibi_slopes_ptr + sequence * stride_alibi_slopes_batch
        slope = tl.load(slopes_ptr + head, mask=row_exists, other=0.0).to(tl.float32)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_VALUE_DIM], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keep = (n >= low) & (n < end)
        page, slot = cache_places(
            leftpad + n, leftpad + start, keep, cache_row, block_table_row_ptr, PAGE_SIZE, ONE_PAGE
        )
        k_rows_ptr = k_cache_ptr + page * stride_k_cache_page + slot * stride_k_cache_token
        k = load_cache(k_rows_ptr, keep, offs_dim, DIM, BLOCK_DIM, FORMAT, q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
        if SCALE_PER_TOKEN:
            k_scales_ptr = k_scale_ptr + page * stride_k_scale_page + slot * stride_k_scale_token
            scores *= tl.load(k_scales_ptr, mask=keep, other=0.0)[None, :]
        if HAS_SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        scores = _visible_scores(
            scores, n, keep, row_exists, position, window_left, window_right, slope,
            bias_rows_ptr, stride_bias_key, mask_rows_ptr, stride_mask_key, ROW_LEFT, ROW_RIGHT,
        )  # fmt: skip

        p, rescale, row_max, row_sum = _softmax_step(scores, row_max, row_sum)
        v_rows_ptr = v_cache_ptr + page * stride_v_cache_page + slot * stride_v_cache_token
        v = load_cache(v_rows_ptr, keep, offs_value_dim, VALUE_DIM, BLOCK_VALUE_DIM, FORMAT, q.dtype)
        if SCALE_PER_TOKEN:
            v_scales_ptr = v_scale_ptr + page * stride_v_scale_page + slot * stride_v_scale_token
            v = (v.to(tl.float32) * tl.load(v_scales_ptr, mask=keep, other=0.0)[:, None]).to(q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc * rescale[:, None], input_precision=PRECISION)

    if k_scale_ptr is not None and not SCALE_PER_TOKEN:
        acc *= tl.load(v_scale_ptr)
    value_mask = row_exists[:, None]
    if VALUE_DIM != BLOCK_VALUE_DIM:
        value_mask = value_mask & (offs_value_dim[None, :] < VALUE_DIM)
    if partial_out_ptr is not None:
        scratch = ((sequence * NUM_KV_HEADS + kv_head) * num_splits + split) * scratch_rows
        tl.store(partial_stats_ptr + scratch * 2 + rows, row_max, mask=row_exists)
        tl.store(partial_stats_ptr + scratch * 2 + scratch_rows + rows, row_sum, mask=row_exists)
        partial_rows_ptr = partial_out_ptr + (scratch + rows) * VALUE_DIM
        tl.store(partial_rows_ptr[:, None] + offs_value_dim[None, :], acc, mask=value_mask)
    else:
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head, mask=row_exists, other=0.0).to(tl.float32)
            row_max, row_sum, factor = join_sink(row_max, row_sum, sink)
            acc *= factor[:, None]
        token += first_token
        out_rows_ptr = row_pointers(out_ptr, stride_out_batch, stride_out_token, stride_out_head, sequence, token, head)
        out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
        tl.store(out_rows_ptr[:, None] + offs_value_dim[None, :], out.to(out_ptr.dtype.element_ty), mask=value_mask)
        lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log(row_sum))
        tl.store(lse_ptr + sequence * stride_lse_batch + head * stride_lse_head + token, lse, mask=row_exists)
