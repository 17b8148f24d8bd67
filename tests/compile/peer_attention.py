"""A peer for the figures of our attention kernel: causal forward as Triton's tutorial goes about it, with tensor descriptors.

Queries, keys and values lie as (batch · heads · seqlen, head_dim), and whole tiles move through host descriptors (the TMA from sm_90 on). A
first loop over the tiles before the diagonal needs no mask, a second one over the diagonal's has the causal test. It has no option but the
group of heads, takes lengths that are multiples of the tiles, and is only compiled, never run: what it is good for is to say what a plain
Triton kernel costs in registers and instructions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from pytransformer.kernels.launch import COMMON_OPTIONS
from tests.compile.cases.attention import NUM_HEADS, NUM_KV_HEADS, SEQLEN

NAME = "peer_attention_kernel"


@triton.jit
def _walk(
    q, k_desc, v_desc, acc, row_max, row_sum, first_key_row, rows, begin, end, factor,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The running output, maximum and sum of a tile of queries after the key tiles from position ``begin`` to ``end``."""
    for start in tl.range(begin, end, BLOCK_N):
        k = k_desc.load([first_key_row + start, 0])
        scores = tl.dot(q, k.T)
        if MASKED:
            seen = rows[:, None] >= (start + tl.arange(0, BLOCK_N))[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
        weights = tl.math.exp2(scores * factor - new_max[:, None])
        rescale = tl.math.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        v = v_desc.load([first_key_row + start, 0])
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None])
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def peer_attention_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, factor, seqlen, num_heads,
    HEADS_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    start_m = tl.program_id(0) * BLOCK_M
    slot = tl.program_id(1)
    kv_slot = slot // num_heads * (num_heads // HEADS_PER_KV) + slot % num_heads // HEADS_PER_KV
    rows = start_m + tl.arange(0, BLOCK_M)
    q = q_desc.load([slot * seqlen + start_m, 0])
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    first_key_row = kv_slot * seqlen
    acc, row_max, row_sum = _walk(
        q, k_desc, v_desc, acc, row_max, row_sum, first_key_row, rows, 0, start_m, factor, False, BLOCK_N
    )
    acc, row_max, row_sum = _walk(
        q, k_desc, v_desc, acc, row_max, row_sum, first_key_row, rows, start_m, start_m + BLOCK_M, factor, True, BLOCK_N
    )
    tl.store(lse_ptr + slot * seqlen + rows, row_max + tl.math.log2(row_sum))
    out_desc.store([slot * seqlen + start_m, 0], (acc / row_sum[:, None]).to(out_desc.dtype))


def _launch(head_dim: int, block_n: int) -> None:
    block_m = 128
    q, out = (torch.empty(NUM_HEADS * SEQLEN, head_dim, dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.empty(NUM_KV_HEADS * SEQLEN, head_dim, dtype=torch.bfloat16) for _ in range(2))
    blocks = ((q, block_m), (k, block_n), (v, block_n), (out, block_m))
    descriptors = [TensorDescriptor.from_tensor(tensor, [block, head_dim]) for tensor, block in blocks]
    lse = torch.empty(NUM_HEADS * SEQLEN)
    peer_attention_kernel[(SEQLEN // block_m, NUM_HEADS)](
        *descriptors, lse, 0.1, SEQLEN, NUM_HEADS, HEADS_PER_KV=NUM_HEADS // NUM_KV_HEADS, HEAD_DIM=head_dim,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8, num_stages=2, **COMMON_OPTIONS,
    )  # fmt: skip


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and launch. Of 128 keys a tile the diagonal is one tile, so that no loop of masked ones is left; of 64 keys it is two."""
    for head_dim in (64, 128):
        for block_n in (64, 128):
            yield f"peer-bfloat16-d{head_dim}-causal-{block_n}_keys", functools.partial(_launch, head_dim, block_n)
