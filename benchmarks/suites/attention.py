"""Attention forward, backward and both: 16k tokens over lengths, head sizes and masks; grouped, windowed, packed; each option's price."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import pytransformer
from pytransformer.benchmarks.definitions.cases import AttentionCase, skewed_lengths
from pytransformer.benchmarks.harness.rows import Inputs, Row, Variant
from pytransformer.benchmarks.suites import attention_golden as golden
from pytransformer.benchmarks.suites.common import (
    Wanted,
    all_variants,
    backward_of,
    forward_and_backward,
    no_grad,
    normal,
)

TOKENS = 16384
HIDDEN_SIZE = 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (128, 64, 256)


def _llama(seqlen: int, **options: Any) -> AttentionCase:
    """32 query heads on 8 key heads, head_dim 128."""
    return AttentionCase(TOKENS // seqlen, seqlen, 32, 8, 128, **options)


def _hidden_2048(seqlen: int, head_dim: int, **options: Any) -> AttentionCase:
    heads = HIDDEN_SIZE // head_dim
    return AttentionCase(TOKENS // seqlen, seqlen, heads, heads, head_dim, **options)


GPT2 = AttentionCase(16, 1024, 12, 12, 64)
# The targets' own rows, the most important first.
QUICK = (
    _llama(8192),
    _llama(8192, backward=True),
    _llama(1024),
    _llama(1024, backward=True),
    GPT2,
    replace(GPT2, backward=True),
    _llama(4096),
    _llama(4096, backward=True),
    _llama(16384),
    _llama(8192, backward=True, deterministic=True),
    _hidden_2048(16384, 64),
    _hidden_2048(16384, 256),
    _llama(2048),
    _llama(2048, backward=True),
)
# The price of an option: to be read beside the plain call at the same shape, which is in QUICK.
PRICED: tuple[dict[str, Any], ...] = (
    {"window": (1023, 0)},
    {"softcap": 30.0},
    {"sinks": True},
    {"dropout_p": 0.1},
    {"bias": True},
    {"alibi": True},
    {"deterministic": True},
)


def _specials() -> Iterator[AttentionCase]:
    """Packed batches with skewed lengths, windows, gpt-oss, block-sparse."""
    packed = AttentionCase.packed(skewed_lengths(TOKENS, 4096), 32, 8, 128)
    encoder = AttentionCase.packed(skewed_lengths(TOKENS, 512, seed=1), 12, 12, 64, causal=False)
    long = AttentionCase.packed(skewed_lengths(2 * TOKENS, 16384, seed=2), 32, 8, 128)
    mistral = AttentionCase(1, 16384, 32, 8, 128, window=(4095, 0))
    gpt_oss = AttentionCase(2, 8192, 64, 8, 64, window=(127, 0), sinks=True)
    # A fourteenth of the causal scores.
    sparse = AttentionCase(1, 16384, 32, 8, 128, blocks=(128, 3, 1))
    for case in (packed, mistral, encoder, gpt_oss, long, sparse):
        yield case
        yield replace(case, backward=True)


def _prices() -> Iterator[AttentionCase]:
    for options in PRICED:
        case = _llama(4096, **options)
        # Determinism only concerns gradients.
        if not case.deterministic:
            yield case
        yield replace(case, backward=True)


def _grid() -> Iterator[AttentionCase]:
    """hidden 2048: every head size, mask, length and pass; then grouped heads."""
    for causal in (True, False):
        for head_dim in HEAD_DIMS:
            for seqlen in LENGTHS:
                case = _hidden_2048(seqlen, head_dim, causal=causal)
                yield case
                yield replace(case, backward=True)
    for causal in (True, False):
        for seqlen in LENGTHS:
            yield _llama(seqlen, causal=causal)
            yield _llama(seqlen, causal=causal, backward=True)
    for seqlen in LENGTHS:
        yield _llama(seqlen, both=True)
    for causal in (True, False):
        for head_dim in HEAD_DIMS:
            for seqlen in LENGTHS:
                yield _hidden_2048(seqlen, head_dim, causal=causal, both=True)


def _tiny() -> Iterator[AttentionCase]:
    plain = AttentionCase(2, 48, 4, 2, 32)
    packed = AttentionCase.packed((17, 40, 5), 4, 2, 32)
    for case in (plain, packed, replace(plain, causal=False)):
        yield case
        yield replace(case, backward=True)
    yield replace(plain, both=True)
    for options in ({"window": (7, 0)}, *PRICED[1:]):
        yield replace(plain, **options, backward=True)
        yield replace(plain, **options)
    yield replace(plain, causal=False, window=(5, 3), sinks=True)
    yield replace(plain, blocks=(16, 0, 1), backward=True)
    yield replace(packed, window=(7, 0), dropout_p=0.3, backward=True)


def rows(wanted: Wanted) -> Iterator[Row]:
    """The targets' rows, then prices and specials, then the grid."""
    if wanted.tiny:
        for case in _tiny():
            yield _row(wanted, case, 0)
        return
    seen = set(QUICK)
    for case in QUICK:
        yield _row(wanted, case, 0)
    # A compiler takes half a minute for each of these, so peers that are compiled for each shape do not come along over the whole grid.
    fast = replace(wanted, quick=True)
    for case in (*_prices(), *_specials()):
        seen.add(case)
        yield _row(fast if case.backward else wanted, case, 1)
    for case in _grid():
        if case not in seen:
            seen.add(case)
            yield _row(fast, case, 1)


def _ours(case: AttentionCase, backend: str | None) -> Variant:
    def call(inputs: Inputs) -> Tensor:
        starts = inputs.get("cu_seqlens")
        out = pytransformer.attention(
            inputs["q"],
            inputs["k"],
            inputs["v"],
            causal=case.causal,
            window=case.window,
            softcap=case.softcap,
            bias=inputs.get("bias"),
            alibi_slopes=inputs.get("alibi_slopes"),
            block_mask=inputs.get("block_mask"),
            block_size=64 if case.blocks is None else case.blocks[0],
            sinks=inputs.get("sinks"),
            dropout_p=case.dropout_p,
            dropout_seed=inputs.get("dropout_seed"),
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
            max_seqlen_q=case.seqlen if case.lengths else None,
            max_seqlen_k=case.seqlen if case.lengths else None,
            deterministic=case.deterministic,
            backend=backend,
        )
        assert isinstance(out, Tensor)
        return out

    return call


def draw(case: AttentionCase, device: torch.device, seed: int) -> Inputs:
    """q, k, v and what the options need; with gradients where a backward pass is timed."""
    lead = (case.total_tokens,) if case.lengths else (case.batch, case.seqlen)
    needs_grad = case.backward or case.both
    inputs: Inputs = {
        "q": normal(device, 8 * seed, *lead, case.num_heads, case.head_dim),
        "k": normal(device, 8 * seed + 1, *lead, case.num_kv_heads, case.head_dim),
        "v": normal(device, 8 * seed + 2, *lead, case.num_kv_heads, case.head_dim),
    }
    if case.sinks:
        inputs["sinks"] = normal(device, 8 * seed + 3, case.num_heads, dtype=torch.float32)
    for tensor in inputs.values():
        tensor.requires_grad_(needs_grad)
    if needs_grad:
        inputs["dout"] = normal(device, 8 * seed + 4, *lead, case.num_heads, case.head_dim)
    if case.bias:
        inputs["bias"] = normal(device, 8 * seed + 5, 1, case.num_heads, case.seqlen, case.seqlen)
    if case.alibi:
        exponents = torch.arange(1, case.num_heads + 1, device=device) * (8.0 / case.num_heads)
        # The last head, which is checked, has the steepest.
        inputs["alibi_slopes"] = torch.exp2(-exponents.flip(0)).float()
    if case.blocks:
        inputs["block_mask"] = case.block_mask(device)
    if case.dropout_p:
        inputs["dropout_seed"] = torch.tensor([case.dropout_seed, seed], dtype=torch.int64, device=device)
    if case.lengths:
        inputs["cu_seqlens"] = torch.tensor(case.cu_seqlens, dtype=torch.int32, device=device)
    return inputs


def _row(wanted: Wanted, case: AttentionCase, priority: int) -> Row:
    calls, notes = all_variants(wanted, "attention", case, lambda backend: _ours(case, backend))
    leaves = ("q", "k", "v", "sinks") if case.sinks else ("q", "k", "v")
    if case.both:
        variants = {name: forward_and_backward(call, leaves) for name, call in calls.items()}
    elif case.backward:
        variants = {name: backward_of(name, call, leaves) for name, call in calls.items()}
    else:
        variants = {name: no_grad(call) for name, call in calls.items()}

    def check(inputs: Inputs) -> Tensor:
        if case.both:
            return torch.cat((golden.forward(case, inputs), golden.backward(case, inputs)))
        return golden.backward(case, inputs) if case.backward else golden.forward(case, inputs)

    def pick(result: Any) -> Tensor:
        if case.both:
            return torch.cat((golden.pick_forward(case, result[0]), golden.pick_backward(case, result[1])))
        return golden.pick_backward(case, result) if case.backward else golden.pick_forward(case, result)

    return Row(
        case.row_op,
        case.shape,
        case.flop,
        case.moved_bytes,
        lambda device, seed: draw(case, device, seed),
        variants,
        check,
        pick,
        notes=notes,
        priority=priority,
    )
