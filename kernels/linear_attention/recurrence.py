"""Few tokens with a state, one after another: decoding.

    S = decay · S + φ(k) vᵀ,   z = decay · z + φ(k),   out = φ(q) S / (φ(q) · z)

One program for some columns of a key head's S, which it holds in registers: 8·D·(E + 1) bytes of state are read and written for each key
head, whatever the number of tokens before and (up to a few) in the call; 4·D·E FLOP for each token and query head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import cdiv, next_power_of_2
from ..prepared import PreparedLaunch
from .policy import RECURRENCE_COLUMNS, RECURRENCE_WARPS, Geometry, Passes
from .tile import locate, log2_of_decay, power, row_begin


@triton.jit
def load_vector(ptr, offs, DIM: tl.constexpr, IS_MAPPED: tl.constexpr, traits):
    """A row in float32, IS_MAPPED its features."""
    x = tl.load(ptr + offs, mask=offs < DIM, other=0.0).to(tl.float32)
    if IS_MAPPED and traits.ELU:
        x = tl.where(offs < DIM, tl.where(x > 0.0, x + 1.0, tl.exp(x)), 0.0)
    return x


@triton.jit(do_not_specialize=["num_kv_heads", "seqlen"])
def linear_attention_recurrence_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, out_ptr, out_strides,
    first_state_ptr, first_state_strides, first_normalizer_ptr, first_normalizer_strides,
    last_state_ptr, last_normalizer_ptr, denominator_ptr, decay_ptr, stride_decay,
    num_kv_heads, seqlen,
    traits, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """BLOCK_E columns of one key head's state, and of the results of its query heads."""
    tiles_e: tl.constexpr = (traits.VALUE_DIM + BLOCK_E - 1) // BLOCK_E
    tile_e = tl.program_id(0) % tiles_e
    here = locate(tl.program_id(0) // tiles_e, num_kv_heads, True, traits)
    decay = power(log2_of_decay(decay_ptr, stride_decay, here.kv_head), tl.full([], 1, tl.int32), traits)
    offs_f, offs_e = tl.arange(0, BLOCK_F), tile_e * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = (offs_f[:, None] < traits.HEAD_DIM) & (offs_e[None, :] < traits.VALUE_DIM)
    state = tl.zeros([BLOCK_F, BLOCK_E], tl.float32)
    normalizer = tl.zeros([BLOCK_F], tl.float32)
    if first_state_ptr is not None:
        strides = first_state_strides
        at = here.batch * strides.batch + here.kv_head * strides.head
        state = tl.load(first_state_ptr + at + offs_f[:, None] * strides.seq + offs_e[None, :], mask=inside, other=0.0)
        at = here.batch * first_normalizer_strides.batch + here.kv_head * first_normalizer_strides.head
        normalizer = tl.load(first_normalizer_ptr + at + offs_f, mask=offs_f < traits.HEAD_DIM, other=0.0)
    for token in range(seqlen):
        row = tl.cast(token, tl.int64)
        k = load_vector(
            k_ptr + row_begin(k_strides, here.batch, row, here.kv_head, traits), offs_f, traits.HEAD_DIM, True, traits
        )
        v = load_vector(
            v_ptr + row_begin(v_strides, here.batch, row, here.kv_head, traits), offs_e, traits.VALUE_DIM, False, traits
        )
        state = decay * state + k[:, None] * v[None, :]
        normalizer = decay * normalizer + k
        for member in range(traits.HEADS_PER_KV):
            head = here.kv_head * traits.HEADS_PER_KV + member
            q = load_vector(
                q_ptr + row_begin(q_strides, here.batch, row, head, traits), offs_f, traits.HEAD_DIM, True, traits
            )
            out = tl.sum(q[:, None] * state, 0)
            if traits.NORMALIZE:
                denominator = tl.sum(q * normalizer, 0)
                out = out / tl.where(denominator == 0.0, 1.0, denominator)
                if tile_e == 0:
                    slot = here.batch * num_kv_heads * traits.HEADS_PER_KV + head
                    tl.store(denominator_ptr + slot * seqlen + token, denominator)
            out_row_ptr = out_ptr + row_begin(out_strides, here.batch, row, head, traits)
            tl.store(out_row_ptr + offs_e, out.to(out_ptr.dtype.element_ty), mask=offs_e < traits.VALUE_DIM)
    last_state_ptr += here.slot * (traits.HEAD_DIM * traits.VALUE_DIM)
    tl.store(last_state_ptr + offs_f[:, None] * traits.VALUE_DIM + offs_e[None, :], state, mask=inside)
    if tile_e == 0:
        tl.store(last_normalizer_ptr + here.slot * traits.HEAD_DIM + offs_f, normalizer, mask=offs_f < traits.HEAD_DIM)


def recurrence_launch(passes: Passes, shape: Geometry) -> PreparedLaunch | None:
    """The launch; None without heads."""
    programs = shape.slots * cdiv(shape.value_dim, RECURRENCE_COLUMNS)
    if programs == 0:
        return None
    roles = {"first_state": "state", "first_normalizer": "normalizer"}
    values = {
        "seqlen": shape.seqlen_q,
        "BLOCK_F": next_power_of_2(shape.head_dim),
        "BLOCK_E": RECURRENCE_COLUMNS,
    }
    return PreparedLaunch(
        linear_attention_recurrence_kernel,
        *passes.arguments(linear_attention_recurrence_kernel, programs, roles, values, RECURRENCE_WARPS),
    )
