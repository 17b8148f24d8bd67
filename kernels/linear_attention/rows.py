"""Results of rows: a chunk's own products, masked, and what the state before it (or behind it) adds. One kernel for four results.

    out_i = Σ_{j ≤ i} decay^(i - j) (φ(q_i) · φ(k_j)) v_j + decay^(i + 1) φ(q_i) H_c,   divided by the same with 1 in place of v
    dφ(q_i) = n_i (Σ_{j ≤ i} decay^(i - j) (dout_i · v_j - δ_i) φ(k_j) + decay^(i + 1) (H_c dout_i - δ_i z_c))
    dφ(k_j) = Σ_{i ≥ j} decay^(i - j) n_i (dout_i · v_j - δ_i) φ(q_i) + decay^(L - 1 - j) (R_c v_j + r_c)
    dv_j    = Σ_{i ≥ j} decay^(i - j) n_i (φ(q_i) · φ(k_j)) dout_i + decay^(L - 1 - j) R_cᵀ φ(k_j)

with i, j counted from the chunk's first token, n_i = 1 / (φ(q_i) · z_i) and δ_i = dout_i · out_i (1 and 0 without a normaliser), H_c, z_c
the state before chunk c and R_c, r_c the gradient of that behind it (states.py); the gradients of keys are sums over the query heads of a
group, in one order. Each result is a product of rows with other rows, times a third: the same kernel with q, k, v or dout, v, k or v, dout,
q or k, q, dout. For T rows, a chunk of C, D features and E values each takes about T·C·(D + E) + 2·T·D·E FLOP and reads its chunk and
its state from L2. Without causality there is the state alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention.tile import tile_offsets
from ..launch import cdiv
from ..prepared import PreparedLaunch
from .policy import Geometry, LinearConfig, Passes, tile_of
from .tile import load_features, locate, log2_of_decay, multiply, multiply_by_state, power, row_begin, slope, store_rows


@triton.jit
def load_state(state_ptr, offs_f, offs_e, OF_FEATURES: tl.constexpr, traits):
    """(BLOCK_F, BLOCK_E) of S, or OF_FEATURES of its transpose."""
    if OF_FEATURES:
        inside = (offs_f[:, None] < traits.VALUE_DIM) & (offs_e[None, :] < traits.HEAD_DIM)
        ptrs = state_ptr + (offs_e[None, :] * traits.VALUE_DIM + offs_f[:, None])
    else:
        inside = (offs_f[:, None] < traits.HEAD_DIM) & (offs_e[None, :] < traits.VALUE_DIM)
        ptrs = state_ptr + (offs_f[:, None] * traits.VALUE_DIM + offs_e[None, :])
    return tl.load(ptrs, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["num_row_heads", "num_heads", "seqlen", "num_tiles", "num_chunks"])
def linear_attention_rows_kernel(
    row_ptr, row_strides, other_ptr, other_strides, value_ptr, value_strides, base_ptr, base_strides, out_ptr, out_strides,
    states_ptr, denominator_ptr, inverse_ptr, delta_ptr, decay_ptr, stride_decay, partial_ptr,
    num_row_heads, num_heads, seqlen, num_tiles, num_chunks,
    traits, OF_FEATURES: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of out, or OF_FEATURES of dq; of dv and dk if the ROWS_ARE_KEYS. Results OF_FEATURES go back through the feature map of
    ``base``, q or k, whose strides are those of the rows' heads; with partial_ptr they add to the gradient of the decay."""
    F: tl.constexpr = traits.VALUE_DIM if OF_FEATURES else traits.HEAD_DIM
    E: tl.constexpr = traits.HEAD_DIM if OF_FEATURES else traits.VALUE_DIM
    tiles_e: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    IS_OUT: tl.constexpr = not OF_FEATURES and not ROWS_ARE_KEYS
    IS_DQ: tl.constexpr = OF_FEATURES and not ROWS_ARE_KEYS
    # Rounding the weights to 16 bits adds as much as rounding out, and without a division nothing else does.
    WEIGHT_PARTS: tl.constexpr = (
        2 if IS_OUT and not traits.NORMALIZE and row_ptr.dtype.element_ty.primitive_bitwidth == 16 else 1
    )
    program = tl.program_id(0)
    tile_e = program % tiles_e
    tile = program // tiles_e % num_tiles
    here = locate(program // tiles_e // num_tiles, num_row_heads, ROWS_ARE_KEYS, traits)
    log2_decay = log2_of_decay(decay_ptr, stride_decay, here.kv_head)
    start = tile * BLOCK_ROWS
    rows_left = seqlen - start
    chunk = start // CHUNK
    first = chunk * CHUNK
    end = tl.minimum(first + CHUNK, seqlen)
    offs_row = tile_offsets(BLOCK_ROWS, WIDE)
    rows = start + tl.arange(0, BLOCK_ROWS)
    offs_e = tile_e * BLOCK_E + tl.arange(0, BLOCK_E)
    row_ptr += row_begin(row_strides, here.batch, start.to(tl.int64), here.row_head, traits)
    SIZE: tl.constexpr = traits.HEAD_DIM * (traits.VALUE_DIM + 1)
    if traits.CAUSAL:
        states_ptr += (here.slot * num_chunks + chunk) * SIZE
    else:
        states_ptr += here.slot * tl.maximum(num_chunks, 1) * SIZE
    z_ptr = states_ptr + traits.HEAD_DIM * traits.VALUE_DIM
    statistic = (here.batch * num_row_heads + here.row_head) * seqlen

    # What the state adds.
    acc = tl.zeros([BLOCK_ROWS, BLOCK_E], tl.float32)
    denominator = tl.zeros([BLOCK_ROWS], tl.float32)
    delta = tl.zeros([BLOCK_ROWS], tl.float32)
    inverse = tl.zeros([BLOCK_ROWS], tl.float32) + 1.0
    if traits.NORMALIZE and IS_DQ:
        delta = tl.load(delta_ptr + statistic + rows, mask=rows < seqlen, other=0.0)
        inverse = tl.load(inverse_ptr + statistic + rows, mask=rows < seqlen, other=0.0)
    for part in range(0, F, BLOCK_F):
        offs_f = part + tl.arange(0, BLOCK_F)
        x = load_features(row_ptr, row_strides.seq, rows_left, offs_row, offs_f, F, not OF_FEATURES, traits)
        acc = multiply_by_state(x, load_state(states_ptr, offs_f, offs_e, OF_FEATURES, traits), acc, traits)
        if IS_OUT and traits.NORMALIZE:
            z = tl.load(z_ptr + offs_f, mask=offs_f < F, other=0.0)
            denominator += tl.sum(x.to(tl.float32) * z[None, :], 1)
    if OF_FEATURES:
        z = tl.load(z_ptr + offs_e, mask=offs_e < E, other=0.0)[None, :]
        if ROWS_ARE_KEYS:
            acc += z
        elif traits.NORMALIZE:
            acc -= delta[:, None] * z
    if traits.CAUSAL:
        age = rows - first + 1
        if ROWS_ARE_KEYS:
            age = end - 1 - rows
        gradient = tl.zeros([BLOCK_ROWS], tl.float32)
        if partial_ptr is not None:
            base_tile_ptr = base_ptr + row_begin(base_strides, here.batch, start.to(tl.int64), here.row_head, traits)
            base = load_features(base_tile_ptr, base_strides.seq, rows_left, offs_row, offs_e, E, True, traits)
            gradient += tl.sum(base.to(tl.float32) * acc, 1) * slope(log2_decay, age, traits)
        weight = power(log2_decay, age, traits)
        acc *= weight[:, None]
        denominator *= weight

        # What the chunk's own rows add, up to this one or from it on.
        begin = first
        stop = tl.minimum(start + BLOCK_ROWS, end)
        members: tl.constexpr = traits.HEADS_PER_KV if ROWS_ARE_KEYS else 1
        if ROWS_ARE_KEYS:
            begin = start
            stop = end
        for member in range(members):
            head = here.kv_head
            if ROWS_ARE_KEYS:
                head = here.kv_head * traits.HEADS_PER_KV + member
            other_statistic = (here.batch * num_heads + head) * seqlen
            for other_start in range(begin, stop, BLOCK_ROWS):
                others = other_start + tl.arange(0, BLOCK_ROWS)
                others_left = seqlen - other_start
                at = tl.cast(other_start, tl.int64)
                other_tile_ptr = other_ptr + row_begin(other_strides, here.batch, at, head, traits)
                value_tile_ptr = value_ptr + row_begin(value_strides, here.batch, at, head, traits)
                products = tl.zeros([BLOCK_ROWS, BLOCK_ROWS], tl.float32)
                for part in range(0, F, BLOCK_F):
                    offs_f = part + tl.arange(0, BLOCK_F)
                    x = load_features(row_ptr, row_strides.seq, rows_left, offs_row, offs_f, F, not OF_FEATURES, traits)
                    y = load_features(
                        other_tile_ptr, other_strides.seq, others_left, offs_row, offs_f, F, not OF_FEATURES, traits
                    )  # fmt: skip
                    products = tl.dot(x, tl.trans(y), products, input_precision=traits.PRECISION)
                distance = rows[:, None] - others[None, :]
                if ROWS_ARE_KEYS:
                    distance = -distance
                if traits.NORMALIZE and ROWS_ARE_KEYS:
                    if OF_FEATURES:
                        mask = others < seqlen
                        products -= tl.load(delta_ptr + other_statistic + others, mask=mask, other=0.0)[None, :]
                    products *= tl.load(inverse_ptr + other_statistic + others, mask=others < seqlen, other=0.0)[
                        None, :
                    ]
                if traits.NORMALIZE and IS_DQ:
                    products -= delta[:, None]
                weights = tl.where(distance >= 0, products * power(log2_decay, distance, traits), 0.0)
                values = load_features(
                    value_tile_ptr, value_strides.seq, others_left, offs_row, offs_e, E, OF_FEATURES, traits
                )  # fmt: skip
                if IS_OUT and traits.NORMALIZE:
                    denominator += tl.sum(weights, 1)
                if IS_DQ and partial_ptr is not None:
                    # φ(q) · φ(k) of this tile's features: the tiles beside it add the rest.
                    scores = tl.dot(base, tl.trans(values), input_precision=traits.PRECISION)
                    slopes = tl.where(distance > 0, products * slope(log2_decay, distance, traits), 0.0)
                    gradient += tl.sum(scores * slopes, 1)
                acc = multiply(weights, values, acc, WEIGHT_PARTS, traits)
        if partial_ptr is not None:
            if IS_DQ:
                gradient *= inverse
            tl.store(partial_ptr + program, tl.sum(gradient))

    if IS_OUT and traits.NORMALIZE:
        acc /= tl.where(denominator == 0.0, 1.0, denominator)[:, None]
        if tile_e == 0:
            tl.store(denominator_ptr + statistic + rows, denominator, mask=rows < seqlen)
    if OF_FEATURES:
        acc *= inverse[:, None]
        if traits.ELU:
            tile_ptr = base_ptr + row_begin(base_strides, here.batch, start.to(tl.int64), here.row_head, traits)
            raw = load_features(tile_ptr, base_strides.seq, rows_left, offs_row, offs_e, E, False, traits).to(
                tl.float32
            )
            acc *= tl.where(raw > 0.0, 1.0, tl.exp(raw))
    out_ptr += row_begin(out_strides, here.batch, start.to(tl.int64), here.row_head, traits)
    store_rows(out_ptr, out_strides.seq, rows_left, offs_row, offs_e, acc, E, traits)


# ------------------------------------------------------------------------------------------------------------------------- launch

# By result: the tensors that the kernel's roles are played by.
_ROLES: dict[str, dict[str, str | None]] = {
    "out": {"row": "q", "other": "k", "value": "v", "base": None, "inverse": None, "delta": None, "partial": None},
    "dq": {"row": "dout", "other": "v", "value": "k", "base": "q", "out": "dq", "partial": "dq_partial"},
    "dk": {"row": "v", "other": "dout", "value": "q", "base": "k", "out": "dk", "partial": "dk_partial", "states": "gradients"},
    "dv": {"row": "k", "other": "q", "value": "dout", "base": None, "out": "dv", "partial": None, "states": "gradients"},
}  # fmt: skip


def rows_launch(
    passes: Passes, shape: Geometry, config: LinearConfig, result: str, num_chunks: int
) -> PreparedLaunch | None:
    """The launch for "out", "dq", "dk" or "dv", with states (of keys, or gradients) of so many chunks; None without rows."""
    programs = num_programs(shape, config, result)
    if programs == 0:
        return None
    are_keys, of_features = result in ("dk", "dv"), result in ("dq", "dk")
    dims = (shape.head_dim, shape.value_dim)
    seqlen = shape.seqlen_k if are_keys else shape.seqlen_q
    values = {
        "num_row_heads": shape.num_kv_heads if are_keys else shape.num_heads,
        "seqlen": seqlen,
        "num_tiles": cdiv(seqlen, config.block_rows),
        "num_chunks": num_chunks,
        "OF_FEATURES": of_features,
        "ROWS_ARE_KEYS": are_keys,
        **(tile_of(config, *dims[::-1]) if of_features else tile_of(config, *dims)),
    }
    num_warps = config.more_warps if of_features else config.num_warps
    num_stages = 1 if result == "dk" else config.num_stages  # as of the chunks' gradients (states.py)
    return PreparedLaunch(
        linear_attention_rows_kernel,
        *passes.arguments(linear_attention_rows_kernel, programs, _ROLES[result], values, num_warps, num_stages),
    )


def num_programs(shape: Geometry, config: LinearConfig, result: str) -> int:
    """Of the launch for a result, those of a head beside each other."""
    heads, seqlen = (
        (shape.num_kv_heads, shape.seqlen_k) if result in ("dk", "dv") else (shape.num_heads, shape.seqlen_q)
    )
    columns = shape.head_dim if result in ("dq", "dk") else shape.value_dim
    return shape.batch * heads * cdiv(seqlen, config.block_rows) * cdiv(columns, config.block_e)
