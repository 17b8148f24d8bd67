"""Decode attention: the public function, which backend serves it, and its registered op. It has no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pytransformer import extension, reference
from pytransformer.kernels.plans import Plans
from pytransformer.ops import checks, decode_attention_torch
from pytransformer.ops.attention_checks import is_autocasting
from pytransformer.ops.autograd import requires_grad
from pytransformer.ops.backend import (
    BackendChoice,
    Candidate,
    goes_straight,
    is_any_autocast_enabled,
    is_plain,
    requested_backend,
    serves_all,
    warn_once,
)
from pytransformer.ops.decode_attention_checks import (
    DecodeCall,
    batch_size,
    capacity_of,
    check_decode_attention,
    is_packed,
    tensors_of,
)


def _triton_why_not(call: DecodeCall) -> str | None:
    if call.q.dtype == torch.float64:
        return "the kernels compute in float32; float64 is served by torch and the reference"
    return None


def _cuda_why_not(call: DecodeCall) -> str | None:
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernels are for float16 and bfloat16 queries, got {checks.short(call.q.dtype)}"
    return None


CHOICE = BackendChoice(
    "decode_attention",
    (
        Candidate("triton", _triton_why_not, "float64"),
        # Behind Triton until it has been measured on a GPU.
        Candidate("cuda", _cuda_why_not, "float32 and float64"),
        Candidate("torch", decode_attention_torch.why_not, "softcap, sinks, return_lse; anything on a GPU"),
        Candidate("reference", serves_all),
    ),
)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    softmax_scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(softcap(q kᵀ · softmax_scale) + bias + alibi) v`` of new queries over keys and values that lie in a cache.

    Sequence b has ``cache_seqlens[b]`` keys, the newest included, and its query t of seqlen_q sits at position
    ``cache_seqlens[b] - seqlen_q + t`` among them; with d = position - key, it sees the key iff every given condition holds: causal:
    d >= 0; window: -right <= d <= left; ``mask``; ``bias`` is not -inf. A query that sees no key gives output 0 and lse -inf. Any seqlen_q
    serves: one token, a few (speculation), a chunk of a prompt. The result for a sequence has the same bits whatever else is in the
    batch, whatever the capacity, paged or not (Triton, CUDA). Not differentiable.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), or packed (total_q, num_heads, head_dim) with ``cu_seqlens_q``. float32, float16,
            bfloat16 (float64: torch and reference only); head_dim a multiple of 8 from 8 to 256; last dimension contiguous. Cast to the
            dtype of the cache under autocast.
        k_cache: (batch, capacity, num_kv_heads, head_dim), or (pages, page_size, num_kv_heads, head_dim) with ``block_table``, any
            page_size from 1. Dtype of q, or int8 / float8_e4m3fn with scales. num_kv_heads divides num_heads; query head h reads key
            head ``h // (num_heads // num_kv_heads)``.
        v_cache: like k_cache, with a head_dim of its own.
        cache_seqlens: int32 (batch), keys of each sequence, from 0 to the capacity.
        causal: see above; with one query per sequence it changes nothing.
        cu_seqlens_q: int32 (batch + 1), starts of the packed queries of each sequence.
        max_seqlen_q: hint for packed queries: no sequence has more. Without it nothing is read back, and more programs are launched.
        block_table: int32 (batch, max_pages): key p of sequence b is ``cache[block_table[b, p // page_size], p % page_size]``. Entries
            behind the last key, and before the window, are never used.
        cache_batch_idx: int32 (batch), the row of a contiguous cache that holds each sequence; its own index if None.
        cache_leftpad: int32 (batch): the keys of a sequence lie from this slot on (0 if None).
        softmax_scale: finite; 1 / sqrt(head_dim) if None.
        window: (left, right), inclusive, -1 = unlimited.
        softcap: c > 0 replaces a scaled score s by c · tanh(s / c).
        mask: boolean (True = attend) or integer (nonzero = attend), broadcast to (batch, num_heads, seqlen_q, longest cache_seqlens), keys
            counted from each sequence's first. Packed: max_seqlen_q for seqlen_q.
        bias: floating, broadcast likewise, added to the scores; -inf hides.
        alibi_slopes: floating (num_heads) or (batch, num_heads): -slope · |d| is added to the scores.
        sinks: floating (num_heads): a logit that joins each row's denominator and brings no value.
        k_scale, v_scale: float32, for quantised caches and required there: key = code · scale; (num_kv_heads), or per token
            ``cache.shape[:-1]``, both alike.
        num_splits: how many programs share a sequence's keys; 0 leaves it to the launch policy. A fixed number changes the order of
            summation, never the meaning.
        return_lse: return the log-sum-exp too.
        backend: "triton", "cuda", "torch" or "reference"; None takes what was set by ``use_backend`` or PYTRANSFORMER_BACKEND, else the
            first that can serve the call. The reference warns once when it was not asked for by name.

    Returns:
        (batch, seqlen_q, num_heads, value head_dim) or (total_q, num_heads, value head_dim) in q's dtype. With ``return_lse`` also the
        natural logarithm of each row's softmax denominator, sinks included: (batch, num_heads, seqlen_q) or (num_heads, total_q),
        float32 (float64 for float64 inputs).

    Raises:
        TypeError: a wrong type or dtype, such as a floating-point ``mask`` (additive masks are passed as ``bias``).
        ValueError: shapes, devices, strides, head counts, head_dim that do not fit; lengths past the cache's end and pages that do not
            exist (values on a GPU are read under PYTRANSFORMER_DEBUG=1 only; without it lengths are cut to the cache there).
        RuntimeError: grad is enabled and an input requires it.
        NotImplementedError: the named backend cannot serve this call; the message says why.

    Sources: Dao et al. 2023 (Flash-Decoding); Kwon et al. 2023 (paged caches); Ainslie et al. 2023 (GQA).
    """
    alike = None
    if (
        cu_seqlens_q is cache_leftpad is mask is bias is alibi_slopes is k_scale is v_scale is None
        and max_seqlen_q is None
        and _goes_straight(backend, q, k_cache, v_cache, sinks)
    ):
        alike = (
            q, k_cache, v_cache, cache_seqlens, None, None, block_table, cache_batch_idx, None, None, None, None, sinks, None, None,
            softmax_scale, causal, window, softcap, num_splits, return_lse,
        )  # fmt: skip
        launch = _CHECKED.find(alike)
        if launch is not None:
            results = launch(alike)
            return results if return_lse else results[0]
    call = DecodeCall(
        q, k_cache, v_cache, cache_seqlens, cu_seqlens_q, max_seqlen_q, block_table, cache_batch_idx, cache_leftpad, mask, bias,
        alibi_slopes, sinks, k_scale, v_scale, 1.0, causal, window, softcap, num_splits, return_lse,
    )  # fmt: skip
    call = check_decode_attention(call, softmax_scale)
    checks.refuse_grad("decode_attention", q=q, k_cache=k_cache, v_cache=v_cache, bias=bias, sinks=sinks)
    named = requested_backend(backend)
    chosen = CHOICE.select(call, call.q.device.type, named)
    if chosen == "reference" and named is None:
        why = CHOICE.why_not("torch", call, call.q.device.type)
        warn_once(
            f"decode_attention: the reference serves this call, one sequence after another with all its scores. torch: {why}"
        )
    if is_plain(*tensors_of(call)):
        if alike is not None and chosen == "triton":
            _keep(alike, call)
        out, lse = _decode(call, chosen)
    else:
        out, lse = torch.ops.pytransformer.decode_attention(*_to_arguments(call, chosen))
    return (out, lse) if return_lse else out


# --- Calls like one whose checks have passed: Triton's launch at once. By the arguments as given, in DecodeCall's order. -----------------

_CHECKED: Plans[Callable[[Any], tuple[Tensor, Tensor]]] = Plans()


def _goes_straight(backend: str | None, q: Tensor, k_cache: Tensor, v_cache: Tensor, sinks: Tensor | None) -> bool:
    """Whether Triton's launcher may be called at once, and without a gradient, a cast, or float32's choice of precision."""
    named = requested_backend(backend)
    if named != "triton" and (named is not None or not getattr(q, "is_cuda", False)):
        return False
    if goes_straight("triton", q, k_cache, v_cache, sinks) is None:
        return False
    if checks.DEBUG or is_any_autocast_enabled() or getattr(q, "dtype", None) not in (torch.float16, torch.bfloat16):
        return False
    return not (torch.is_grad_enabled() and requires_grad(q, k_cache, v_cache, sinks))


def _keep(alike: tuple[Any, ...], call: DecodeCall) -> None:
    """Keeps the launch of a checked call, unless values were read for its checks or tensors replaced."""
    from pytransformer.kernels.decode_attention.launcher import DecodeLaunch

    if checks.readable(call.cache_seqlens):
        return
    if any(after is not before for before, after in zip(alike, call) if isinstance(after, Tensor)):
        return
    _CHECKED.add(alike, DecodeLaunch(call))


# --- The registered op. ----------------------------------------------------------------------------------------------------------------

torch.library.define(
    "pytransformer::decode_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? cu_seqlens_q, SymInt? max_seqlen_q, Tensor? block_table, "
    "Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? k_scale, "
    "Tensor? v_scale, float softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap, SymInt num_splits, "
    "bool return_lse, str backend) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _to_arguments(call: DecodeCall, backend: str) -> tuple[Any, ...]:
    """The call as the flat arguments of the registered op."""
    window = DecodeCall._fields.index("window")
    return (*call[:window], *call.window, *call[window + 1 :], backend)


def _from_arguments(arguments: tuple[Any, ...]) -> tuple[DecodeCall, str]:
    window = DecodeCall._fields.index("window")
    *fields, backend = arguments
    fields[window : window + 2] = [(fields[window], fields[window + 1])]
    return DecodeCall._make(fields), backend


def _result_shapes(call: DecodeCall, backend: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    out = (*call.q.shape[:-1], call.v_cache.shape[-1])
    if backend == "torch":
        return out, (0,)  # scaled_dot_product_attention does not give it
    if is_packed(call):
        return out, (call.q.shape[1], call.q.shape[0])
    return out, (call.q.shape[0], call.q.shape[2], call.q.shape[1])


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, backend = _from_arguments(arguments)
    out, lse = _result_shapes(call, backend)
    return call.q.new_empty(out), call.q.new_empty(lse, dtype=torch.promote_types(call.q.dtype, torch.float32))


def _decode_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _decode(*_from_arguments(arguments))


def _decode(call: DecodeCall, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        return _triton(call)
    if backend == "cuda":
        return _cuda(call)
    if is_autocasting(call.q.device.type):
        with torch.autocast(call.q.device.type, enabled=False):
            return _composite(call, backend)
    return _composite(call, backend)


def _composite(call: DecodeCall, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse) by torch's own functions; no input requires grad where grad is enabled."""
    if backend == "torch":
        lse_dtype = torch.promote_types(call.q.dtype, torch.float32)
        return decode_attention_torch.attend(call).contiguous(), call.q.new_empty(0, dtype=lse_dtype)
    return _reference(call)


def _triton(call: DecodeCall) -> tuple[Tensor, Tensor]:
    from pytransformer.kernels.decode_attention.launcher import decode_attention_forward
    from pytransformer.ops.attention import allows_tf32

    return decode_attention_forward(call, allow_tf32=call.q.dtype == torch.float32 and allows_tf32())


def _fake_cuda(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = (q.shape[1], q.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty((*q.shape[:-1], v_cache.shape[-1])), q.new_empty(lse, dtype=torch.float32)


def _cuda(call: DecodeCall) -> tuple[Tensor, Tensor]:
    out, lse = extension.op("decode_attention")(
        call.q, call.k_cache, call.v_cache, call.cache_seqlens, call.cu_seqlens_q, call.max_seqlen_q, call.block_table,
        call.cache_batch_idx, call.cache_leftpad, _expanded(call.mask, call), _expanded(call.bias, call), call.alibi_slopes, call.sinks,
        call.k_scale, call.v_scale, call.softmax_scale, call.causal, *call.window, call.softcap, call.num_splits,
    )  # fmt: skip
    return out, lse


def _expanded(tensor: Tensor | None, call: DecodeCall) -> Tensor | None:
    """A mask or bias with strides of 0 where it broadcasts: (batch, num_heads, queries, keys)."""
    if tensor is None:
        return None
    rows = max(tensor.shape[2], call.q.shape[-3])
    keys = capacity_of(call) if tensor.shape[3] == 1 else tensor.shape[3]
    return tensor.expand(batch_size(call), call.q.shape[-2], rows if tensor.shape[2] == 1 else tensor.shape[2], keys)


def _reference(call: DecodeCall) -> tuple[Tensor, Tensor]:
    """The reference in at least float32, rounded once at the end."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    quantised = call.k_scale is not None
    result = reference.decode_attention(
        call.q.to(wide),
        call.k_cache if quantised else call.k_cache.to(wide),
        call.v_cache if quantised else call.v_cache.to(wide),
        call.cache_seqlens,
        causal=call.causal,
        cu_seqlens_q=call.cu_seqlens_q,
        block_table=call.block_table,
        cache_batch_idx=call.cache_batch_idx,
        cache_leftpad=call.cache_leftpad,
        softmax_scale=call.softmax_scale,
        window=call.window,
        softcap=call.softcap,
        mask=call.mask,
        bias=None if call.bias is None else call.bias.to(wide),
        alibi_slopes=call.alibi_slopes,
        sinks=call.sinks,
        k_scale=call.k_scale,
        v_scale=call.v_scale,
        return_lse=True,
    )
    assert isinstance(result, tuple)
    return result[0].to(call.q.dtype).contiguous(), result[1].contiguous()


torch.library.register_fake("pytransformer::decode_attention", _fake)
torch.library.impl("pytransformer::decode_attention", "CompositeExplicitAutograd", _decode_op)
extension.register_fake("decode_attention", _fake_cuda)
