"""Appending to a KV cache in place: the public function, which backend serves it, and its registered ops. It has no gradient."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pytransformer import extension, reference
from pytransformer.kernels.plans import Plans
from pytransformer.ops import checks, kv_append_torch
from pytransformer.ops.attention_checks import is_autocasting
from pytransformer.ops.autograd import mark_changed, requires_grad
from pytransformer.ops.backend import (
    BackendChoice,
    Candidate,
    goes_straight,
    is_any_autocast_enabled,
    is_plain,
    serves_all,
)
from pytransformer.ops.kv_append_checks import AppendCall, check_kv_append, count_tokens, scales_are_written, tensors_of


def _kernels_why_not(call: AppendCall) -> str | None:
    if call.k.dtype == torch.float64:
        return "the kernels compute in float32; float64 is served by torch and the reference"
    return None


CHOICE = BackendChoice(
    "kv_append",
    (
        Candidate("cuda", _kernels_why_not, "float64"),
        Candidate("triton", _kernels_why_not, "float64"),
        Candidate("torch", kv_append_torch.why_not, "quantised caches; anything on a GPU"),
        Candidate("reference", serves_all),
    ),
)


def kv_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor | None = None,
    slot_mapping: Tensor | None = None,
    block_table: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    positions: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    q: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_weight_offset: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | None:
    """Writes new keys and values into the caches, in place: QK-norm, RoPE, quantise, write; in one launch (CUDA, Triton).

    Only the caches and per-token scales are changed; what is written without norm, RoPE or quantisation has the bits of k and v. The
    place of a token comes from ``slot_mapping``, or is position ``cache_seqlens[b] + t`` for token t of sequence b: in row b of a
    contiguous cache (or ``cache_batch_idx[b]``), or in the page that ``block_table`` gives. Not differentiable.

    Args:
        k: (batch, seqlen_new, num_kv_heads, head_dim), or packed (total, num_kv_heads, head_dim) with ``cu_seqlens`` or ``slot_mapping``.
            float32, float16, bfloat16 (float64: torch and reference only); head_dim a multiple of 8 from 8 to 256; last dimension
            contiguous. Under autocast k, v and q are cast to the dtype of floating caches.
        v: like k, with a head_dim of its own.
        k_cache: (batch, capacity, num_kv_heads, head_dim) or (pages, page_size, num_kv_heads, head_dim), any page_size from 1. Dtype of k,
            or int8 / float8_e4m3fn with scales.
        v_cache: like k_cache, with v's head_dim.
        cache_seqlens: int32 (batch), length of each sequence before appending, i.e. where writing starts. Either this or slot_mapping.
        slot_mapping: int64, one entry per token, ``page · page_size + offset``; negative = skip the token.
        block_table: int32 (batch, max_pages), with cache_seqlens: p goes to ``cache[block_table[b, p // page_size], p % page_size]``.
        cu_seqlens: int32 (batch + 1), starts of the packed sequences in k, v and q.
        cache_batch_idx: int32 (batch), with cache_seqlens and a contiguous cache: the row of each sequence.
        positions: int32 or int64, one entry per token (or (seqlen_new), the same for each sequence), for RoPE; None = the positions written
            to. Required with slot_mapping and cos.
        cos, sin: float32 (length, rotary_dim / 2) from :func:`rope_tables`; None = no rotation. Only the first rotary_dim features rotate.
        interleaved: True rotates adjacent pairs, False (Llama) pairs i with i + rotary_dim / 2.
        q: queries of the same tokens, like k with num_heads: normalised and rotated too, and returned.
        q_norm_weight, k_norm_weight: floating (head_dim), RMSNorm over each head of q and k; None = no norm.
        norm_eps: at least 0, added to the mean square.
        norm_weight_offset: added to the norm weights (1.0 for Gemma).
        k_scale, v_scale: float32, for quantised caches and required there: code = round(x / scale). Of shape (num_kv_heads) they are read;
            of shape ``cache.shape[:-1]`` they are written, one per token and head: amax(\\|x\\|) / highest code. Both alike.
        backend: "cuda", "triton", "torch" or "reference"; None takes what was set by ``use_backend`` or PYTRANSFORMER_BACKEND, else the
            first that can serve the call.

    Returns:
        The new q, in a new contiguous tensor; None if q is None.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices, strides or options that do not go together; positions, slots, pages or rows that do not exist, or are
            written twice. Values on a GPU are not read back for this: there such writes are dropped, and PYTRANSFORMER_DEBUG=1 makes them
            raise.
        RuntimeError: grad is enabled and an input requires it.
        NotImplementedError: the named backend cannot serve this call; the message says why.

    Sources: Kwon et al. 2023 (paged caches); Su et al. 2021 (RoPE); Henry et al. 2020 (QK-norm).
    """
    given = None
    try:
        straight = goes_straight(backend, k, v, k_cache, v_cache, q)
        if (
            straight is not None
            and not checks.DEBUG
            and not (
                torch.is_grad_enabled()
                and requires_grad(k, v, k_cache, v_cache, q, q_norm_weight, k_norm_weight, cos, sin)
            )
            and not is_any_autocast_enabled()
        ):
            if straight == "triton":
                given = (
                    k, v, k_cache, v_cache, k_scale, v_scale, cache_seqlens, slot_mapping, block_table, cu_seqlens, cache_batch_idx,
                    positions, cos, sin, q, q_norm_weight, k_norm_weight, interleaved, norm_eps, norm_weight_offset,
                )  # fmt: skip
                checked = _CHECKED.find(given)
                if checked is not None:
                    launch, written = checked
                    launched: Tensor | None = launch(given)
                    mark_changed(*written(given))
                    return launched
            else:
                few = k_scale is v_scale is cu_seqlens is cache_batch_idx is q_norm_weight is k_norm_weight is None
                if few and cos is sin is q is positions is None:
                    where = cache_seqlens if slot_mapping is None else _one_of(cache_seqlens, slot_mapping)
                    _cuda_ops()[0](k, v, k_cache, v_cache, where, block_table)
                    mark_changed(k_cache, v_cache)
                    return None
                if few and q is not None and cos is not None and sin is not None:
                    where = cache_seqlens if slot_mapping is None else _one_of(cache_seqlens, slot_mapping)
                    rotated: Tensor = _cuda_ops()[1](
                        q, k, v, k_cache, v_cache, where, block_table, cos, sin, positions, interleaved
                    )
                    mark_changed(k_cache, v_cache)
                    return rotated
                return _straight(
                    k, v, k_cache, v_cache, k_scale, v_scale, cache_seqlens, slot_mapping, block_table, cu_seqlens, cache_batch_idx,
                    positions, cos, sin, q, q_norm_weight, k_norm_weight, interleaved, norm_eps, norm_weight_offset,
                )  # fmt: skip
    except (RuntimeError, TypeError, AttributeError):
        pass  # an argument is not as it should be: the checks below say which, in clearer words than the op's
    call = check_kv_append(
        AppendCall(
            k, v, k_cache, v_cache, k_scale, v_scale, cache_seqlens, slot_mapping, block_table, cu_seqlens, cache_batch_idx, positions,
            cos, sin, q, q_norm_weight, k_norm_weight, interleaved, norm_eps, norm_weight_offset,
        )
    )  # fmt: skip
    checks.refuse_grad(
        "kv_append", k=k, v=v, k_cache=k_cache, v_cache=v_cache, q=q, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight,
        cos=cos, sin=sin,
    )  # fmt: skip
    chosen = CHOICE.select(call, call.k.device.type, backend)
    if chosen == "cuda":
        return _cuda(call)
    if is_plain(*tensors_of(call)):
        if given is not None and chosen == "triton":
            _keep(given, call)
        return _append(call, chosen)
    op = torch.ops.pytransformer.kv_append_scaled if scales_are_written(call) else torch.ops.pytransformer.kv_append
    new_q: Tensor = op(*call, chosen)
    return None if q is None else new_q


# --- The registered ops: scales that are read (or absent) and scales that are written; each declares what it changes. -------------------

_ARGUMENTS = (
    "Tensor? cache_seqlens, Tensor? slot_mapping, Tensor? block_table, Tensor? cu_seqlens, Tensor? cache_batch_idx, Tensor? positions, "
    "Tensor? cos, Tensor? sin, Tensor? q, Tensor? q_norm_weight, Tensor? k_norm_weight, bool interleaved, float norm_eps, "
    "float norm_weight_offset, str backend) -> Tensor"
)
torch.library.define(
    "pytransformer::kv_append",
    f"(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k_scale, Tensor? v_scale, {_ARGUMENTS}",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "pytransformer::kv_append_scaled",
    f"(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) k_scale, Tensor(d!) v_scale, {_ARGUMENTS}",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _fake(*arguments: Any) -> Tensor:
    call = AppendCall._make(arguments[: len(AppendCall._fields)])  # the extension's ops have no backend behind them
    return call.k.new_empty(0) if call.q is None else call.q.new_empty(call.q.shape)


def _append_op(*arguments: Any) -> Tensor:
    call = AppendCall._make(arguments[:-1])
    new_q = _append(call, arguments[-1])
    return call.k.new_empty(0) if new_q is None else new_q


def _append(call: AppendCall, backend: str) -> Tensor | None:
    if count_tokens(call) == 0:
        return None if call.q is None else call.q.new_empty(call.q.shape)
    if backend == "triton":
        return _triton(call)
    composite = kv_append_torch.append if backend == "torch" else _reference
    if is_autocasting(call.k.device.type):
        with torch.autocast(call.k.device.type, enabled=False):
            return composite(call)
    return composite(call)


def _options(call: AppendCall) -> dict[str, Any]:
    names = AppendCall._fields[AppendCall._fields.index("k_scale") :]
    return {name: getattr(call, name) for name in names}


def _triton(call: AppendCall) -> Tensor | None:
    from pytransformer.kernels.kv_append import kv_append_forward

    new_q = kv_append_forward(call)
    mark_changed(*_written(call))
    return new_q


# By the arguments as given, in AppendCall's order: the launch, kept after its first call has passed the checks, and what takes the tensors
# that it writes to out of the arguments.
_CHECKED: Plans[tuple[Callable[..., Tensor | None], Callable[..., tuple[Tensor, ...]]]] = Plans()


def _keep(given: tuple[Any, ...], call: AppendCall) -> None:
    """Keeps the launch of a checked call, unless values were read for its checks or tensors copied."""
    from pytransformer.kernels.kv_append import AppendLaunch

    tensors = tensors_of(call)
    if any(checks.readable(tensor) for tensor in tensors if not tensor.is_floating_point() or tensor.ndim == 1):
        return
    for before, after in zip(tensors_of(AppendCall._make(given)), tensors):
        if before.data_ptr() != after.data_ptr():
            return
    launch = AppendLaunch(call)
    names = ("k_cache", "v_cache", "k_scale", "v_scale") if scales_are_written(call) else ("k_cache", "v_cache")
    _CHECKED.add(given, (launch, operator.itemgetter(*map(AppendCall._fields.index, names))))


def _written(call: AppendCall) -> tuple[Tensor, ...]:
    scales = (call.k_scale, call.v_scale) if scales_are_written(call) else ()
    return call.k_cache, call.v_cache, *(scale for scale in scales if scale is not None)


@functools.cache
def _cuda_ops() -> tuple[Any, ...]:
    """The extension's ops: for most calls two with few arguments, each of which costs as much as a dictionary look-up; then the others."""
    # What OpOverload.__call__ calls: a tenth of the time of a small call is in that step.
    names = ("kv_store", "kv_rotate_store", "kv_append", "kv_append_scaled")
    return tuple(extension.op(name)._op for name in names)


def _one_of(cache_seqlens: Tensor | None, slot_mapping: Tensor | None) -> Tensor | None:
    """The one that is given; ``None``, which the ops refuse, if both are or neither is."""
    if cache_seqlens is None:
        return slot_mapping
    return cache_seqlens if slot_mapping is None else None


def _straight(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, cache_seqlens: Tensor | None,
    slot_mapping: Tensor | None, block_table: Tensor | None, cu_seqlens: Tensor | None, cache_batch_idx: Tensor | None,
    positions: Tensor | None, cos: Tensor | None, sin: Tensor | None, q: Tensor | None, q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None, interleaved: bool, norm_eps: float, norm_weight_offset: float,
) -> Tensor | None:  # fmt: skip
    """An eager call by the extension's op."""
    op = _cuda_ops()[2]
    written: tuple[Tensor, ...] = (k_cache, v_cache)
    if k_scale is not None and v_scale is not None and k_scale.ndim > 1:
        op, written = _cuda_ops()[3], (k_cache, v_cache, k_scale, v_scale)
    new_q: Tensor = op(
        k, v, k_cache, v_cache, k_scale, v_scale, cache_seqlens, slot_mapping, block_table, cu_seqlens, cache_batch_idx,
        positions, cos, sin, q, q_norm_weight, k_norm_weight, interleaved, norm_eps, norm_weight_offset,
    )  # fmt: skip
    mark_changed(*written)
    return None if q is None else new_q


def _cuda(call: AppendCall) -> Tensor | None:
    """By the extension's op, whatever the tensors are: it is the one that a compiled graph has."""
    op = (
        torch.ops.pytransformer_cuda.kv_append_scaled
        if scales_are_written(call)
        else torch.ops.pytransformer_cuda.kv_append
    )
    new_q: Tensor = op(*call)
    if is_plain(*tensors_of(call)):
        mark_changed(*_written(call))
    return None if call.q is None else new_q


def _reference(call: AppendCall) -> Tensor | None:
    options = _options(call)
    if call.positions is not None:
        options["positions"] = call.positions.view(call.k.shape[:-2])
    new_q = reference.kv_append(call.k, call.v, call.k_cache, call.v_cache, **options)
    return None if new_q is None else new_q.contiguous()


for _name in ("kv_append", "kv_append_scaled"):
    torch.library.register_fake(f"pytransformer::{_name}", _fake)
    torch.library.impl(f"pytransformer::{_name}", "CompositeExplicitAutograd", _append_op)
    extension.register_fake(_name, _fake)
extension.register_fake("kv_store", lambda *arguments: None)
extension.register_fake("kv_rotate_store", lambda q, *arguments: q.new_empty(q.shape))
