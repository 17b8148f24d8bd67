"""torch's own attention interfaces, served by this package.

* :func:`scaled_dot_product_attention`: the function, argument for argument.
* :class:`patch_sdpa`: a context in which ``torch.nn.functional.scaled_dot_product_attention`` is that function.
* :func:`register_flash_attention`: an implementation in torch's registry of flash attention kernels.

The module is :class:`pytransformer.nn.MultiheadAttention`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import TorchFunctionMode

from pytransformer.interop.torch_flash import register_flash_attention
from pytransformer.nn.functional import attend
from pytransformer.nn.multihead_attention import multi_head_attention_forward
from pytransformer.ops.backend import warn_once
from pytransformer.ops.checks import FLOAT_DTYPES, FLOAT_DTYPES_AND_DOUBLE, describe, short
from pytransformer.ops.precision import autocast_to_lower, is_autocasting

__all__ = ["patch_sdpa", "register_flash_attention", "scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``: its arguments, its meaning, its errors.

    Args:
        query: (..., num_heads, seqlen_q, head_dim), at least (seqlen_q, head_dim). float32, float16, bfloat16 or float64.
        key: (..., num_kv_heads, seqlen_k, head_dim). Leading dimensions broadcast among query, key and value.
        value: (..., num_kv_heads, seqlen_k, value head_dim).
        attn_mask: broadcasts to (..., num_heads, seqlen_q, seqlen_k), without being expanded. Boolean: True = attend. Floating, of
            query's dtype or float32: added to the scores, with a gradient at its own shape. Or a ``torch.nn.attention.bias.CausalBias``.
        dropout_p: probability that a weight is dropped, in training or not, as in torch's function.
        is_causal: query i sees key j iff ``j <= i``: aligned top-left whatever the lengths, where ``pytransformer.attention`` aligns
            bottom-right.
        scale: 1 / sqrt(head_dim) if ``None``.
        enable_gqa: num_kv_heads may divide num_heads; query head h reads key head ``h // (num_heads // num_kv_heads)``.

    Returns:
        (..., num_heads, seqlen_q, value head_dim). A query that may attend to nothing gives 0. As with torch's function the order of the
        dimensions in memory is the kernel's (on a GPU heads lie behind the sequence, so that merging them costs nothing): ``reshape`` works
        always, ``view`` where it happens to fit.

    Raises:
        TypeError: an argument that is no tensor, number or bool where it must be.
        RuntimeError: dtypes, devices and shapes that do not fit, ``attn_mask`` together with ``is_causal``.
        NotImplementedError: nested or sparse tensors, complex numbers.
    """
    _check_kinds(query, key, value, attn_mask, is_causal, enable_gqa)
    dropout_p = _number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    options: dict[str, Any] = {}
    if isinstance(attn_mask, CausalBias):
        options = _causal_bias(attn_mask, query, key, is_causal)
        attn_mask = None
    elif is_causal:
        options = {"top_left_causal": True}
    query, key, value = (autocast_to_lower(tensor) for tensor in (query, key, value))
    _check_tensors(query, key, value, attn_mask)
    if is_causal and attn_mask is not None:
        raise RuntimeError("attn_mask and is_causal=True exclude each other: put the causal condition into attn_mask")

    rank = max(query.ndim, key.ndim, value.ndim)
    # Without heads (no GQA, at most a batch) one head is put in behind the batch; with them a batch of one before.
    heads_dim = 0 if rank >= 4 else (-4 if enable_gqa else -3)
    query, key, value = (_add_dims(tensor, rank, heads_dim) for tensor in (query, key, value))
    lead, query, key, value = _align(query, key, value, enable_gqa)
    if attn_mask is not None:
        if attn_mask.ndim > rank:
            raise RuntimeError(_mask_error(attn_mask, query, key, lead))
        if heads_dim == -3 and attn_mask.ndim == 3:
            attn_mask = attn_mask.unsqueeze(-3)
        _check_mask_shape(attn_mask, query, key, lead)
        options["mask" if attn_mask.dtype == torch.bool else "bias"] = _merge_batch(attn_mask, lead)
    out = attend(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)),
        softmax_scale=None if scale is None else _number("scale", scale),
        dropout_p=dropout_p,
        **options,
    ).transpose(1, 2)
    if heads_dim:
        out = out.squeeze(1 if heads_dim == -3 else 0)
        return out.squeeze(0) if rank == 2 else out
    return out if len(lead) == 1 else out.reshape(*lead, *out.shape[1:])


class patch_sdpa(TorchFunctionMode):
    """Context manager: inside, in this thread, ``torch.nn.functional.scaled_dot_product_attention`` is the function of this module.

    Also where ``torch.nn.functional.multi_head_attention_forward`` and thus ``torch.nn.MultiheadAttention`` and torch's transformer layers
    use it. It nests, ends with the block whatever happens in it, and is seen by ``torch.compile(fullgraph=True)``, inside and around the
    compiled function. Every torch function called in the block passes through it, which costs a few microseconds each in eager mode.

    Args:
        fallback: leave calls that cannot be served here (NotImplementedError, as for nested tensors) to torch, with one warning for each
            reason, instead of raising.
    """

    def __init__(self, fallback: bool = False) -> None:
        super().__init__()
        self.fallback = fallback

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # fmt: skip
        kwargs = {} if kwargs is None else kwargs
        # torch calls this with the mode off, but with those around it on.
        if getattr(_serving, "here", False):
            return func(*args, **kwargs)
        replacement: Callable[..., Any] | None = None
        if func is F.scaled_dot_product_attention:
            replacement = scaled_dot_product_attention
        elif func is F.multi_head_attention_forward and not kwargs.get("need_weights", True):
            # It would run with the mode off, and its attention would be torch's.
            replacement = multi_head_attention_forward
        if replacement is None:
            return func(*args, **kwargs)
        _serving.here = True
        try:
            return self._serve(replacement, func, args, kwargs)
        finally:
            _serving.here = False

    def _serve(
        self, replacement: Callable[..., Any], func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self.fallback:
            return replacement(*args, **kwargs)
        try:
            return replacement(*args, **kwargs)
        except NotImplementedError as error:
            warn_once(f"patch_sdpa leaves a call to torch: {error}")
            return func(*args, **kwargs)


# Whether this thread is inside a call that a patch_sdpa serves: what that call asks of torch is then not for another one around it.
_serving = threading.local()


def _check_kinds(
    query: object, key: object, value: object, attn_mask: object, is_causal: object, enable_gqa: object
) -> None:  # fmt: skip
    for name, tensor in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if not isinstance(tensor, Tensor):
            if name == "attn_mask" and tensor is None:
                continue
            raise TypeError(f"{name} must be a torch.Tensor, got {describe(tensor)}")
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "nested" if tensor.is_nested else str(tensor.layout)
            raise NotImplementedError(
                f"{name} must be a dense tensor, got a {kind} one; pad it and pass a mask, or pack it and call pytransformer.attention "
                "with cu_seqlens"
            )
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {describe(flag)}")


def _number(name: str, value: Any) -> float:
    """A number as torch accepts one: also numpy's, and tensors without dimensions."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return value  # type: ignore[return-value]
    if hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0:
        return float(value)
    raise TypeError(f"{name} must be a number, got {describe(value)}")


def _causal_bias(bias: CausalBias, query: Tensor, key: Tensor, is_causal: bool) -> dict[str, Any]:
    """What a ``torch.nn.attention.bias`` object asks for, without making a mask of it."""
    if is_causal:
        raise ValueError("a CausalBias as attn_mask and is_causal=True exclude each other")
    sizes = (query.shape[-2], key.shape[-2])
    if (bias.seq_len_q, bias.seq_len_kv) != sizes:
        raise RuntimeError(
            f"attn_mask is a CausalBias of size {(bias.seq_len_q, bias.seq_len_kv)}, but (seqlen_q, seqlen_k) = {sizes}"
        )
    return {"causal": True} if bias.variant == CausalVariant.LOWER_RIGHT else {"top_left_causal": True}


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> None:
    """Ranks, dtypes and devices; RuntimeError, as torch raises."""
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            raise RuntimeError(
                f"{name} must have at least 2 dimensions, (seqlen, head_dim), got shape {tuple(tensor.shape)}"
            )
        if tensor.dtype != query.dtype:
            raise RuntimeError(
                f"query, key and value must have one dtype, got {short(query.dtype)} (query) and {short(tensor.dtype)} ({name})"
            )
        if tensor.device != query.device:
            raise RuntimeError(
                f"query, key and value must be on one device, got {query.device} (query) and {tensor.device} ({name})"
            )
    if query.dtype not in FLOAT_DTYPES_AND_DOUBLE:
        integral = not (query.is_floating_point() or query.is_complex())
        raise (RuntimeError if integral else NotImplementedError)(
            f"query must be float32, float16, bfloat16 or float64, got {short(query.dtype)}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(
            f"query and key must have one head_dim, got shapes {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            f"key and value must have one length, got shapes {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if attn_mask is None:
        return
    allowed = {torch.bool, torch.float32, query.dtype}
    if is_autocasting(query.device.type):  # which casts the mask too
        allowed.update(FLOAT_DTYPES)
    if attn_mask.dtype not in allowed:
        raise RuntimeError(
            f"attn_mask must be boolean (True = attend), float32 or of query's dtype ({short(query.dtype)}), "
            f"got {short(attn_mask.dtype)}"
        )
    if attn_mask.device != query.device:
        raise RuntimeError(f"attn_mask must be on query's device ({query.device}), got {attn_mask.device}")


def _add_dims(tensor: Tensor, rank: int, heads_dim: int) -> Tensor:
    """At least 4 dimensions: those missing of ``rank`` in front, and one of size 1 at ``heads_dim``."""
    missing = max(rank, 3) - tensor.ndim
    if missing:
        tensor = tensor.reshape((1,) * missing + tuple(tensor.shape))
    return tensor.unsqueeze(heads_dim) if heads_dim else tensor


def _align(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """The leading dimensions, and q, k, v with them broadcast and merged into one batch, their heads such that k's and v's are equal and
    divide q's: (batch, heads, seqlen, head_dim), views where that is possible."""
    shapes = [tensor.shape[:-3] for tensor in (query, key, value)]
    lead = _broadcast("the leading dimensions", shapes)
    num_heads, key_heads, value_heads = (tensor.shape[-3] for tensor in (query, key, value))
    if enable_gqa:
        if key_heads == 0 or value_heads == 0 or num_heads % key_heads or num_heads % value_heads:
            raise RuntimeError(
                f"with enable_gqa the heads of key ({key_heads}) and value ({value_heads}) must divide those of query ({num_heads})"
            )
        if key_heads != value_heads:
            key = key.repeat_interleave(num_heads // key_heads, dim=-3)
            value = value.repeat_interleave(num_heads // value_heads, dim=-3)
    else:
        sizes = [(heads,) for heads in (num_heads, key_heads, value_heads)]
        heads = _broadcast("the number of heads (enable_gqa=True lets those of key and value divide query's)", sizes)[0]
        query = _expand_heads(query, heads)
        if key_heads != 1 or value_heads != 1:  # one key head for all is what the op knows as multi-query attention
            key, value = _expand_heads(key, heads), _expand_heads(value, heads)
    return (lead, *(_merge_batch(_expand_lead(tensor, lead), lead) for tensor in (query, key, value)))  # type: ignore[return-value]


def _broadcast(what: str, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    except RuntimeError:
        given = ", ".join(str(tuple(shape)) for shape in shapes)
        raise RuntimeError(f"{what} of query, key and value must broadcast, got {given}") from None


def _expand_heads(tensor: Tensor, heads: int) -> Tensor:
    return tensor if tensor.shape[-3] == heads else tensor.expand(*tensor.shape[:-3], heads, *tensor.shape[-2:])


def _expand_lead(tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
    return tensor if tuple(tensor.shape[:-3]) == lead else tensor.expand(*lead, *tensor.shape[-3:])


def _merge_batch(tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
    """(*lead, a, b, c) -> (batch, a, b, c); a mask that does not vary along ``lead`` stays small."""
    if len(lead) == 1 or tensor.ndim < 4:
        return tensor
    inner = tuple(tensor.shape[-3:])
    if all(size == 1 for size in tensor.shape[:-3]) and math.prod(lead) != 1:
        return tensor.reshape(1, *inner)
    return tensor.expand(*lead, *inner).reshape(math.prod(lead), *inner)


def _check_mask_shape(attn_mask: Tensor, query: Tensor, key: Tensor, lead: tuple[int, ...]) -> None:
    target = (*lead, query.shape[1], query.shape[2], key.shape[2])
    for size, wanted in zip(reversed(attn_mask.shape), reversed(target)):
        if size != 1 and size != wanted:
            raise RuntimeError(_mask_error(attn_mask, query, key, lead))


def _mask_error(attn_mask: Tensor, query: Tensor, key: Tensor, lead: tuple[int, ...]) -> str:
    target = (*lead, query.shape[1], query.shape[2], key.shape[2])
    return f"attn_mask must broadcast to (..., num_heads, seqlen_q, seqlen_k) = {target}, got shape {tuple(attn_mask.shape)}"
