"""KV append by torch's own functions: the path of machines without a GPU.

For sequences of one length, the inner loop of text generation, the write is one copy into a slice of each cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.ops.backend import Backend, Limit, Outputs
from pytransformer.ops.kv_append.call import AppendCall, count_tokens, refusal, unless_empty
from pytransformer.ops.norm import rms_norm
from pytransformer.ops.rope import rope
from pytransformer.reference.kv_cache import per_token_scale, quantize

_LIMITS = (
    Limit(
        "anything on a GPU",
        lambda call: (
            "the places to write to cannot be read back from the GPU without synchronising" if call.k.is_cuda else None
        ),
    ),
)


def append(call: AppendCall) -> Tensor | None:
    """Writes a checked call into its caches and returns the new q: contiguous, and no alias of an argument."""
    k, q = call.k, call.q
    eps, weight_offset = call.norm_eps, call.norm_weight_offset
    if call.k_norm_weight is not None:
        k = rms_norm(k, call.k_norm_weight, eps=eps, weight_offset=weight_offset, backend="torch")
    if q is not None and call.q_norm_weight is not None:
        q = rms_norm(q, call.q_norm_weight, eps=eps, weight_offset=weight_offset, backend="torch")
    if call.cos is not None and call.sin is not None:
        k, q = _rotate(call, k, q, call.cos, call.sin)
    if call.slot_mapping is not None:
        _write_slots(call, k, call.slot_mapping)
    elif call.cache_seqlens is not None:
        _write_positions(call, k, call.cache_seqlens)
    if q is call.q:
        return None if q is None else q.clone(memory_format=torch.contiguous_format)
    return None if q is None else q.contiguous()


def _rotate(call: AppendCall, k: Tensor, q: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None]:
    if call.positions is None:
        assert call.cache_seqlens is not None
        # One number for all sequences is a slice of the tables, several are a gather.
        start = None if call.cu_seqlens is not None else _common_length(call.cache_seqlens.tolist())
        offsets = call.cache_seqlens if start is None else start
        return rope(
            k, q, cos, sin,
            offsets=offsets, cu_seqlens=call.cu_seqlens, interleaved=call.interleaved, backend="torch",
        )  # fmt: skip
    # Tokens that are not written may have any position.
    positions = call.positions.clamp(0, cos.shape[0] - 1).view(call.k.shape[:-2])
    return rope(k, q, cos, sin, positions=positions, interleaved=call.interleaved, backend="torch")


def _common_length(lengths: list[int]) -> int | None:
    """The length of all sequences, or None if they differ."""
    return lengths[0] if lengths.count(lengths[0]) == len(lengths) else None


def _write_positions(call: AppendCall, k: Tensor, cache_seqlens: Tensor) -> None:
    lengths = cache_seqlens.tolist()
    starts = None if call.cu_seqlens is None else call.cu_seqlens.tolist()
    start = _common_length(lengths)
    if start is not None and starts is None and call.block_table is None and call.cache_batch_idx is None:
        common = slice(start, start + k.shape[1])
        for cache, scale, new in _sides(call, k):
            _put(cache, scale, (slice(None), common), new)
        return
    if starts is None:
        places = _places(call, cache_seqlens, k.shape[1])
        for cache, scale, new in _sides(call, k):
            _put(cache, scale, places, new)
        return
    for sequence in range(len(lengths)):
        one = slice(starts[sequence], starts[sequence + 1])
        alone = slice(sequence, sequence + 1)
        rows, slots = _places(call, cache_seqlens[alone], starts[sequence + 1] - starts[sequence], alone)
        for cache, scale, new in _sides(call, k):
            _put(cache, scale, (rows[0], slots[0]), new[one])


def _sides(call: AppendCall, k: Tensor) -> tuple[tuple[Tensor, Tensor | None, Tensor], ...]:
    """(cache, scale, new tokens) of keys and of values."""
    return (call.k_cache, call.k_scale, k), (call.v_cache, call.v_scale, call.v)


def _places(
    call: AppendCall, cache_seqlens: Tensor, count: int, sequences: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """(row or page, slot) of the next ``count`` tokens of some sequences: int64 (sequences, count) each."""
    position = cache_seqlens.long()[:, None] + torch.arange(count)
    if call.block_table is not None:
        page_size = call.k_cache.shape[1]
        return call.block_table[sequences].gather(1, position // page_size).long(), position % page_size
    rows = torch.arange(call.cache_seqlens.shape[0]) if call.cache_batch_idx is None else call.cache_batch_idx.long()  # type: ignore[union-attr]
    return rows[sequences, None].expand_as(position), position


def _put(cache: Tensor, scale: Tensor | None, places: Any, new: Tensor) -> None:
    """Writes new tokens (…, num_kv_heads, head_dim) to their places, as codes into a cache that holds codes."""
    if scale is None:
        cache[places] = new
        return
    if scale.ndim > 1:
        of_token = per_token_scale(new, cache.dtype)
        scale[places] = of_token
    else:
        of_token = scale
    # float8 cannot be indexed, but its bytes can.
    _raw(cache)[places] = _raw(quantize(new, of_token[..., None], cache.dtype))


def _raw(tensor: Tensor) -> Tensor:
    """float8 as its bytes."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _write_slots(call: AppendCall, k: Tensor, slot_mapping: Tensor) -> None:
    page_size = call.k_cache.shape[1]
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    places = (slots // page_size, slots % page_size)
    for cache, scale, new in _sides(call, k):
        _put(cache, scale, places, new.reshape(-1, *new.shape[-2:])[written])


def _reference(call: AppendCall) -> Outputs:
    options = call._asdict()
    if call.positions is not None:
        options["positions"] = call.positions.view(call.k.shape[:-2])
    new_q = reference.kv_append(**options)
    return (None if new_q is None else new_q.contiguous(),)


def _plan(call: AppendCall) -> Callable[[AppendCall], Tensor | None] | None:
    if count_tokens(call) == 0:
        return None
    refuse = refusal(call)

    def append_apart(given: AppendCall) -> Tensor | None:
        refuse(given)
        return append(given if isinstance(given, AppendCall) else AppendCall(*given))

    return append_apart


BACKEND = Backend("torch", unless_empty(lambda call: (append(call),)), _LIMITS, plan=_plan)
REFERENCE = Backend("reference", unless_empty(_reference))
