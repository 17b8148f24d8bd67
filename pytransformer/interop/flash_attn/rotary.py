"""``flash_attn.layers.rotary.apply_rotary_emb`` on :func:`pytransformer.rope`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer.interop.flash_attn.checks import with_contiguous_rows
from pytransformer.ops import checks
from pytransformer.ops.rope import rope


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotates the first rotary_dim features of ``x`` by the angles of their positions, in float32 and rounded once.

    Differentiable any number of times with respect to x.

    Args:
        x: (batch, seqlen, num_heads, head_dim), or packed (total, num_heads, head_dim) with ``cu_seqlens``.
        cos, sin: (length, rotary_dim / 2), any floating dtype; rotary_dim at most head_dim, the other features pass unchanged.
        interleaved: True rotates adjacent pairs (GPT-J), False pairs i with i + rotary_dim / 2 (Llama, GPT-NeoX).
        inplace: write into x and return it. Where a gradient is needed the result is computed aside and copied into x. Of a leaf that
            requires grad, or a part of one, which torch lets nothing write to, the memory is written and a tensor over it returned: it
            carries the gradient to the leaf as it was before, as in flash_attn; autograd does not know that the leaf was rotated.
        seqlen_offsets: position of each sequence's first token: an int, or int32 or int64 (batch).
        cu_seqlens: int32 or int64 (batch + 1), starts of the packed sequences and the total.
        max_seqlen: length of the longest packed sequence; required with ``cu_seqlens``.

    Returns:
        A tensor like x, or x itself.

    Raises:
        AssertionError: tables of different shapes, with more features than x or fewer rows than tokens; offsets of a wrong shape or
            dtype; cu_seqlens without max_seqlen.
        ValueError: a wrong number of dimensions; a max_seqlen below the longest sequence; positions outside of the tables, which are read
            only on a CPU (or under PYTRANSFORMER_DEBUG=1) and clamped elsewhere, where flash_attn leaves such tokens unrotated.
        TypeError: an argument of the wrong type.
        NotImplementedError: cos or sin requires grad.
    """
    seqlen = _check(x, cos, sin, cu_seqlens, max_seqlen)
    _check_offsets(x, cos, seqlen, seqlen_offsets, cu_seqlens)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int32)
    rows = with_contiguous_rows(x)
    rotated, _ = rope(
        rows,
        None,
        _table(cos),
        _table(sin),
        offsets=seqlen_offsets,
        cu_seqlens=cu_seqlens,
        interleaved=interleaved,
        inplace=inplace and rows is x,
    )
    if not inplace or rotated is x:
        return rotated
    # The op keeps x where a gradient is needed; here it must change, and autograd follows a copy.
    if _is_of_a_leaf(x) and torch.is_grad_enabled():
        written: Tensor = _WrittenToLeaf.apply(rotated, x.detach())  # type: ignore[no-untyped-call]
        return written
    return x.copy_(rotated)


def _is_of_a_leaf(x: Tensor) -> bool:
    """Whether x is a leaf that requires grad, or a view of one."""
    base = x._base if x._base is not None else x
    return base.requires_grad and base.is_leaf


class _WrittenToLeaf(torch.autograd.Function):
    """``memory``, after ``result`` was written there; a gradient goes to ``result`` alone."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, memory: Tensor) -> Tensor:
        return memory.copy_(result).view_as(memory)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _table(table: Tensor) -> Tensor:
    return table.float().contiguous()


def _check(x: Any, cos: Any, sin: Any, cu_seqlens: Any, max_seqlen: Any) -> int:
    """Everything but the offsets; the number of tokens in the longest sequence."""
    rank, layout = (4, "(batch, seqlen, num_heads, head_dim)")
    if cu_seqlens is not None:
        rank, layout = (3, "(total, num_heads, head_dim) with cu_seqlens")
    checks.check_tensor("x", x, ndim=rank, dtypes=checks.FLOAT_DTYPES_AND_DOUBLE, layout=layout)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.check_tensor(
            name, table, ndim=2, dtypes=checks.FLOAT_DTYPES_AND_DOUBLE, layout="(length, rotary_dim / 2)"
        )
    if sin.shape != cos.shape:
        raise AssertionError(f"sin must have the shape of cos, {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if 2 * cos.shape[1] > x.shape[-1]:
        raise AssertionError(f"cos: rotary_dim must be at most head_dim ({x.shape[-1]}), got {2 * cos.shape[1]}")
    if cu_seqlens is None:
        seqlen: int = x.shape[1]
    else:
        checks.check_tensor("cu_seqlens", cu_seqlens, ndim=1, dtypes=(torch.int32, torch.int64), layout="(batch + 1)")
        if max_seqlen is None:
            raise AssertionError("max_seqlen must be given with cu_seqlens")
        seqlen = int(max_seqlen) if isinstance(max_seqlen, Tensor) else checks.check_int("max_seqlen", max_seqlen)
        checks.check_values("cu_seqlens", cu_seqlens.diff(), 0, seqlen, "sequences (max_seqlen)")
    if cos.shape[0] < seqlen:
        raise AssertionError(f"cos must have a row for each of {seqlen} positions, got shape {tuple(cos.shape)}")
    return seqlen


def _check_offsets(x: Tensor, cos: Tensor, seqlen: int, seqlen_offsets: Any, cu_seqlens: Tensor | None) -> None:
    if not isinstance(seqlen_offsets, Tensor):
        checks.check_int("seqlen_offsets", seqlen_offsets, minimum=0)
        if seqlen_offsets + seqlen > cos.shape[0]:
            raise AssertionError(
                f"cos must have a row for each position: {seqlen_offsets} (seqlen_offsets) + {seqlen} (tokens), "
                f"got shape {tuple(cos.shape)}"
            )
        return
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if tuple(seqlen_offsets.shape) != (batch,) or seqlen_offsets.dtype not in (torch.int32, torch.int64):
        raise AssertionError(
            f"seqlen_offsets must be an int, or int32 or int64 of shape (batch) = ({batch},), got {checks.describe(seqlen_offsets)}"
        )
