"""The kernel of decode attention: partial results of splits, and their merge by the last program that arrives."""

from __future__ import annotations

import triton
import triton.language as tl

from .cache import UNSPECIALISED, cache_places, load_cache, load_rows, row_pointers, sequence_extent, tanh, tile_keys
from .merge import finish_rows, fold_slots, store_partial
from .schedule import first_split_from, program_at, sequence_steps, sequence_tiles, split_start, stretch_of
from .widen import HEADROOM, narrow_rows, reach_of_keys


@triton.jit
def _softmax_step(scores, reach, row_max, row_sum, HEADROOM: tl.constexpr):
    """(exp(scores - new shift), factor of the output so far, new shift, new sum) of the rows.

    The shift is the largest ``reach`` so far, which need not be the scores', less ``HEADROOM``; no result depends on it but for rounding.
    """
    new_max = tl.maximum(row_max, tl.max(reach, 1) - HEADROOM)
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


@triton.jit
def _attend(
    begin, end, low, q, row_exists, position, slope,
    k_cache_ptr, stride_k_cache_page, stride_k_cache_token,
    v_cache_ptr, stride_v_cache_page, stride_v_cache_token, cache_row, leftpad, block_table_row_ptr,
    mask_rows_ptr, stride_mask_key, bias_rows_ptr, stride_bias_key,
    k_scale_ptr, stride_k_scale_page, stride_k_scale_token,
    v_scale_ptr, stride_v_scale_page, stride_v_scale_token,
    score_scale, softcap, window_left, window_right,
    PAGE_SIZE: tl.constexpr, ONE_PAGE: tl.constexpr, ROW_LEFT: tl.constexpr, ROW_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr, FORMAT: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(shift, sum, unnormalised output) of a tile of rows over the keys [begin, end), of which those before ``low`` are not seen.

    The shift is the largest score, or with codes what keeps their products in float16's range (widen.py).
    """
    IS_NARROW: tl.constexpr = FORMAT != "native" and q.dtype != tl.float32
    if FORMAT != "native" and q.dtype == tl.bfloat16:
        q, inverse = narrow_rows(q)
        row_scale = (inverse * score_scale)[:, None]
    else:
        row_scale = score_scale
    offs_dim = tl.arange(0, BLOCK_DIM)
    offs_value_dim = tl.arange(0, BLOCK_VALUE_DIM)
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
        k = load_cache(k_rows_ptr, keep, offs_dim, DIM, BLOCK_DIM, FORMAT, True, q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * row_scale
        if SCALE_PER_TOKEN:
            k_scales_ptr = k_scale_ptr + page * stride_k_scale_page + slot * stride_k_scale_token
            scores *= tl.load(k_scales_ptr, mask=keep, other=0.0)[None, :]
        if HAS_SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        scores = _visible_scores(
            scores, n, keep, row_exists, position, window_left, window_right, slope,
            bias_rows_ptr, stride_bias_key, mask_rows_ptr, stride_mask_key, ROW_LEFT, ROW_RIGHT,
        )  # fmt: skip

        reach = scores
        if SCALE_PER_TOKEN:
            v_scales_ptr = v_scale_ptr + page * stride_v_scale_page + slot * stride_v_scale_token
            v_scales = tl.load(v_scales_ptr, mask=keep, other=0.0)
            if IS_NARROW:
                reach = scores + reach_of_keys(v_scales)[None, :]
        p, rescale, row_max, row_sum = _softmax_step(scores, reach, row_max, row_sum, HEADROOM if IS_NARROW else 0.0)
        if SCALE_PER_TOKEN:
            p *= v_scales[None, :]
        v_rows_ptr = v_cache_ptr + page * stride_v_cache_page + slot * stride_v_cache_token
        # Widened before it goes through shared memory: there two bytes of neighbouring keys cannot be brought together but one by one.
        v = load_cache(v_rows_ptr, keep, offs_value_dim, VALUE_DIM, BLOCK_VALUE_DIM, FORMAT, False, q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc * rescale[:, None], input_precision=PRECISION)

    if k_scale_ptr is not None and not SCALE_PER_TOKEN:
        acc *= tl.load(v_scale_ptr)
    return row_max, row_sum, acc


@triton.jit(do_not_specialize=UNSPECIALISED)
def _decode_kernel(
    q_ptr, stride_q_batch, stride_q_token, stride_q_head,
    k_cache_ptr, stride_k_cache_page, stride_k_cache_token, stride_k_cache_head,
    v_cache_ptr, stride_v_cache_page, stride_v_cache_token, stride_v_cache_head,
    out_ptr, stride_out_batch, stride_out_token, stride_out_head,
    lse_ptr, stride_lse_batch, stride_lse_head,
    scratch_ptr, counters_ptr,
    cache_seqlens_ptr, cu_seqlens_q_ptr, cache_leftpad_ptr, cache_batch_idx_ptr,
    block_table_ptr, stride_block_table_batch,
    mask_ptr, stride_mask_batch, stride_mask_head, stride_mask_token, stride_mask_key,
    bias_ptr, stride_bias_batch, stride_bias_head, stride_bias_token, stride_bias_key,
    alibi_slopes_ptr, stride_alibi_slopes_batch,
    sinks_ptr,
    k_scale_ptr, stride_k_scale_page, stride_k_scale_token, stride_k_scale_head,
    v_scale_ptr, stride_v_scale_page, stride_v_scale_token, stride_v_scale_head,
    batch, num_tiles, max_splits, seqlen_q, capacity, window_left, window_right, softmax_scale, softcap, scratch_rows,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS_ABOVE: tl.constexpr, ROWS_UP_TO: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ONE_PAGE: tl.constexpr, ROW_LEFT: tl.constexpr, ROW_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr, FORMAT: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr, FOLD_ROWS: tl.constexpr,
    MERGE_SPLITS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if scratch_ptr is None:
        # No sequence has a second split: one program for each task, and its sequence is the program's stretch.
        only_task = program % (NUM_KV_HEADS * num_tiles)
        sequence = program // (NUM_KV_HEADS * num_tiles)
        stretch_begin, stretch_end, total, place = program * 0, program * 0 + 1, program * 0 + 1, program * 0
    else:
        only_task = program * 0
        stretch_begin, stretch_end, total, sequence, place = stretch_of(
            program, batch, cache_seqlens_ptr, cu_seqlens_q_ptr, cache_leftpad_ptr, seqlen_q, capacity, window_left, max_splits,
            NUM_KV_HEADS, GROUP, ROWS_ABOVE, ROWS_UP_TO, BLOCK_M, BLOCK_N, BLOCK_SEQUENCES,
        )  # fmt: skip
    num_slots = tl.num_programs(0).to(tl.int64) * (max_splits + 3)
    offs_row = tl.arange(0, BLOCK_M)
    offs_dim = tl.arange(0, BLOCK_DIM)
    while place < stretch_end:
        first_token, queries, seqlen_k, leftpad = sequence_extent(
            cache_seqlens_ptr, cu_seqlens_q_ptr, cache_leftpad_ptr, sequence, seqlen_q
        )
        first_step, steps, splits = sequence_steps(
            queries, seqlen_k, leftpad, capacity, window_left, max_splits, BLOCK_N
        )
        tiles = sequence_tiles(queries, GROUP, ROWS_ABOVE, ROWS_UP_TO, BLOCK_M)
        tasks = tiles * NUM_KV_HEADS
        if scratch_ptr is None:
            first_task = only_task
            last_task = tl.minimum(only_task + 1, tasks.to(tl.int64))
        else:
            first_task = tl.maximum(stretch_begin - place, 0) // (steps + 1)
            last_task = tl.minimum((stretch_end - place + steps) // (steps + 1), tasks.to(tl.int64))
        cache_row = sequence
        if cache_batch_idx_ptr is not None:
            cache_row = tl.load(cache_batch_idx_ptr + sequence).to(tl.int64)
        block_table_row_ptr = None
        if block_table_ptr is not None:
            block_table_row_ptr = block_table_ptr + sequence * stride_block_table_batch

        for task in range(first_task, last_task):
            task_place = place + task * (steps + 1)
            begin_split = tl.full([], 0, tl.int32)
            end_split = begin_split + 1
            if scratch_ptr is not None:
                begin_step = tl.maximum(tl.minimum(stretch_begin - task_place, steps + 1), 0).to(tl.int32)
                end_step = tl.maximum(tl.minimum(stretch_end - task_place, steps + 1), 0).to(tl.int32)
                begin_split = first_split_from(begin_step, steps, splits)
                end_split = first_split_from(end_step, steps, splits)
            # Neighbours in memory run together; of causal tiles the last one is the longest.
            kv_head = task % NUM_KV_HEADS
            tile = (tiles - 1 - task // NUM_KV_HEADS).to(tl.int32)
            low, high = tile_keys(tile, queries, seqlen_k, capacity, leftpad, window_left, window_right, GROUP, BLOCK_M)

            rows = tile * BLOCK_M + offs_row
            num_rows = queries * GROUP
            row_exists = rows < num_rows
            token = rows // GROUP
            head = kv_head * GROUP + rows % GROUP
            position = seqlen_k - queries + token
            q_rows_ptr = row_pointers(
                q_ptr, stride_q_batch, stride_q_token, stride_q_head, sequence, first_token + token, head
            )
            q = load_rows(q_rows_ptr, row_exists, offs_dim, DIM, BLOCK_DIM)
            score_scale = softmax_scale
            k_scale_head_ptr, v_scale_head_ptr = None, None
            if k_scale_ptr is not None:
                k_scale_head_ptr = k_scale_ptr + kv_head * stride_k_scale_head
                v_scale_head_ptr = v_scale_ptr + kv_head * stride_v_scale_head
                if not SCALE_PER_TOKEN:
                    score_scale = softmax_scale * tl.load(k_scale_head_ptr)
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

            whole = end_split - begin_split == splits
            owner = program_at(task_place, total)
            for number in range(end_split - begin_split):
                split = begin_split + number
                begin = (first_step + split_start(split, steps, splits)) * BLOCK_N
                end = tl.minimum(high, (first_step + split_start(split + 1, steps, splits)) * BLOCK_N)
                row_max, row_sum, acc = _attend(
                    tl.maximum(begin, low // BLOCK_N * BLOCK_N), end, low, q, row_exists, position, slope,
                    k_cache_ptr + kv_head * stride_k_cache_head, stride_k_cache_page, stride_k_cache_token,
                    v_cache_ptr + kv_head * stride_v_cache_head, stride_v_cache_page, stride_v_cache_token,
                    cache_row, leftpad, block_table_row_ptr, mask_rows_ptr, stride_mask_key, bias_rows_ptr, stride_bias_key,
                    k_scale_head_ptr, stride_k_scale_page, stride_k_scale_token,
                    v_scale_head_ptr, stride_v_scale_page, stride_v_scale_token, score_scale, softcap, window_left, window_right,
                    PAGE_SIZE, ONE_PAGE, ROW_LEFT, ROW_RIGHT, HAS_SOFTCAP, SCALE_PER_TOKEN, FORMAT, PRECISION,
                    DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE_DIM, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                if scratch_ptr is None:
                    finish_rows(
                        out_ptr, stride_out_batch, stride_out_token, stride_out_head, lse_ptr, stride_lse_batch, stride_lse_head, sinks_ptr,
                        sequence, first_token, kv_head, rows, num_rows, row_max, row_sum, acc, GROUP, VALUE_DIM, BLOCK_VALUE_DIM,
                    )  # fmt: skip
                else:
                    # Behind the slots that tasks share each program has three: for a split of a whole task, and for what of it is folded.
                    own_slot = (tl.num_programs(0) * max_splits + 3 * program).to(tl.int64)
                    slot = tl.where(whole, own_slot, owner * max_splits + split)
                    store_partial(
                        scratch_ptr, num_slots, slot, scratch_rows, offs_row, rows, num_rows, row_max, row_sum, acc,
                        VALUE_DIM, BLOCK_VALUE_DIM,
                    )  # fmt: skip
                    tl.debug_barrier()  # every thread's part is stored before one of them is read, or the counter counts them
                    count = tl.where(whole, 1, 0)
                    if (split + 1 == end_split) & (end_split - begin_split < splits):
                        # Release what was stored here, acquire what the others stored: who counts the last split folds them all.
                        counted = tl.atomic_add(
                            counters_ptr + owner, end_split - begin_split, sem="acq_rel", scope="gpu"
                        )
                        if counted + end_split - begin_split == splits:
                            # The next launch finds the counter as this one did.
                            tl.atomic_xchg(counters_ptr + owner, 0, sem="relaxed", scope="gpu")
                            count = splits
                            slot = owner * max_splits
                    # Not from and to one place: threads read what others write.
                    folded_slot = own_slot + 1 + split % 2
                    before_slot = own_slot + 2 - split % 2
                    for first_row in range(0, tl.where(count > 0, scratch_rows, 0), FOLD_ROWS):
                        fold_rows = first_row + tl.arange(0, FOLD_ROWS)
                        out_max, out_sum, out = fold_slots(
                            scratch_ptr, num_slots, before_slot, tl.where(whole & (split > 0), 1, 0), slot, count, scratch_rows,
                            fold_rows, tile * BLOCK_M + fold_rows, num_rows, VALUE_DIM, BLOCK_VALUE_DIM, FOLD_ROWS, MERGE_SPLITS,
                        )  # fmt: skip
                        if whole & (split + 1 < splits):
                            store_partial(
                                scratch_ptr, num_slots, folded_slot, scratch_rows, fold_rows, tile * BLOCK_M + fold_rows, num_rows,
                                out_max, out_sum, out, VALUE_DIM, BLOCK_VALUE_DIM,
                            )  # fmt: skip
                        else:
                            finish_rows(
                                out_ptr, stride_out_batch, stride_out_token, stride_out_head,
                                lse_ptr, stride_lse_batch, stride_lse_head, sinks_ptr, sequence, first_token, kv_head,
                                tile * BLOCK_M + fold_rows, num_rows, out_max, out_sum, out, GROUP, VALUE_DIM, BLOCK_VALUE_DIM,
                            )  # fmt: skip
                    tl.debug_barrier()  # the next split overwrites what was read here
        place += tasks * (steps + 1).to(tl.int64)
        sequence += 1
        if scratch_ptr is None:
            place = stretch_end
