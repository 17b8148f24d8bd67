"""Calls of each op at any batch size and length, and the keys by which Triton would compile what they launch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch

from pytransformer.kernels.decode_attention.launcher import decode_attention_forward
from pytransformer.kernels.kv_append import kv_append_forward
from pytransformer.kernels.linear_cross_entropy import cross_entropy, logits_buffer
from tests.compile.cases.quantized_linear import codes_of
from tests.kernels.append_contract import call_of as append_call
from tests.kernels.attention_contract import backward, forward
from tests.kernels.decode_contract import call_of as decode_call
from tests.support.launch_recorder import record_launches
from tests.support.launchers import (
    grouped_backward,
    grouped_forward,
    linear_backward,
    linear_forward,
    norm_backward,
    norm_forward,
    quantized_backward,
    quantized_forward,
    rope_rotate,
)

ARCH = 90
SIZES = (1, 2, 7, 16, 33, 128)
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64
BFLOAT16 = torch.bfloat16


def _empty(*shape: int, dtype: torch.dtype = BFLOAT16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _integers(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32)


def keys_by_kernel(call: Callable[[int, int], object], sizes: tuple[int, ...] = SIZES) -> dict[str, set[str]]:
    """The different keys of each kernel that ``call(batch, seqlen)`` launches over all pairs of sizes."""
    with record_launches(ARCH) as launches:
        for batch, seqlen in itertools.product(sizes, sizes):
            call(batch, seqlen)
    found: dict[str, set[str]] = {}
    for launch in launches:
        found.setdefault(launch.name, set()).add(launch.key)
    assert found
    return found


def _norm(width: int) -> Callable[[int, int], object]:
    def call(batch: int, seqlen: int) -> object:
        x, weight = _empty(batch, seqlen, width), _empty(width)
        return norm_forward(x, weight, weight, x, eps=1e-5, is_rms=False)

    return call


def _norm_inference(batch: int, seqlen: int) -> object:
    x, weight = _empty(batch, seqlen, 256), _empty(256)
    return norm_forward(x, weight, None, x, eps=1e-5, is_rms=True, statistics=False)


def _norm_heads(batch: int, seqlen: int) -> object:
    fused = _empty(batch, seqlen, 3 * NUM_HEADS, HEAD_DIM)
    return norm_forward(fused[:, :, :NUM_HEADS], _empty(HEAD_DIM), None, None, eps=1e-5, is_rms=True)


def _norm_backward(width: int) -> Callable[[int, int], object]:
    def call(batch: int, seqlen: int) -> object:
        x, weight = _empty(batch, seqlen, width), _empty(width)
        rstd = torch.empty(batch, seqlen)
        return norm_backward(x, x, x, weight, rstd, rstd, dbias_dtype=BFLOAT16)

    return call


def _heads(batch: int, seqlen: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty(batch, seqlen, NUM_HEADS, HEAD_DIM), _empty(batch, seqlen, NUM_KV_HEADS, HEAD_DIM)


def _rope(batch: int, seqlen: int) -> object:
    table = torch.empty(8 * seqlen, HEAD_DIM // 2)
    return rope_rotate(*_heads(batch, seqlen), table, table, offsets=seqlen)


def _rope_fused(batch: int, seqlen: int) -> object:
    fused, table = _empty(batch, seqlen, 3 * NUM_HEADS, HEAD_DIM), torch.empty(seqlen, HEAD_DIM // 2)
    positions = torch.empty(batch, seqlen, dtype=torch.int64)
    q, k = fused[:, :, :NUM_HEADS], fused[:, :, NUM_HEADS : 2 * NUM_HEADS]
    return rope_rotate(q, k, table, table, positions=positions, inplace=True)


def _rope_packed(batch: int, seqlen: int) -> object:
    q, k = (tensor.flatten(0, 1) for tensor in _heads(batch, seqlen))
    table = torch.empty(seqlen, HEAD_DIM // 2)
    return rope_rotate(q, k, table, table, cu_seqlens=_integers(batch + 1), offsets=_integers(batch))


def _append(batch: int, seqlen: int, capacity: int, page_size: int = 0) -> object:
    q, k = _heads(batch, seqlen)
    table = torch.empty(capacity, HEAD_DIM // 2)
    cache = _empty(*((4 * capacity, page_size) if page_size else (batch, capacity)), NUM_KV_HEADS, HEAD_DIM)
    block_table = _integers(batch, capacity) if page_size else None
    options = {"q": q, "cos": table, "sin": table, "cache_seqlens": _integers(batch), "block_table": block_table}
    return kv_append_forward(append_call(k, k, cache, cache, **options))


def _append_quantised(batch: int, capacity: int) -> object:
    _, k = _heads(batch, 1)
    cache = _empty(batch, capacity, NUM_KV_HEADS, HEAD_DIM, dtype=torch.int8)
    scale = torch.empty(batch, capacity, NUM_KV_HEADS)
    return kv_append_forward(
        append_call(k, k, cache, cache, k_scale=scale, v_scale=scale, cache_seqlens=_integers(batch))
    )


def _attention(batch: int, seqlen: int) -> object:
    q, k = _heads(batch, seqlen)
    for keys in (seqlen, seqlen + 5):
        k = _empty(batch, keys, NUM_KV_HEADS, HEAD_DIM)
        out, lse = forward(q, k, k, softmax_scale=0.1, causal=True)
        backward(out, q, k, k, out=out, lse=lse, dlse=None, softmax_scale=0.1, causal=True)
    return out


def attention_long(batch: int, power: int) -> object:
    """Of ``128 · 8^power`` tokens, heads as models have them: from 8k on, the batch's stride times a tile's rows passes 2^31."""
    seqlen = 128 * 8**power
    q, k = _empty(batch, seqlen, 32, 128), _empty(batch, seqlen, 8, 128)
    out, lse = forward(q, k, k, softmax_scale=0.1, causal=True)
    return backward(out, q, k, k, out=out, lse=lse, dlse=None, softmax_scale=0.1, causal=True)


def _attention_packed(batch: int, seqlen: int) -> object:
    q, k = (tensor.flatten(0, 1) for tensor in _heads(batch, seqlen))
    bounds = _integers(batch + 1)
    packing = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "softmax_scale": 0.1, "causal": True}
    out, lse = forward(q, k, k, **packing)  # type: ignore[arg-type]
    return backward(out, q, k, k, out=out, lse=lse, dlse=None, **packing)  # type: ignore[arg-type]


def attention_masked(batch: int, seqlen: int) -> object:
    q, k = _heads(batch, seqlen)
    mask = torch.empty(batch, 1, seqlen, seqlen, dtype=torch.bool)
    bias = torch.empty(1, NUM_HEADS, seqlen, seqlen)  # shared by the batch, so that its gradient is a kernel of its own
    options = {"softmax_scale": 0.1, "causal": False, "mask": mask, "bias": bias}
    out, lse = forward(q, k, k, **options)  # type: ignore[arg-type]
    return backward(out, q, k, k, out=out, lse=lse, dlse=None, **options)  # type: ignore[arg-type]


def _decode(batch: int, capacity: int) -> object:
    cache = _empty(batch, 37 * capacity, NUM_KV_HEADS, HEAD_DIM)
    return decode_attention_forward(decode_call(_empty(batch, 1, NUM_HEADS, HEAD_DIM), cache, cache, _integers(batch)))


def _decode_paged(batch: int, max_pages: int) -> object:
    cache = _empty(4 * max_pages, 64, NUM_KV_HEADS, HEAD_DIM)
    q, table = _empty(batch, 1, NUM_HEADS, HEAD_DIM), _integers(batch, max_pages)
    return decode_attention_forward(decode_call(q, cache, cache, _integers(batch), block_table=table))


def _decode_quantised(batch: int, capacity: int) -> object:
    cache = _empty(batch, 64 * capacity + 1, NUM_KV_HEADS, HEAD_DIM, dtype=torch.int8)
    scale = torch.empty(cache.shape[:-1])
    q = _empty(batch, 1, NUM_HEADS, HEAD_DIM)
    return decode_attention_forward(decode_call(q, cache, cache, _integers(batch), k_scale=scale, v_scale=scale))


def _cross_entropy(batch: int, seqlen: int) -> object:
    tokens = batch * seqlen
    per_token, options = torch.empty(tokens), {"label_smoothing": 0.1, "softcap": 0.0, "z_loss": 0.0}
    targets, logits = torch.empty(tokens, dtype=torch.int64), logits_buffer(tokens, 300, _empty(1))
    return cross_entropy(
        logits, 300, targets, None, per_token, per_token, ignore_index=-100, wants_gradient=True, **options
    )


def _grouped(training: bool) -> Callable[[int, int], object]:
    def call(batch: int, seqlen: int) -> object:
        # As many rows as from decoding to a prompt, of four groups.
        x, weight, bias = _empty(batch * seqlen, 64), _empty(4, 48, 64), _empty(4, 48)
        offsets = torch.zeros(5, dtype=torch.int32)
        if training:
            return grouped_backward(_empty(batch * seqlen, 48), x, weight, offsets)
        return grouped_forward(x, weight, offsets, bias)

    return call


def _linear(batch: int, seqlen: int) -> object:
    q, k = _heads(batch, seqlen)
    call, results = linear_forward(q, k, k, torch.empty(NUM_KV_HEADS))
    return linear_backward(call, results, q)


def _linear_decode(batch: int, seqlen: int) -> object:
    q, k = _heads(batch, 1)
    sizes = (batch, NUM_KV_HEADS, HEAD_DIM)
    return linear_forward(q, k, k, torch.empty(NUM_KV_HEADS), torch.empty(*sizes, HEAD_DIM), torch.empty(sizes))


def _quantized(bits: int, training: bool) -> Callable[[int, int], object]:
    def call(batch: int, seqlen: int) -> object:
        codes = codes_of(bits, 48, 128)
        if training:
            return quantized_backward(_empty(batch * seqlen, 48), *codes)
        return quantized_forward(_empty(batch * seqlen, 128), *codes, _empty(48))

    return call


# Name: call of two sizes, the most keys of a kernel, and why more than one.
CASES: dict[str, tuple[Callable[[int, int], object], int, str]] = {
    "norm": (_norm(256), 1, ""),
    "norm, wide": (_norm(20480), 1, ""),
    "norm, inference": (_norm_inference, 1, ""),
    "norm, heads of a fused projection": (
        _norm_heads,
        2,
        "one row of the batch, or one token, is walked with one stride",
    ),
    "norm backward": (_norm_backward(256), 1, ""),
    "norm backward, wide": (_norm_backward(20480), 1, ""),
    "rope": (_rope, 1, ""),
    "rope, fused projection with positions": (_rope_fused, 1, ""),
    "rope, packed": (_rope_packed, 2, "up to 16 sequences, or more"),
    "linear_cross_entropy": (_cross_entropy, 1, ""),
    "grouped_linear": (_grouped(False), 3, "groups of up to 16 rows, up to 64, or more"),
    "grouped_linear, backward": (_grouped(True), 3, "groups of up to 16 rows, up to 64, or more"),
    "linear_attention": (_linear, 4, "out, dq, dk and dv are results of one kernel"),
    "linear_attention, a token": (_linear_decode, 1, ""),
    **{
        f"quantized_linear, int{bits}{', backward' if training else ''}": (
            _quantized(bits, training),
            3,
            "up to 16 rows, up to 64, or more",
        )
        for bits in (8, 4)
        for training in (False, True)
    },
    "kv_append, prefill": (functools.partial(_append, capacity=128), 2, "few tokens are spread over programs"),
    "kv_append, decode": (lambda batch, capacity: _append(batch, 1, capacity), 1, ""),
    "kv_append, decode, paged": (lambda batch, max_pages: _append(batch, 1, max_pages, 16), 1, ""),
    "kv_append, decode, int8": (_append_quantised, 1, ""),
    "attention": (_attention, 2, "causal masking of one query masks nothing"),
    "attention, packed": (_attention_packed, 2, "causal masking of one query masks nothing"),
    "decode": (_decode, 2, "one split needs no scratch"),
    "decode, paged": (_decode_paged, 2, "one split needs no scratch"),
    "decode, int8": (_decode_quantised, 2, "one split needs no scratch"),
}
