"""The mask function of ``attn_implementation="pytransformer"``: which masks are recognised, and how they reach the attention function."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils

from pytransformer.interop.huggingface.models import takes_additive_masks
from pytransformer.ops.checks import readable

UNLIMITED = (-1, -1)
CALLERS = 8  # frames between a mask function and the model's code: transformers' create_…_mask and its decorators


@dataclass(frozen=True)
class MaskPattern:
    """What a mask says, as options of the op.

    Attributes:
        causal, window: as of ``attention``, aligned so that the last query stands at key ``num_keys - 1``.
        num_keys: keys from here on are hidden from every query (the slots of a static cache that are not written yet).
        padding: boolean (batch, kv_length), True = attend; None = nothing is padding.
        cu_seqlens, max_seqlen: int32 starts of the packed sequences, rows one after another, and the length of the longest; None = each row
            is one sequence.
    """

    causal: bool
    window: tuple[int, int]
    num_keys: int
    padding: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None


class _Contents:
    """The values of a mask and of everything that aliases it, computed once."""

    def __init__(self, build: Callable[[], Tensor]) -> None:
        self._build = build
        self.dense: Tensor | None = None

    def read(self) -> Tensor:
        if self.dense is None:
            self.dense = self._build().contiguous()  # as the mask's strides say; it may be written to
        return self.dense


class DeferredMask(Tensor):
    """A mask (batch, 1, query_length, kv_length) that is computed when an operation first reads it: boolean, True = attend, or floating,
    added to the scores.

    ``attention_forward`` takes ``pattern`` instead as long as nothing has read it. Any torch operation sees an ordinary tensor, and may
    have changed it: from then on the tensor counts.
    """

    pattern: MaskPattern
    _contents: _Contents

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, pattern: MaskPattern, contents: _Contents, shape: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> DeferredMask:
        mask: DeferredMask = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        mask.pattern, mask._contents = pattern, contents
        return mask

    def dense(self) -> Tensor:
        """The mask as an ordinary tensor."""
        return self._contents.read()

    def was_read(self) -> bool:
        """Whether the tensor counts, and no longer the pattern."""
        return self._contents.dense is not None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default) or _is_whole_slice(func, args):
            mask = args[0]
            return cls(mask.pattern, mask._contents, mask.shape, mask.device, mask.dtype)
        args, kwargs = torch.utils._pytree.tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense().clone()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeferredMask(shape={tuple(self.shape)}, pattern={self.pattern})"


def _is_whole_slice(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether it is a slice that leaves a deferred mask as it is: many models cut masks to the number of keys, which they have already."""
    if func is not torch.ops.aten.slice.Tensor or not isinstance(args[0], DeferredMask):
        return False
    mask, dim, start, end, step = args + (0, None, None, 1)[len(args) - 1 :]
    return not start and step == 1 and (end is None or end >= mask.shape[dim])


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """Mask function for ``AttentionMaskInterface``, called by transformers' ``create_causal_mask`` and its siblings.

    Args:
        batch_size, q_length, kv_length: sizes of the mask.
        q_offset, kv_offset: position of the first query and of the first key in the sequence. A tensor (static caches) is not read.
        mask_function: says for indices (batch, head, query, key) whether the query may see the key.
        attention_mask: boolean (batch, tokens), True = attend.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether None may be returned for a causal or a full mask.
        device: of the mask.
        options: what transformers passes beside (``local_size``, ``dtype``, ``config``, ``use_vmap``).

    Returns:
        (batch, 1, q_length, kv_length), a :class:`DeferredMask` or an ordinary tensor. Boolean, True = attend; for a ``config`` whose
        models do not know boolean masks (:func:`takes_additive_masks`) of ``dtype``, 0 = attend and the least number elsewhere, as "eager"
        has it. Or None: a full mask, a single query that sees every key (with boolean masks), and a causal mask that hides nothing else
        where no ``config`` is given or a compiler traces. Elsewhere models treat a name that is not "sdpa" as "eager", whose causal masks
        are always there: they cut off queries, or append keys, and extend the mask.

    Raises:
        ValueError: the mask is for a model that computes attention in code of its own, which expects masks of another kind.
    """
    config = options.get("config")
    is_additive = config is not None and takes_additive_masks(config)
    build = partial(
        masking_utils.eager_mask if is_additive else masking_utils.sdpa_mask,
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, device=device, **options,
    )  # fmt: skip
    if isinstance(q_offset, Tensor) or masking_utils.is_tracing(attention_mask):
        # A traced mask is ordinary tensors. So is that of a static cache being filled: it is made outside a compiled region and passed in.
        skips = {
            "allow_is_causal_skip": allow_is_causal_skip
            and torch.compiler.is_compiling()
            and q_length in (1, kv_length),
            "allow_is_bidirectional_skip": allow_is_bidirectional_skip,
        }
        traced: Tensor | None = build(**skips)
        return traced
    _refuse_attention_of_its_own()
    build = partial(build, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    pattern = _recognise(mask_function, q_length, kv_length, q_offset - kv_offset)
    if pattern is None or (attention_mask is not None and attention_mask.ndim != 2):
        dense: Tensor = build()
        return dense
    pattern = replace(pattern, padding=_padding(attention_mask, batch_size, kv_length, kv_offset))
    says_nothing = _says_nothing(pattern, q_length, kv_length)
    if says_nothing and not pattern.causal and allow_is_bidirectional_skip:
        return None
    if (
        says_nothing
        and pattern.causal
        and allow_is_causal_skip
        and not is_additive
        and (config is None or q_length == 1)
    ):
        return None
    if q_length == 1 and not says_nothing:  # linear in the length as it is, and of one shape at every step
        row: Tensor = build()
        return row
    dtype = options.get("dtype", torch.float32) if is_additive else torch.bool
    return DeferredMask(pattern, _Contents(build), (batch_size, 1, q_length, kv_length), torch.device(device), dtype)


def _refuse_attention_of_its_own() -> None:
    """ValueError if the model that asks for a mask defines attention beside transformers' registry.

    transformers lets such models (Bloom, MPT, …) take any registered name and only keeps them from its own "sdpa". They would add
    a boolean mask to their scores, or take None for "no mask", and attend to padding and to the future without a word.
    """
    frame = sys._getframe(2)
    for _ in range(CALLERS):
        names = frame.f_globals
        if str(names.get("__name__")).rpartition(".")[2].startswith("modeling_"):
            if "ALL_ATTENTION_FUNCTIONS" not in names and _defines_attention(names):
                raise ValueError(
                    f"{names['__name__']} does not take its attention from transformers' registry, so attn_implementation='pytransformer' "
                    "cannot serve it: use attn_implementation='eager'"
                )
            return
        if frame.f_back is None:
            return
        frame = frame.f_back


def _defines_attention(names: dict[str, Any]) -> bool:
    return any(
        isinstance(value, type)
        and issubclass(value, torch.nn.Module)
        and "Attention" in name
        and value.__module__ == names["__name__"]
        for name, value in names.items()
    )


def _recognise(
    mask_function: Callable[..., Any], q_length: int, kv_length: int, first_query: int
) -> MaskPattern | None:
    """The pattern of one of transformers' own mask functions, or None. ``first_query``: the key at which the first query stands."""
    base, ids = _unpack(mask_function)
    found = _causal_and_window(base)
    if found is None:
        return None
    causal, window = found
    num_keys = first_query + q_length
    if ids is not None:
        simple = first_query == 0 and num_keys == kv_length == ids.shape[-1]
        return MaskPattern(causal, window, kv_length, None, *_packing(ids)) if simple else None
    if not causal and window == UNLIMITED:
        return MaskPattern(causal, window, kv_length)
    if causal:
        return MaskPattern(causal, window, num_keys) if 0 < num_keys <= kv_length else None
    return MaskPattern(causal, window, kv_length) if num_keys == kv_length else None


def _packing(sequence_ids: Tensor) -> tuple[Tensor, int]:
    """``cu_seqlens`` and the longest length of adjacent equal ids (batch, length). Two synchronisations for a forward on a GPU, where
    transformers has just made one to find out that there is packing at all."""
    is_start = F.pad(sequence_ids[:, 1:] != sequence_ids[:, :-1], (1, 0), value=True)
    starts = is_start.flatten().nonzero().flatten()
    cu_seqlens = F.pad(starts, (0, 1), value=is_start.numel()).to(torch.int32)
    return cu_seqlens, int(cu_seqlens.diff().max())


def _unpack(mask_function: Callable[..., Any]) -> tuple[Callable[..., Any], Tensor | None]:
    """(mask function of one sequence, sequence ids) of what transformers makes for packed sequences, else (mask_function, None)."""
    base, ids = mask_function, None
    for part in _conjuncts(mask_function):
        packed = _captured(part, masking_utils.packed_sequence_mask_function(torch.empty(0)))
        if packed is not None:
            ids = packed["packed_sequence_mask"]
            others = [other for other in _conjuncts(mask_function) if other is not part]
            if len(others) != 1:
                return mask_function, None
            base = others[0]
    remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
    if ids is not None and remap is not None:
        # Positions count up by one inside a sequence, so distances are the same before and after.
        remapped = _captured(base, remap(None, torch.empty(0)))
        base = base if remapped is None else remapped["mask_function"]
    return base, ids


def _causal_and_window(mask_function: Callable[..., Any]) -> tuple[bool, tuple[int, int]] | None:
    """(causal, window) of a causal, bidirectional or sliding-window mask function, or None."""
    if mask_function is masking_utils.causal_mask_function:
        return True, UNLIMITED
    if mask_function is masking_utils.bidirectional_mask_function:
        return False, UNLIMITED
    parts = _conjuncts(mask_function)
    if len(parts) != 2:
        return None
    for name, causal in (("sliding_window_overlay", True), ("sliding_window_bidirectional_overlay", False)):
        overlay = getattr(masking_utils, name, None)  # the second is younger than transformers 5.0
        found = None if overlay is None else _captured(parts[0], overlay(1))
        inner = masking_utils.causal_mask_function if causal else masking_utils.bidirectional_mask_function
        if found is not None and parts[1] is inner:
            width = int(found["sliding_window"])
            # transformers' causal window counts the query's own key, its bidirectional one does not.
            return (True, (width - 1, 0)) if causal else (False, (width, width))
    return None


def _conjuncts(mask_function: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """The parts of a mask function made by ``and_masks``; () of any other."""
    found = _captured(mask_function, masking_utils.and_masks())
    return () if found is None else tuple(found["mask_functions"])


def _captured(function: Any, example: Any) -> dict[str, Any] | None:
    """What ``function`` closed over, by name, if it was made by the same factory as ``example``."""
    if not isinstance(function, types.FunctionType) or function.__code__ is not example.__code__:
        return None
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells)}


def _padding(mask: Tensor | None, batch_size: int, kv_length: int, kv_offset: int) -> Tensor | None:
    """(batch, kv_length), True = attend, of the keys at ``kv_offset`` and after; None if it is known to be all True."""
    if mask is None:
        return None
    mask = mask.to(torch.bool)
    missing = kv_offset + kv_length - mask.shape[1]
    mask = F.pad(mask, (0, missing)) if missing > 0 else mask
    mask = mask[:, kv_offset : kv_offset + kv_length].expand(batch_size, kv_length)
    # Reading it on a GPU would hold up the host at every forward; there the op gets it as it is.
    return None if readable(mask) and bool(mask.all()) else mask


def _says_nothing(pattern: MaskPattern, q_length: int, kv_length: int) -> bool:
    """Whether None says the same to a module that knows whether it is causal."""
    if pattern.padding is not None or pattern.cu_seqlens is not None or pattern.num_keys != kv_length:
        return False
    left, right = pattern.window
    limits = 0 <= left < kv_length - 1 or 0 < right < q_length - 1
    return not limits and (not pattern.causal or q_length in (1, kv_length))
