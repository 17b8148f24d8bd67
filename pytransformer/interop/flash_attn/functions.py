"""``flash_attn_func`` and its packed and variable-length forms, on :func:`pytransformer.attention`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer.interop.flash_attn.checks import (
    check_alibi_slopes,
    check_dimensions,
    check_packing,
    raises_as_flash_attn,
    softcap_of,
    window_of,
    with_contiguous_rows,
)
from pytransformer.interop.flash_attn.probabilities import signed_probabilities
from pytransformer.ops import checks
from pytransformer.ops.attention import attention
from pytransformer.ops.decode_attention import decode_attention
from pytransformer.reference.philox import draw_dropout_seed

AttentionResult = Tensor | tuple[Tensor, Tensor, Tensor]


class Options(NamedTuple):
    """The arguments that all functions here have, in flash_attn's order."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    alibi_slopes: Tensor | None
    deterministic: bool
    return_attn_probs: bool


class Packing(NamedTuple):
    """Where the sequences of packed tensors begin, and how long the longest are."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int | None
    max_seqlen_k: int | None


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionResult:
    """``dropout(softmax(softcap(q kᵀ · softmax_scale) + alibi)) v`` as ``flash_attn.flash_attn_func`` computes it.

    With ``d = i + seqlen_k - seqlen_q - j`` query i sees key j iff causal: d >= 0, and -window_size[1] <= d <= window_size[0]: both are
    aligned bottom-right when the lengths differ. A row that sees no key gives zeros. Differentiable once in q, k, v, also through lse.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), float16 or bfloat16; here also float32 (float64 without a kernel), and on a CPU.
            Any head_dim: up to 256 by the kernels, which copy what is not a multiple of 8, and above by torch.
        k: (batch, seqlen_k, num_kv_heads, head_dim); num_kv_heads divides num_heads, and query head h reads key head
            ``h // (num_heads // num_kv_heads)``.
        v: (batch, seqlen_k, num_kv_heads, head_dim); here it may have a head_dim of its own.
        dropout_p: probability, at least 0 and below 1, that a weight is dropped; 0.0 in evaluation.
        softmax_scale: 1 / sqrt(head_dim) if None.
        causal: see above.
        window_size: (left, right), inclusive; negative = unlimited. Any pair of integers: a tuple, a list, a tensor of two.
        softcap: c > 0 replaces a scaled score s by c · tanh(s / c); anything else is off.
        alibi_slopes: float32 (num_heads) or (batch, num_heads): -slope · |d| is added to the scores.
        deterministic: gradients with the same bits each run. False leaves it to ``torch.use_deterministic_algorithms``.
        return_attn_probs: return lse and S_dmask too.

    Returns:
        out (batch, seqlen_q, num_heads, value head_dim) in q's dtype; with ``return_attn_probs`` (out, softmax_lse, S_dmask):
        softmax_lse float32 (batch, num_heads, seqlen_q), the natural logarithm of each row's softmax denominator, -inf for a row that sees
        no key; S_dmask empty without dropout, and with it (batch, num_heads, seqlen_q, seqlen_k), the softmax with a negative sign where
        a weight was dropped: quadratic in length, for tests.

    Raises:
        TypeError: q, k or v is not a tensor.
        IndexError: too few dimensions.
        RuntimeError: any other argument that does not fit, and NotImplementedError, which is one, where no backend serves the call.

    Sources: Dao 2023 (FlashAttention-2); the meaning is that of flash_attn 2.8.
    """
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return _attend(q, k, v, options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionResult:
    """:func:`flash_attn_func` with ``kv`` (batch, seqlen_k, 2, num_kv_heads, head_dim), keys and values in one tensor.

    The gradient arrives in one tensor too. Raises what :func:`flash_attn_func` raises, and IndexError or RuntimeError where ``kv`` does
    not hold two tensors.
    """
    check_dimensions("kv", kv, "(batch, seqlen_k, 2, num_kv_heads, head_dim)")
    check_packing("kv", kv, 2, 2)
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return _attend(q, kv[:, :, 0], kv[:, :, 1], options)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionResult:
    """:func:`flash_attn_func` with ``qkv`` (batch, seqlen, 3, num_heads, head_dim), all three in one tensor.

    The gradient arrives in one tensor too. Raises what :func:`flash_attn_func` raises, and IndexError or RuntimeError where ``qkv`` does
    not hold three tensors.
    """
    check_dimensions("qkv", qkv, "(batch, seqlen, 3, num_heads, head_dim)")
    check_packing("qkv", qkv, 2, 3)
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return _attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> AttentionResult:
    """:func:`flash_attn_func` over sequences of different lengths that lie one behind the other, without padding.

    Args:
        q: (total_q, num_heads, head_dim).
        k, v: (total_k, num_kv_heads, head_dim); with ``block_table`` (pages, page_size, num_kv_heads, head_dim), any page_size from 1.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1), starts of the sequences and the number of tokens.
        max_seqlen_q, max_seqlen_k: lengths of the longest sequences; here None is allowed, at the price of more programs launched.
        block_table: int32 (batch, max_pages): key p of sequence b is at ``k[block_table[b, p // page_size], p % page_size]``, and
            cu_seqlens_k gives the lengths. Without gradient and without dropout.
        Others: as in :func:`flash_attn_func`.

    Returns:
        out (total_q, num_heads, value head_dim); with ``return_attn_probs`` (out, softmax_lse, S_dmask) with softmax_lse float32
        (num_heads, total_q) and S_dmask as in :func:`flash_attn_func`.

    Raises:
        As :func:`flash_attn_func`; also RuntimeError for dropout, or an input that requires grad, with ``block_table``.
    """
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if block_table is not None:
        check_dimensions("q", q, "(total_q, num_heads, head_dim)")
        for name, pages in (("k", k), ("v", v)):
            check_dimensions(name, pages, "(pages, page_size, num_kv_heads, head_dim)")
        return _attend_paged(q, k, v, options, packing, block_table)
    return _attend(q, k, v, options, packing)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionResult:
    """:func:`flash_attn_varlen_func` with ``kv`` (total_k, 2, num_kv_heads, head_dim), keys and values in one tensor."""
    check_dimensions("kv", kv, "(total_k, 2, num_kv_heads, head_dim)")
    check_packing("kv", kv, 1, 2)
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return _attend(q, kv[:, 0], kv[:, 1], options, Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionResult:
    """:func:`flash_attn_varlen_func` with ``qkv`` (total, 3, num_heads, head_dim), all three in one tensor with one ``cu_seqlens``."""
    check_dimensions("qkv", qkv, "(total, 3, num_heads, head_dim)")
    check_packing("qkv", qkv, 1, 3)
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    packing = Packing(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _attend(qkv[:, 0], qkv[:, 1], qkv[:, 2], options, packing)


# --- the way to the ops -----------------------------------------------------------------------------------------------------------------


def _attend(q: Any, k: Any, v: Any, options: Options, packing: Packing | None = None) -> AttentionResult:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        heads = "num_heads" if name == "q" else "num_kv_heads"
        check_dimensions(
            name, tensor, f"(batch, seqlen, {heads}, head_dim)" if packing is None else f"(total, {heads}, head_dim)"
        )
    return _attend_dense_or_packed(q, k, v, options, packing)


@raises_as_flash_attn
def _attend_dense_or_packed(
    q: Tensor, k: Tensor, v: Tensor, options: Options, packing: Packing | None
) -> AttentionResult:
    check_alibi_slopes(options.alibi_slopes)
    dropout_p = checks.check_float("dropout_p", options.dropout_p, minimum=0.0, below=1.0)
    return_attn_probs = checks.check_bool("return_attn_probs", options.return_attn_probs)
    # flash_attn knows nothing of torch's global setting; where that asks for more than the argument, it is followed.
    deterministic = True if checks.check_bool("deterministic", options.deterministic) else None
    meaning: dict[str, Any] = {
        "causal": options.causal,
        "window": window_of(options.window_size),
        "softmax_scale": options.softmax_scale,
        "softcap": softcap_of(options.softcap),
        "alibi_slopes": options.alibi_slopes,
        "dropout_p": dropout_p,
        # None is drawn by the op, in the same way.
        "dropout_seed": draw_dropout_seed(q.device) if return_attn_probs and dropout_p > 0.0 else None,
    }
    if packing is not None:
        packing = _read(packing)
        meaning |= {"cu_seqlens_q": packing.cu_seqlens_q, "cu_seqlens_k": packing.cu_seqlens_k}
        meaning |= {"max_seqlen_q": packing.max_seqlen_q, "max_seqlen_k": packing.max_seqlen_k}
    q, k, v = (with_contiguous_rows(tensor) for tensor in (q, k, v))
    result = attention(q, k, v, deterministic=deterministic, return_lse=return_attn_probs, **meaning)
    if isinstance(result, Tensor):
        return result
    return *result, q.new_empty(0) if meaning["dropout_seed"] is None else signed_probabilities(q, k, **meaning)


@raises_as_flash_attn
def _attend_paged(
    q: Tensor, k: Tensor, v: Tensor, options: Options, packing: Packing, block_table: Tensor
) -> AttentionResult:
    check_alibi_slopes(options.alibi_slopes)
    packing = _read(packing)
    if options.dropout_p != 0:
        raise NotImplementedError(f"dropout_p must be 0.0 with block_table, got {options.dropout_p}")
    checks.refuse_grad("flash_attn_varlen_func with block_table", q=q, k=k, v=v)
    for name, tensor in (("k", k), ("v", v)):
        checks.check_same_dtype(name, tensor, "q", q)
    seqlens_k = packing.cu_seqlens_k.diff()
    if packing.max_seqlen_k is not None:
        checks.check_values("cu_seqlens_k", seqlens_k, 0, packing.max_seqlen_k, "sequences (max_seqlen_k)")
    q, k, v = (with_contiguous_rows(tensor) for tensor in (q, k, v))
    result = decode_attention(
        q,
        k,
        v,
        seqlens_k,
        causal=options.causal,
        cu_seqlens_q=packing.cu_seqlens_q,
        max_seqlen_q=packing.max_seqlen_q,
        block_table=block_table,
        softmax_scale=options.softmax_scale,
        window=window_of(options.window_size),
        softcap=softcap_of(options.softcap),
        alibi_slopes=options.alibi_slopes,
        return_lse=checks.check_bool("return_attn_probs", options.return_attn_probs),
    )
    return result if isinstance(result, Tensor) else (*result, q.new_empty(0))


def _read(packing: Packing) -> Packing:
    """Checked, with lengths that are ints: code that took them from ``seqlens.max()`` passes tensors, which are read back."""
    for name, value in (("cu_seqlens_q", packing.cu_seqlens_q), ("cu_seqlens_k", packing.cu_seqlens_k)):
        checks.check_tensor(name, value, ndim=1, dtypes=(torch.int32,), layout="(batch + 1)")
    longest_q, longest_k = (
        int(value) if isinstance(value, Tensor) else value for value in (packing.max_seqlen_q, packing.max_seqlen_k)
    )
    return packing._replace(max_seqlen_q=longest_q, max_seqlen_k=longest_k)
