"""States of chunks, in parallel, and their scan: what every row of a chunk needs of all that lies outside of it.

    chunks:  A_c = Σ_j decay^(L_c - 1 - j) φ(k_j) [v_j, 1]ᵀ                       L_c: the tokens of chunk c, j counted from its first
    scan:    H_0 = initial state,  H_{c+1} = decay^L_c H_c + A_c                  each A_c replaced by H_c; the last one is returned

The gradient is the same from the end: ``A_c = Σ_i decay^(i + 1) φ(q_i) / (φ(q_i) · z_i) [dout_i, -dout_i · out_i]ᵀ`` over all query heads
of a key head, ``R_c`` the gradient of the state behind chunk c, and what is left before the first chunk the initial state's. For T tokens
with D features and E values the chunks take 2·T·D·E FLOP and read k and v once more; the scan moves 8·(T / chunk)·D·(E + 1) bytes.
Without causality all queries read the same state, the last one, which then takes the place of the first.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from ..attention.tile import tile_offsets
from ..launch import cdiv
from ..prepared import PreparedLaunch
from .policy import SCAN_BLOCK, SCAN_WARPS, Geometry, LinearConfig, Passes, tile_of
from .tile import load_features, locate, log2_of_decay, outer_products, power, row_begin, slope


@triton.jit(do_not_specialize=["num_row_heads", "num_kv_heads", "seqlen", "num_chunks"])
def linear_attention_chunk_kernel(
    x_ptr, x_strides, y_ptr, y_strides, inverse_ptr, delta_ptr, decay_ptr, stride_decay, states_ptr,
    num_row_heads, num_kv_heads, seqlen, num_chunks,
    traits, OF_GRADIENT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of one chunk's state: x is k and y is v, or OF_GRADIENT q and dout of each query head."""
    tiles_f: tl.constexpr = (traits.HEAD_DIM + BLOCK_F - 1) // BLOCK_F
    tiles_e: tl.constexpr = (traits.VALUE_DIM + BLOCK_E - 1) // BLOCK_E
    program = tl.program_id(0)
    tile_e = program % tiles_e
    tile_f = program // tiles_e % tiles_f
    chunk = program // (tiles_e * tiles_f) % num_chunks
    here = locate(program // (tiles_e * tiles_f) // num_chunks, num_kv_heads, True, traits)
    log2_decay = log2_of_decay(decay_ptr, stride_decay, here.kv_head)
    first = chunk * CHUNK
    length = tl.minimum(seqlen - first, CHUNK)
    offs_row = tile_offsets(BLOCK_ROWS, WIDE)
    offs_f = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_e = tile_e * BLOCK_E + tl.arange(0, BLOCK_E)
    state = tl.zeros([BLOCK_F, BLOCK_E], tl.float32)
    normalizer = tl.zeros([BLOCK_F], tl.float32)
    for member in range(traits.HEADS_PER_KV if OF_GRADIENT else 1):
        head = here.kv_head
        if OF_GRADIENT:
            head = here.kv_head * traits.HEADS_PER_KV + member
        statistic = (here.batch * num_row_heads + head) * seqlen + first
        x_head_ptr = x_ptr + row_begin(x_strides, here.batch, first.to(tl.int64), head, traits)
        y_head_ptr = y_ptr + row_begin(y_strides, here.batch, first.to(tl.int64), head, traits)
        for start in range(0, length, BLOCK_ROWS):
            rows = start + tl.arange(0, BLOCK_ROWS)
            rows_left = length - start
            skipped = tl.cast(start, tl.int64)
            x = load_features(
                x_head_ptr + skipped * x_strides.seq, x_strides.seq, rows_left, offs_row, offs_f, traits.HEAD_DIM, True, traits
            )  # fmt: skip
            y = load_features(
                y_head_ptr + skipped * y_strides.seq, y_strides.seq, rows_left, offs_row, offs_e, traits.VALUE_DIM, False, traits
            )  # fmt: skip
            x = x.to(tl.float32)
            if OF_GRADIENT:
                weight = power(log2_decay, rows + 1, traits)
                if traits.NORMALIZE:
                    weight *= tl.load(inverse_ptr + statistic + rows, mask=rows < length, other=0.0)
                    delta = tl.load(delta_ptr + statistic + rows, mask=rows < length, other=0.0)
                    normalizer -= tl.sum(x * (weight * delta)[:, None], 0)
                state = outer_products(x * weight[:, None], y, state, 1, traits)
            else:
                x = x * power(log2_decay, length - 1 - rows, traits)[:, None]
                normalizer += tl.sum(x, 0)
                state = outer_products(x, y, state, traits.PARTS, traits)
    size: tl.constexpr = traits.HEAD_DIM * (traits.VALUE_DIM + 1)
    out_ptr = states_ptr + (here.slot * num_chunks + chunk) * size
    is_feature = offs_f < traits.HEAD_DIM
    inside = is_feature[:, None] & (offs_e[None, :] < traits.VALUE_DIM)
    tl.store(out_ptr + offs_f[:, None] * traits.VALUE_DIM + offs_e[None, :], state, mask=inside)
    if tile_e == 0:
        tl.store(out_ptr + traits.HEAD_DIM * traits.VALUE_DIM + offs_f, normalizer, mask=is_feature)


@triton.jit
def step(states_ptr, before_ptr, place, exists, added, state, gradient, log2_decay, length, traits):
    """(state, gradient of the decay) behind one more chunk, if it exists; the state before it comes into memory where its own sum was."""
    if before_ptr is not None:
        before = tl.load(before_ptr + place, mask=exists, other=0.0)
        gradient += tl.where(exists, slope(log2_decay, length, traits) * before * state, 0.0)
    if traits.CAUSAL:
        tl.store(states_ptr + place, state, mask=exists)
    return tl.where(exists, power(log2_decay, length, traits) * state + added, state), gradient


@triton.jit(do_not_specialize=["num_kv_heads", "seqlen", "num_chunks"])
def linear_attention_scan_kernel(
    states_ptr, first_state_ptr, first_state_strides, first_normalizer_ptr, first_normalizer_strides,
    last_state_ptr, last_normalizer_ptr, before_ptr, partial_ptr, decay_ptr, stride_decay,
    num_kv_heads, seqlen, num_chunks,
    traits, REVERSED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some numbers of a head's states, chunk after chunk, or REVERSED. With before_ptr, the states of the forward pass, also a part of
    the gradient of the decay between them."""
    SIZE: tl.constexpr = traits.HEAD_DIM * (traits.VALUE_DIM + 1)
    MATRIX: tl.constexpr = traits.HEAD_DIM * traits.VALUE_DIM
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    block = tl.program_id(0) % blocks
    here = locate(tl.program_id(0) // blocks, num_kv_heads, True, traits)
    log2_decay = log2_of_decay(decay_ptr, stride_decay, here.kv_head)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    inside = offs < SIZE
    is_matrix = offs < MATRIX
    is_normalizer = inside & (offs >= MATRIX)
    state = tl.zeros([BLOCK], tl.float32)
    if first_state_ptr is not None:
        strides = first_state_strides
        at = here.batch * strides.batch + here.kv_head * strides.head + offs // traits.VALUE_DIM * strides.seq
        state = tl.load(first_state_ptr + at + offs % traits.VALUE_DIM, mask=is_matrix, other=0.0)
    if first_normalizer_ptr is not None:
        strides = first_normalizer_strides
        at = here.batch * strides.batch + here.kv_head * strides.head + (offs - MATRIX)
        state += tl.load(first_normalizer_ptr + at, mask=is_normalizer, other=0.0)

    held = num_chunks
    if not traits.CAUSAL:
        held = tl.maximum(num_chunks, 1)
    base = here.slot * held * SIZE
    gradient = tl.zeros([BLOCK], tl.float32)
    # Four chunks are read at a time: their addresses do not depend on the sums, but their stores would hold the next loads up.
    for group in range(0, num_chunks, 4):
        places = base + tl.zeros([BLOCK], tl.int64) + offs
        index = group
        direction = 1
        if REVERSED:
            index = num_chunks - 1 - group
            direction = -1
        left = tl.zeros([BLOCK], tl.int32) + (num_chunks - group)
        place_0 = places + tl.cast(index, tl.int64) * SIZE
        place_1 = place_0 + direction * SIZE
        place_2 = place_1 + direction * SIZE
        place_3 = place_2 + direction * SIZE
        added_0 = tl.load(states_ptr + place_0, mask=inside, other=0.0)
        added_1 = tl.load(states_ptr + place_1, mask=inside & (left > 1), other=0.0)
        added_2 = tl.load(states_ptr + place_2, mask=inside & (left > 2), other=0.0)
        added_3 = tl.load(states_ptr + place_3, mask=inside & (left > 3), other=0.0)
        start = index * CHUNK
        length_0 = tl.minimum(seqlen - start, CHUNK)
        length_1 = tl.minimum(seqlen - start - direction * CHUNK, CHUNK)
        length_2 = tl.minimum(seqlen - start - direction * 2 * CHUNK, CHUNK)
        length_3 = tl.minimum(seqlen - start - direction * 3 * CHUNK, CHUNK)
        state, gradient = step(
            states_ptr, before_ptr, place_0, inside, added_0, state, gradient, log2_decay, length_0, traits
        )  # fmt: skip
        state, gradient = step(
            states_ptr, before_ptr, place_1, inside & (left > 1), added_1, state, gradient, log2_decay, length_1, traits
        )  # fmt: skip
        state, gradient = step(
            states_ptr, before_ptr, place_2, inside & (left > 2), added_2, state, gradient, log2_decay, length_2, traits
        )  # fmt: skip
        state, gradient = step(
            states_ptr, before_ptr, place_3, inside & (left > 3), added_3, state, gradient, log2_decay, length_3, traits
        )  # fmt: skip
    if not traits.CAUSAL:
        tl.store(states_ptr + base + offs, state, mask=inside)
    if last_state_ptr is not None:
        tl.store(last_state_ptr + here.slot * MATRIX + offs, state, mask=is_matrix)
        tl.store(last_normalizer_ptr + here.slot * traits.HEAD_DIM + (offs - MATRIX), state, mask=is_normalizer)
    if before_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0), tl.sum(gradient))


# ----------------------------------------------------------------------------------------------------------------------- launches


def chunk_launch(
    passes: Passes, shape: Geometry, config: LinearConfig, num_chunks: int, *, of_gradient: bool = False
) -> PreparedLaunch | None:
    """What the chunks of k and v add to ``states``, or those of q and dout to ``gradients``; None without chunks."""
    roles: dict[str, str | None] = {"x": "k", "y": "v", "inverse": None, "delta": None}
    if of_gradient:
        roles = {"x": "q", "y": "dout", "states": "gradients"}
    programs = shape.slots * num_chunks * cdiv(shape.head_dim, config.block_f) * cdiv(shape.value_dim, config.block_e)
    if programs == 0:
        return None
    values = {
        "num_row_heads": shape.num_heads if of_gradient else shape.num_kv_heads,
        "seqlen": shape.seqlen_q if of_gradient else shape.seqlen_k,
        "num_chunks": num_chunks,
        "OF_GRADIENT": of_gradient,
        **tile_of(config, shape.head_dim, shape.value_dim),
    }
    # With two stages ptxas serialises the products of the gradients, which go through two loops (C7515).
    num_stages = 1 if of_gradient else config.num_stages
    return PreparedLaunch(
        linear_attention_chunk_kernel,
        *passes.arguments(linear_attention_chunk_kernel, programs, roles, values, config.more_warps, num_stages),
    )


def scan_launch(
    passes: Passes, shape: Geometry, num_chunks: int, roles: Mapping[str, str | None], *, reverse: bool = False
) -> PreparedLaunch | None:
    """The scan of the chunks' states; None without heads."""
    programs = shape.slots * scan_blocks(shape)
    if programs == 0:
        return None
    values = {
        "seqlen": shape.seqlen_q if reverse else shape.seqlen_k,
        "num_chunks": num_chunks,
        "REVERSED": reverse,
        "BLOCK": SCAN_BLOCK,
    }
    return PreparedLaunch(
        linear_attention_scan_kernel,
        *passes.arguments(linear_attention_scan_kernel, programs, roles, values, SCAN_WARPS),
    )


def scan_blocks(shape: Geometry) -> int:
    """Programs of the scan for one head."""
    return cdiv(shape.state_size, SCAN_BLOCK)


def states_of_keys(
    passes: Passes, shape: Geometry, config: LinearConfig, num_chunks: int, *, returns_last: bool = True
) -> list[PreparedLaunch | None]:
    """The states before each chunk, in ``states``; ``returns_last``: also the last one, as S and z."""
    roles = {"first_state": "state", "first_normalizer": "normalizer", "before": None, "partial": None}
    if not returns_last:
        roles |= {"last_state": None, "last_normalizer": None}
    return [
        chunk_launch(passes, shape, config, num_chunks),
        scan_launch(passes, shape, num_chunks, roles),
    ]
