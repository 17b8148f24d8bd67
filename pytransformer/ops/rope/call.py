"""A call of RoPE, and the checks of every argument on the host, each error naming what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer.ops import checks
from pytransformer.ops.overlap import Apart

INTEGERS = (torch.int32, torch.int64)
WRITTEN_IN_PLACE = ("q", "k")
_LAYOUT = "(batch, seqlen, num_heads, head_dim) or packed (total, num_heads, head_dim)"


class RopeCall(NamedTuple):
    """A call. ``offsets`` is split in a tensor (or None) and an int; ``reverse`` rotates by the opposite angle, which is the gradient."""

    q: Tensor
    k: Tensor | None
    cos: Tensor
    sin: Tensor
    positions: Tensor | None
    sequence_offsets: Tensor | None
    cu_seqlens: Tensor | None
    interleaved: bool
    reverse: bool
    offset: int


def check_positive(name: str, value: Any) -> float:
    """A number; TypeError if it is none, ValueError unless finite and greater than 0."""
    number = checks.check_float(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be greater than 0, got {number}")
    return number


def check_scaling(scaling: Any, rotary_dim: int) -> None:
    """Checks the values of a mapping as Hugging Face configurations have it; its keys are the reference's to check."""
    if not isinstance(scaling, Mapping):
        raise TypeError(f"scaling must be a mapping or None, got {checks.describe(scaling)}")
    positive = (
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "max_position_embeddings",
        "attention_factor",
    )
    for key in (*positive, "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
        if scaling.get(key) is not None:
            check_positive(f"scaling[{key!r}]", scaling[key])
    for key in ("short_factor", "long_factor"):
        for index, factor in enumerate(scaling.get(key) or ()):
            check_positive(f"scaling[{key!r}][{index}]", factor)
    method = scaling.get("rope_type", scaling.get("type", "default"))
    if method in ("ntk", "dynamic") and rotary_dim == 2:
        raise ValueError(f"scaling: rope_type {method!r} needs a rotary_dim of at least 4, got 2")
    low, high = scaling.get("low_freq_factor"), scaling.get("high_freq_factor")
    if low is not None and high is not None and low >= high:
        raise ValueError(f"scaling: low_freq_factor must be below high_freq_factor, got {low} and {high}")


def check_rope(call: RopeCall) -> RopeCall:
    """Checks a call as the user gave it; see ``rope`` for the errors."""
    q, k, cos, sin = call[:4]
    call = call._replace(interleaved=checks.check_bool("interleaved", call.interleaved))
    checks.check_tensor("q", q, ndim=(3, 4), dtypes=checks.FLOAT_DTYPES_AND_DOUBLE, layout=_LAYOUT)
    checks.check_last_dim_contiguous("q", q)
    if k is not None:
        checks.check_tensor("k", k, ndim=q.ndim, dtypes=checks.FLOAT_DTYPES_AND_DOUBLE, device=q.device, layout=_LAYOUT)
        checks.check_same_dtype("k", k, "q", q)
        checks.check_shape("k", k, (*q.shape[:-2], None, q.shape[-1]), "of q, except in the number of heads,")
        checks.check_last_dim_contiguous("k", k)
    _check_tables(q, cos, sin)
    if call.cu_seqlens is not None:
        if q.ndim != 3:
            raise ValueError(
                f"cu_seqlens needs packed q and k (total, num_heads, head_dim), got q of shape {tuple(q.shape)}"
            )
        checks.check_cu_seqlens("cu_seqlens", call.cu_seqlens, q.shape[0], q.device)
    offsets = call.offset if call.sequence_offsets is None else call.sequence_offsets
    if call.positions is not None:
        _check_positions(q, cos.shape[0], call.positions, offsets)
        return call._replace(cu_seqlens=None, offset=0)
    return _check_offsets(call, offsets)


def refusal(call: RopeCall) -> Apart:
    """What refuses calls in place that are laid out like this one, but share memory that is written."""
    names = ("offsets" if name == "sequence_offsets" else name for name in call._fields)
    return Apart(tuple(names), WRITTEN_IN_PLACE, call[:7])


def check_rope_in_place(call: RopeCall) -> RopeCall:
    """The same for q and k that are written to."""
    call = check_rope(call)
    for name, tensor in (("q", call.q), ("k", call.k)):
        if tensor is not None and checks.shares_own_memory(tensor):
            raise ValueError(
                f"{name} must not be expanded for inplace=True: elements share memory (strides {tuple(tensor.stride())})"
            )
    return call


def _check_tables(q: Tensor, cos: Any, sin: Any) -> None:
    # The tables of a float64 q may be float64, which is what a golden result wants.
    dtypes = (torch.float32, torch.float64) if q.dtype == torch.float64 else (torch.float32,)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.check_tensor(name, table, ndim=2, dtypes=dtypes, device=q.device, layout="(length, rotary_dim / 2)")
        checks.check_last_dim_contiguous(name, table)
        if torch.is_grad_enabled() and table.requires_grad:
            raise NotImplementedError(f"rope has no gradient for {name}, which requires grad; pass {name}.detach()")
    checks.check_shape("sin", sin, cos.shape, "of cos")
    if not 0 < 2 * cos.shape[1] <= q.shape[-1]:
        raise ValueError(
            "cos must have shape (length, rotary_dim / 2) with rotary_dim from 2 to q's head_dim "
            f"({q.shape[-1]}), got {tuple(cos.shape)}, that is rotary_dim {2 * cos.shape[1]}"
        )


def _check_positions(q: Tensor, length: int, positions: Any, offsets: Any) -> None:
    if isinstance(offsets, Tensor) or offsets != 0:
        raise ValueError(f"offsets must not be given together with positions, got {checks.describe(offsets)}")
    checks.check_tensor("positions", positions, dtypes=INTEGERS, device=q.device)
    allowed = [q.shape[:1]] if q.ndim == 3 else [q.shape[1:2], q.shape[:2]]
    if not any(positions.shape == shape for shape in allowed):
        layouts = "(total)" if q.ndim == 3 else "(seqlen) or (batch, seqlen)"
        wanted = " or ".join(str(tuple(shape)) for shape in allowed)
        raise ValueError(f"positions must have shape {layouts} = {wanted}, got {tuple(positions.shape)}")
    checks.check_values("positions", positions, 0, length - 1, "rows of cos and sin")


def _check_offsets(call: RopeCall, offsets: Any) -> RopeCall:
    q, length, cu_seqlens = call.q, call.cos.shape[0], call.cu_seqlens
    seqlen = q.shape[-3]
    if cu_seqlens is not None:
        # Lengths of packed sequences are values: known where they may be read, else at least not negative.
        known = checks.readable(cu_seqlens) and cu_seqlens.shape[0] > 1
        seqlen = int(cu_seqlens.diff().max()) if known else 0
    if not isinstance(offsets, Tensor):
        offsets = checks.check_int("offsets", offsets, minimum=0)
        if offsets + seqlen > length:
            raise ValueError(
                f"cos and sin must have a row for each position: {offsets} (offsets) + {seqlen} (tokens) rows, got {length}"
            )
        return call._replace(offset=offsets)
    batch = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else 1 if q.ndim == 3 else q.shape[0]
    checks.check_tensor("offsets", offsets, ndim=1, dtypes=INTEGERS, device=q.device, layout="(batch)")
    checks.check_shape("offsets", offsets, (batch,), "(batch,)")
    if checks.readable(offsets) and batch > 0:
        lengths = cu_seqlens.diff() if cu_seqlens is not None and checks.readable(cu_seqlens) else seqlen
        checks.check_values("offsets", offsets, 0, 2**31 - 1, "positions")
        ends = offsets.long() + lengths
        if int(ends.max()) > length:
            sequence = int(ends.argmax())
            raise ValueError(
                f"offsets must leave room in the {length} rows of cos and sin: sequence {sequence} ends at position "
                f"{int(ends[sequence])} (offset {int(offsets[sequence])})"
            )
    return call
