"""A warp-specialised backward pass of attention for Hopper, without masks: five products, dq added up by reductions of
the copy engine.

A program has 128 keys, 64 for each of two consumers; a producer loads tiles of q and of the output's gradient into
two stages each. Parts of dq go through shared memory into float32, so that nothing is computed twice.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pytransformer.gluon_interpreter import Schedule, launch

SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
SWIZZLED_FLOATS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
BLOCK = 64
LOG2_E = 1.4426950408889634


@gluon.jit
def produce(q_desc, g_desc, q, g, q_full, q_empty, g_full, g_empty, row, num_tiles, BLOCK: gl.constexpr):
    for i in range(num_tiles):
        stage = i % 2
        phase = ((i // 2) & 1) ^ 1
        # Its stage is free first. After a wait for q's, which is given back later, that for g would be superfluous.
        mbarrier.wait(g_empty.index(stage), phase)
        mbarrier.expect(g_full.index(stage), g_desc.nbytes_per_cta)
        tma.async_load(g_desc, [row + i * BLOCK, 0], g_full.index(stage), g.index(stage))
        mbarrier.wait(q_empty.index(stage), phase)
        mbarrier.expect(q_full.index(stage), q_desc.nbytes_per_cta)
        tma.async_load(q_desc, [row + i * BLOCK, 0], q_full.index(stage), q.index(stage))


@gluon.jit
def consume(
    W: gl.constexpr, dq_desc, dk_desc, dv_desc, lse, delta, k, v, kv_full, ds, dq, q, g, q_full, q_empty, g_full, g_empty,
    row, first, num_tiles, scale, softmax_scale, D: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])  # noqa: E741
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    columns = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, S))
    empty = gl.zeros([64, BLOCK], gl.float32, S)
    own_k, own_v, own_ds, own_dq = k.index(W), v.index(W), ds.index(W), dq.index(W)
    dk = gl.zeros([64, D], gl.float32, O)
    dv = gl.zeros([64, D], gl.float32, O)
    mbarrier.wait(kv_full, 0)
    for i in range(num_tiles):
        stage = i % 2
        phase = (i // 2) & 1
        begin = row + i * BLOCK
        of_lse = gl.load(lse + begin + columns)
        of_delta = gl.load(delta + begin + columns)
        mbarrier.wait(q_full.index(stage), phase)
        scores = warpgroup_mma(own_k, q.index(stage).permute((1, 0)), empty, use_acc=False, is_async=True)
        mbarrier.wait(g_full.index(stage), phase)
        dp = warpgroup_mma(own_v, g.index(stage).permute((1, 0)), empty, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        p = gl.exp2(scores * scale - of_lse[None, :])
        dp = warpgroup_mma_wait(0, deps=[dp])
        weights = gl.convert_layout(p.to(gl.bfloat16), P)
        dv = warpgroup_mma(weights, g.index(stage), dv, is_async=True)
        rounded = (p * (dp - of_delta[None, :])).to(gl.bfloat16)
        own_ds.store(rounded)
        fence_async_shared()
        slopes = gl.convert_layout(rounded, P)
        dk = warpgroup_mma(slopes, q.index(stage), dk, is_async=True)
        part = warpgroup_mma(
            own_ds.permute((1, 0)), own_k, gl.zeros([BLOCK, D], gl.float32, O), use_acc=False, is_async=True
        )
        dv = warpgroup_mma_wait(2, deps=[dv])
        mbarrier.arrive(g_empty.index(stage), count=1)
        dk = warpgroup_mma_wait(1, deps=[dk])
        mbarrier.arrive(q_empty.index(stage), count=1)
        part = warpgroup_mma_wait(0, deps=[part])
        tma.store_wait(0)
        own_dq.store(part)
        fence_async_shared()
        tma.async_atomic_add(dq_desc, [begin, 0], own_dq)
    own_k.store((dk * softmax_scale).to(gl.bfloat16))
    own_v.store(dv.to(gl.bfloat16))
    fence_async_shared()
    tma.async_store(dk_desc, [first + W * 64, 0], own_k)
    tma.async_store(dv_desc, [first + W * 64, 0], own_v)
    tma.store_wait(0)


@gluon.jit
def attention_backward(
    q_desc, k_desc, v_desc, g_desc, dq_desc, dk_desc, dv_desc, lse, delta, scale, softmax_scale, seqlen,
    D: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    row = gl.program_id(0) * seqlen
    first = row + gl.program_id(1) * 128
    num_tiles = seqlen // BLOCK
    k = gl.allocate_shared_memory(gl.bfloat16, [2, 64, D], k_desc.layout)
    v = gl.allocate_shared_memory(gl.bfloat16, [2, 64, D], v_desc.layout)
    q = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, D], q_desc.layout)
    g = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, D], g_desc.layout)
    ds = gl.allocate_shared_memory(gl.bfloat16, [2, 64, BLOCK], q_desc.layout)
    dq = gl.allocate_shared_memory(gl.float32, [2, BLOCK, D], dq_desc.layout)
    kv_full = mbarrier.allocate_mbarrier()
    q_full = mbarrier.allocate_mbarrier(batch=2)
    q_empty = mbarrier.allocate_mbarrier(batch=2)
    g_full = mbarrier.allocate_mbarrier(batch=2)
    g_empty = mbarrier.allocate_mbarrier(batch=2)
    mbarrier.init(kv_full, count=1)
    for stage in gl.static_range(2):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(q_empty.index(stage), count=2)
        mbarrier.init(g_full.index(stage), count=1)
        mbarrier.init(g_empty.index(stage), count=2)
    mbarrier.expect(kv_full, 4 * k_desc.nbytes_per_cta)
    for w in gl.static_range(2):
        tma.async_load(k_desc, [first + w * 64, 0], kv_full, k.index(w))
        tma.async_load(v_desc, [first + w * 64, 0], kv_full, v.index(w))
    # fmt: off
    gl.warp_specialize(
        [
            (consume, (0, dq_desc, dk_desc, dv_desc, lse, delta, k, v, kv_full, ds, dq, q, g, q_full, q_empty, g_full, g_empty,
                       row, first, num_tiles, scale, softmax_scale, D, BLOCK)),
            (consume, (1, dq_desc, dk_desc, dv_desc, lse, delta, k, v, kv_full, ds, dq, q, g, q_full, q_empty, g_full, g_empty,
                       row, first, num_tiles, scale, softmax_scale, D, BLOCK)),
            (produce, (q_desc, g_desc, q, g, q_full, q_empty, g_full, g_empty, row, num_tiles, BLOCK)),
        ],
        [4, 1],
        [240, 24],
    )
    # fmt: on


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    schedule: Schedule,
    kernel=attention_backward,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (num_heads, seqlen, head_dim), from lse in base 2 and delta of (num_heads, seqlen)."""
    heads, seqlen, head_dim = q.shape
    rows = [x.reshape(-1, head_dim) for x in (q, k, v, grad)]
    dq = torch.zeros(heads * seqlen, head_dim)
    dk, dv = (torch.full_like(rows[0], float("nan")) for _ in range(2))
    boxes = [TensorDescriptor.from_tensor(x, [BLOCK, head_dim], SWIZZLED) for x in (*rows, dk, dv)]
    boxes.insert(4, TensorDescriptor.from_tensor(dq, [BLOCK, head_dim], SWIZZLED_FLOATS))
    scales = (head_dim**-0.5 * LOG2_E, head_dim**-0.5)
    vectors = (lse.flatten(), delta.flatten())
    launch(kernel, (heads, seqlen // 128), *boxes, *vectors, *scales, seqlen, head_dim, BLOCK, schedule=schedule)
    return (dq * scales[1]).view_as(q), dk.view_as(q), dv.view_as(q)
