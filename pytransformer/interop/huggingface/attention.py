"""The attention function of ``attn_implementation="pytransformer"``: what a model passes, in the terms of this package's ops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from pytransformer.interop.huggingface.masks import UNLIMITED, DeferredMask
from pytransformer.interop.huggingface.models import takes_additive_masks
from pytransformer.ops.attention import attention
from pytransformer.ops.checks import readable
from pytransformer.ops.decode_attention import decode_attention

NAME = "pytransformer"

_logger = logging.get_logger(__name__)

# Arguments of other attention functions that change the result and have no equivalent here. What is in neither list (position_ids,
# use_cache, …) travels through the models to every layer and says nothing about attention.
_REFUSED = {
    "cache": "the paged cache of continuous batching is not served: use generate() with a dynamic or static cache",
    "block_table": "transformers' paged decoding is not served: use generate() with a dynamic or static cache",
    "k_cache": "transformers' paged decoding is not served: use generate() with a dynamic or static cache",
    "v_cache": "transformers' paged decoding is not served: use generate() with a dynamic or static cache",
    "sinks": "sinks that depend on the query are not served; s_aux, one learnt sink per head, is",
    "head_mask": "weights scaled per head are not served: use attn_implementation='eager'",
    "score_mod": "a function of scores is not served: use attn_implementation='flex_attention'",
    "block_mask": "a BlockMask is not served: use attn_implementation='flex_attention'",
}


@dataclass(frozen=True)
class _Visible:
    """Which keys the queries see, in the op's terms; ``bias`` is a mask that was additive, ``packing`` (cu_seqlens_q, _k, max_q, _k)."""

    causal: bool = False
    window: tuple[int, int] = UNLIMITED
    num_keys: int | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    key_padding_mask: Tensor | None = None
    packing: tuple[Tensor, Tensor, int | None, int | None] | None = None


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    deterministic: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for ``AttentionInterface``.

    Args:
        module: the attention module. Its ``config`` says whether it is part of a model with this implementation. Elsewhere, and while a
            compiler traces, its ``is_causal`` counts where ``is_causal`` and ``attention_mask`` are None, as with "sdpa".
        query: (batch, num_heads, query_length, head_dim). Any head_dim.
        key, value: (batch, num_kv_heads, kv_length, head_dim), not repeated.
        attention_mask: what :func:`attention_mask` returned; or a custom mask that broadcasts to (batch, num_heads, query_length,
            kv_length): boolean, True = attend, or floating, added to the scores. With a mask, ``is_causal`` and ``sliding_window`` say
            nothing: all is in the mask. Longer masks are cut to kv_length. None in a model that was given this implementation hides
            nothing, as with "eager".
        dropout: probability; the model passes 0 in evaluation.
        scaling: factor of the scores; 1 / sqrt(head_dim) if None.
        is_causal: see ``module``. A single query sees every key.
        sliding_window: with no mask, the keys seen to each side, the query's own included.
        softcap: c replaces a score s by c · tanh(s / c).
        s_aux: (num_heads), learnt sinks.
        position_bias: (1 or batch, num_heads, query_length, kv_length), added to the scores, differentiable.
        indices: integers (batch, query_length, any number), the keys that each query is left with of those it may see (DeepSeek's sparse
            attention); negative = none.
        block_indices: integers (batch, groups, query_length, any number), the same for blocks of ``module.indexer.block_size`` keys and for
            each group of heads (MiniMax M3).
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1), starts of the sequences packed in the rows of query and key, one row after another.
        max_length_q, max_length_k: length of the longest.
        deterministic: True asks for gradients of the same bits each run.
        kwargs: other arguments of the model's; those that would change the result are refused.

    Returns:
        (batch, query_length, num_heads, value's head_dim), and None for the weights, which no fused kernel has: ``output_attentions`` gives
        a warning once, as "sdpa" does.

    Raises:
        NotImplementedError: an argument that changes attention and is not served; ``block_indices`` with packed sequences.
        RuntimeError: a mask that is neither boolean nor floating, as "sdpa" raises.
        ValueError, TypeError: shapes, dtypes and values that do not fit; see ``pytransformer.attention``.
    """
    _refuse(kwargs)
    q, k, v = _tokens_first(query, key, value)
    visible = _visible(module, q.shape[1], k.shape[1], attention_mask, is_causal, sliding_window)
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        lengths = cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
        visible = replace(visible, packing=_packing(q, k, *lengths))
    if visible.num_keys is not None and visible.num_keys < k.shape[1]:
        k, v = k[:, : visible.num_keys], v[:, : visible.num_keys]
    visible = _with_bias(visible, position_bias, k.shape[1])
    if indices is not None or block_indices is not None:
        visible = _with_chosen(visible, module, q, k.shape[1], indices, block_indices)
    options = {
        "softmax_scale": scaling,
        "softcap": 0.0 if softcap is None else softcap,
        "sinks": s_aux,
    }
    grad_options = {"dropout_p": float(dropout), "deterministic": True if deterministic else None}
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    return _attend(q, k, v, visible, options, grad_options).contiguous(), None


def _refuse(kwargs: dict[str, Any]) -> None:
    for name, why in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attn_implementation='{NAME}': {name}: {why}")
    if kwargs.get("output_attentions", False):
        _logger.warning_once(
            f"`{NAME}` attention does not support `output_attentions=True`. Please set your attention to `eager` if you want any of "
            "these features."
        )


def _tokens_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, length, heads, head_dim) views; a batch of 1 is broadcast, as "sdpa" does (learnt queries)."""
    batch = max(query.shape[0], key.shape[0])
    q, k, v = (
        tensor.transpose(1, 2) if tensor.shape[0] == batch else tensor.transpose(1, 2).expand(batch, -1, -1, -1)
        for tensor in (query, key, value)
    )
    return q, k, v


def _visible(
    module: torch.nn.Module,
    query_length: int,
    kv_length: int,
    mask: Any,
    is_causal: bool | None,
    sliding_window: int | None,
) -> _Visible:
    if isinstance(mask, DeferredMask):
        pattern = mask.pattern
        if not mask.was_read() and mask.shape[-2:] == (query_length, kv_length):
            padding = None if pattern.padding is None else pattern.padding[:, : pattern.num_keys]
            packing = None
            if pattern.cu_seqlens is not None:
                packing = pattern.cu_seqlens, pattern.cu_seqlens, pattern.max_seqlen, pattern.max_seqlen
            return _Visible(pattern.causal, pattern.window, pattern.num_keys, key_padding_mask=padding, packing=packing)
        mask = mask.dense()
    if mask is not None:
        return _of_custom_mask(mask, kv_length)
    return _of_no_mask(module, query_length, kv_length, is_causal, sliding_window)


def _of_no_mask(
    module: torch.nn.Module, query_length: int, kv_length: int, is_causal: bool | None, sliding_window: int | None
) -> _Visible:
    config = getattr(module, "config", None)
    is_of_a_model = getattr(config, "_attn_implementation", None) == NAME
    # What our mask function left out hides nothing, and so does what a model leaves out itself: it treats every name but "sdpa" as "eager".
    if is_of_a_model and (not torch.compiler.is_compiling() or takes_additive_masks(config)):
        return _Visible()
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = UNLIMITED if sliding_window is None else (int(sliding_window) - 1, int(sliding_window) - 1)
    if not causal or query_length == 1:
        return _Visible(window=window)
    if query_length > kv_length or (is_of_a_model and query_length < kv_length):
        raise ValueError(
            f"causal attention of {query_length} queries over {kv_length} keys without a mask does not say where the queries stand; "
            "pass an attention_mask or is_causal=False"
        )
    # Without a mask "sdpa" means an empty cache with room behind the prompt: query i stands at key i.
    return _Visible(True, window, query_length)


def _of_custom_mask(mask: Any, kv_length: int) -> _Visible:
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        given = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be a tensor that broadcasts to (batch, num_heads, query_length, kv_length), got {given}"
        )
    if mask.shape[-1] > kv_length:
        mask = mask[..., :kv_length]
    if mask.is_floating_point():
        return _Visible(bias=mask)
    if mask.dtype != torch.bool:
        raise RuntimeError(
            f"attention_mask must be boolean (True = attend) or floating (added to the scores), got {mask.dtype}"
        )
    if mask.shape[1] == mask.shape[2] == 1 and mask.shape[3] == kv_length:
        return _Visible(key_padding_mask=mask[:, 0, 0])
    return _Visible(mask=mask)


def _packing(
    q: Tensor, k: Tensor, starts_q: Tensor | None, starts_k: Tensor | None, longest_q: Any, longest_k: Any
) -> tuple[Tensor, Tensor, int | None, int | None]:
    if starts_q is None or starts_k is None:
        missing = "cu_seq_lens_q" if starts_q is None else "cu_seq_lens_k"
        raise ValueError(f"cu_seq_lens_q and cu_seq_lens_k go together: {missing} is None")
    # A hint that lies on the device would have to be read back.
    hints = [None if isinstance(hint, Tensor) and not readable(hint) else hint for hint in (longest_q, longest_k)]
    hints = [int(hint) if isinstance(hint, Tensor) else hint for hint in hints]
    return starts_q.to(q.device, torch.int32), starts_k.to(k.device, torch.int32), hints[0], hints[1]


def _with_bias(visible: _Visible, position_bias: Tensor | None, num_keys: int) -> _Visible:
    if position_bias is None:
        return visible
    if position_bias.shape[-1] > num_keys:
        position_bias = position_bias[..., :num_keys]
    return replace(visible, bias=position_bias if visible.bias is None else visible.bias + position_bias)


def _with_chosen(
    visible: _Visible,
    module: torch.nn.Module,
    q: Tensor,
    num_keys: int,
    indices: Tensor | None,
    block_indices: Tensor | None,
) -> _Visible:
    """What of the visible keys is left where a layer has chosen some of them for each query."""
    chosen = visible.mask
    if indices is not None:
        among = _members(indices, num_keys)[:, None]
        chosen = among if chosen is None else chosen & among
    if block_indices is not None:
        if visible.packing is not None:
            raise NotImplementedError(
                f"attn_implementation='{NAME}': block_indices: blocks are counted from the start of a row, not of a packed text: pad them"
            )
        size = int(module.indexer.block_size)  # type: ignore[union-attr,arg-type]
        among = _members(block_indices, -(-num_keys // size)).repeat_interleave(size, -1)[..., :num_keys]
        among = among.repeat_interleave(q.shape[2] // among.shape[1], 1)
        chosen = among if chosen is None else chosen & among
    return replace(visible, mask=chosen)


def _members(indices: Tensor, size: int) -> Tensor:
    """Boolean (..., size), True at the indices that stand in (..., any number); those outside (a cache's unwritten slots) for none."""
    places = torch.where((indices < 0) | (indices >= size), size, indices).long()
    return torch.zeros(*indices.shape[:-1], size + 1, dtype=torch.bool, device=indices.device).scatter_(
        -1, places, True
    )[..., :size]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: _Visible, options: dict[str, Any], grad_options: dict[str, Any]
) -> Tensor:
    if visible.packing is not None:
        if visible.mask is None and visible.bias is None and visible.key_padding_mask is None:
            return _attend_packed(q, k, v, visible, options, grad_options)
        visible = _with_sequences_in_the_mask(visible, q, k)
    batch, kv_length = k.shape[:2]
    if visible.key_padding_mask is not None and visible.key_padding_mask.shape[0] != batch:
        visible = replace(visible, key_padding_mask=visible.key_padding_mask.expand(batch, -1))
    terms = {"causal": visible.causal, "window": visible.window, "bias": visible.bias, **options}
    if _is_decoding(q, k, v, visible, options["sinks"], grad_options["dropout_p"]):
        mask = visible.mask
        if visible.key_padding_mask is not None:
            padding = visible.key_padding_mask[:, None, None, :]
            mask = padding if mask is None else mask & padding
        cache_seqlens = torch.full((batch,), kv_length, dtype=torch.int32, device=q.device)
        out = decode_attention(q, k, v, cache_seqlens, mask=mask, **terms)
    else:
        terms |= {"mask": visible.mask, "key_padding_mask": visible.key_padding_mask, **grad_options}
        out = attention(q, k, v, **terms)
    assert isinstance(out, Tensor)
    return out


def _is_decoding(q: Tensor, k: Tensor, v: Tensor, visible: _Visible, sinks: Tensor | None, dropout_p: float) -> bool:
    """Whether the op for decoding serves, which lets many programs share the keys of one sequence."""
    if q.shape[1] != 1 or dropout_p > 0:
        return False
    inputs = (q, k, v, visible.bias, sinks)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return False
    # On a CPU it takes one sequence after another as soon as there is a mask.
    plain = visible.mask is None and visible.key_padding_mask is None and visible.bias is None
    return plain or q.device.type != "cpu"


def _attend_packed(
    q: Tensor, k: Tensor, v: Tensor, visible: _Visible, options: dict[str, Any], grad_options: dict[str, Any]
) -> Tensor:
    assert visible.packing is not None
    starts_q, starts_k, longest_q, longest_k = visible.packing
    out = attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), causal=visible.causal, window=visible.window, cu_seqlens_q=starts_q,
        cu_seqlens_k=starts_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k, **options, **grad_options,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.view(*q.shape[:-1], out.shape[-1])


def _with_sequences_in_the_mask(visible: _Visible, q: Tensor, k: Tensor) -> _Visible:
    """Packed sequences beside a mask or a bias over whole rows: what is outside a query's sequence is hidden too."""
    assert visible.packing is not None
    if q.shape[1] != k.shape[1]:
        raise NotImplementedError(
            f"attn_implementation='{NAME}': cu_seq_lens with a mask or position_bias needs as many queries as keys, got {q.shape[1]} and "
            f"{k.shape[1]}"
        )
    tokens = torch.arange(q.shape[0] * q.shape[1], device=q.device, dtype=torch.int32)
    ids_q, ids_k = (torch.bucketize(tokens, starts, right=True).view(q.shape[:2]) for starts in visible.packing[:2])
    same = (ids_q[:, :, None] == ids_k[:, None, :])[:, None]
    return replace(visible, packing=None, mask=same if visible.mask is None else visible.mask & same)
