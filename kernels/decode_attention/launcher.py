"""Decode attention: one or a few new queries per sequence against a KV cache, split over the keys (flash-decoding).

    out = softmax(softcap(q·k · softmax_scale) + bias + alibi) v            over the keys that a query sees, found in a cache

Reading the cache is the whole cost: ``seqlen · num_kv_heads · (head_dim + value_dim)`` elements per sequence, once, against
``2 · seqlen · num_heads · seqlen_q · (head_dim + value_dim)`` FLOP. So the queries of all heads that share a key head are packed
into the rows of one tile (row = query token · group + head in the group) and a key is read once per tile.

To let one sequence fill a GPU its keys are cut into splits. How many and where follows from nothing but the sequence's *own* length,
query rows and window, so the result for a sequence has the same bits whatever else is in the batch, however large the cache is and
whether it is paged. What runs does not follow from the size of the cache either: a fixed number of programs share out the work of all
sequences by their lengths, which they read on the device (schedule.py). A program that computes all splits of a tile folds them as it goes.
Where several share a tile, each leaves its splits' unnormalised outputs with maxima and sums, in float32, and the one that counts the last
split folds all of them, in ascending order. Nobody waits for anybody, and the same fold gives the same bits either way.

Distances: query token t of a sequence sits at position ``cache_seqlen - seqlen_q + t`` and sees key n iff
``position - window_left <= n <= position + window_right`` (negative = unlimited; a causal call is window_right = 0).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..attention.options import block_dim, broadcast_strides, dot_precision, window_limits
from ..counters import Counters
from ..launch import (
    COMMON_OPTIONS,
    as_bytes,
    cdiv,
    contiguous_strides,
    device_limits,
    scale_strides,
    strides_by_name,
    viewed,
)
from ..prepared import PreparedLaunch, by_name
from .policy import DecodeConfig, decode_configs, num_programs, row_classes
from .schedule import BLOCK_SEQUENCES
from .sizes import Sizes, sizes_of
from .split import _decode_kernel

if TYPE_CHECKING:
    from pytransformer.ops.decode_attention.call import DecodeCall


FOLD_ROWS = 16


class DecodeLaunch:
    """The launches of a call, prepared once and made for any number of calls alike: the host then does nothing but allocate and launch.

    Args:
        call: of its tensors only types, shapes, strides, dtypes and the device count.
        allow_tf32: whether products of float32 may be of tf32, whose operands lack the low 13 bits: they are cut, not rounded.
        configs: replaces the launch policy (tests shrink tiles and splits with it).
    """

    __slots__ = ("_classes", "_new_lse", "_new_out", "_views")

    def __init__(
        self, call: DecodeCall, *, allow_tf32: bool = False, configs: tuple[DecodeConfig, ...] | None = None
    ) -> None:
        sizes = sizes_of(call)
        q, device = call.q, call.q.device
        out_shape = (*q.shape[:-1], sizes.value_dim)
        lse_shape = (sizes.num_heads, q.shape[0]) if sizes.packed else (q.shape[0], sizes.num_heads, q.shape[1])
        # Packed rows past the last sequence belong to none, and no program visits them.
        self._new_out = _new(out_shape, q.dtype, device, 0.0 if sizes.packed else None)
        self._new_lse = _new(lse_shape, torch.float32, device, -math.inf if sizes.packed else None)
        self._views = [(call._fields.index(name), view) for name, view in _views(call, sizes).items()]
        self._classes: list[_ClassLaunch] = []
        if math.prod(out_shape) == 0 or sizes.batch == 0:
            return
        paged = call.block_table is not None
        if configs is None:
            masked = call.mask is not None or call.bias is not None
            itemsize = call.k_cache.element_size()
            configs = decode_configs(
                sizes.head_dim, sizes.value_dim, itemsize, device, paged, masked, sizes.num_kv_heads, q.element_size()
            )
        values = {**_strides(call, sizes, out_shape, lse_shape), **_options(call, sizes, allow_tf32)}
        rows = sizes.seqlen_q * sizes.group
        for config in row_classes(configs, rows, sizes.packed, sizes.capacity, call.num_splits):
            self._classes.append(_class_launch(call, sizes, config, values))

    def __call__(self, call: DecodeCall) -> tuple[Tensor, Tensor]:
        """(out, lse) of a call that is like the one prepared for, or a plain tuple of its fields; shapes as in decode_attention."""
        # This is hot: what the host does here a decode step does once for each layer.
        out, lse = self._new_out(), self._new_lse()
        given = (*call, out, lse)
        if self._views:
            given = viewed(given, self._views)
        for launch, new_scratch, counters in self._classes:
            if new_scratch is None:
                launch((*given, None, None))
            else:
                launch((*given, new_scratch(), counters()))
        return out, lse


def decode_attention_forward(
    call: DecodeCall, *, allow_tf32: bool = False, configs: tuple[DecodeConfig, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a checked call, launched once; see :class:`DecodeLaunch`."""
    return DecodeLaunch(call, allow_tf32=allow_tf32, configs=configs)(call)


class _ClassLaunch(NamedTuple):
    """The launch for one row class; scratch and counters only where a sequence can have several splits."""

    launch: PreparedLaunch
    new_scratch: Callable[[], Tensor] | None
    counters: Callable[[], Tensor]


def _class_launch(call: DecodeCall, sizes: Sizes, config: DecodeConfig, values: dict[str, Any]) -> _ClassLaunch:
    rows = min(sizes.seqlen_q * sizes.group, config.rows_up_to)
    tiles, device = cdiv(rows, config.block_m), call.q.device
    programs = num_programs(config, sizes.batch * sizes.num_kv_heads * tiles, device)
    scratch_rows = min(rows, config.block_m)
    fold_registers = FOLD_ROWS * values["BLOCK_VALUE_DIM"] // (32 * config.num_warps)
    # Behind padding a tile of keys can begin anywhere in a page.
    one_page = call.block_table is not None and sizes.page_size % config.block_n == 0 and call.cache_leftpad is None
    values = {
        **values,
        "num_tiles": tiles, "max_splits": config.max_splits, "scratch_rows": scratch_rows,
        "ROWS_ABOVE": config.rows_above, "ROWS_UP_TO": config.rows_up_to, "ONE_PAGE": one_page,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_SEQUENCES": BLOCK_SEQUENCES,
        # Partial results are folded by other tiles than they were made by, two at a time where that takes some 32 registers.
        "FOLD_ROWS": FOLD_ROWS,
        "MERGE_SPLITS": 2 if fold_registers <= 16 and call.k_cache.element_size() < 4 else 1,
    }  # fmt: skip
    given = (*call._fields, "out", "lse", "scratch", "counters")
    stages = {"num_warps": config.num_warps, "num_stages": config.num_stages, **COMMON_OPTIONS}
    if config.rows_above == 0:
        # Two programs to a multiprocessor are meant: left to itself, ptxas saves registers for more, by spilling.
        stages["maxnreg"] = 255
    launch = PreparedLaunch(_decode_kernel, (programs,), *by_name(_decode_kernel, values, given, stages))
    if config.max_splits == 1:
        return _ClassLaunch(launch, None, Counters(device, 0))
    # For each program the splits of the one task that it may share with others, and three for itself.
    scratch = programs * (config.max_splits + 3) * scratch_rows * (sizes.value_dim + 2)
    return _ClassLaunch(launch, _new((scratch,), torch.float32, device), Counters(device, programs))


def _strides(call: DecodeCall, sizes: Sizes, out_shape: Sequence[int], lse_shape: Sequence[int]) -> dict[str, int]:
    """The kernel's strides by name: 0 where there is no tensor, or where it is repeated."""
    # Packed tensors have no batch to step over.
    batch = (0,) if sizes.packed else ()
    table, slopes = call.block_table, call.alibi_slopes
    return strides_by_name(
        {
            "q": ("batch token head", (*batch, *call.q.stride())),
            "out": ("batch token head", (*batch, *contiguous_strides(out_shape))),
            "lse": ("batch head", (*batch, *contiguous_strides(lse_shape))),
            "k_cache": ("page token head", call.k_cache.stride()),
            "v_cache": ("page token head", call.v_cache.stride()),
            "block_table": ("batch", (0,) if table is None else table.stride()),
            "mask": ("batch head token key", _score_strides(call.mask)),
            "bias": ("batch head token key", _score_strides(call.bias)),
            "alibi_slopes": ("batch", (0,) if slopes is None or slopes.dim() == 1 else slopes.stride()),
            "k_scale": ("page token head", scale_strides(call.k_scale)),
            "v_scale": ("page token head", scale_strides(call.v_scale)),
        }
    )


def _score_strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Of a mask or bias of four dimensions."""
    return (0, 0, 0, 0) if tensor is None else broadcast_strides(tensor.shape, tensor.stride())


def _options(call: DecodeCall, sizes: Sizes, allow_tf32: bool) -> dict[str, Any]:
    """What the kernel takes beside strides, the same for all row classes."""
    window_left, window_right = window_limits(call.causal, call.window)
    several_queries = sizes.packed or sizes.seqlen_q > 1
    return {
        "batch": sizes.batch, "seqlen_q": sizes.seqlen_q, "capacity": sizes.capacity, "window_left": window_left,
        "window_right": window_right, "softmax_scale": call.softmax_scale, "softcap": call.softcap,
        "NUM_KV_HEADS": sizes.num_kv_heads, "GROUP": sizes.group,
        "PAGE_SIZE": 1 if call.block_table is None else sizes.page_size,
        "ROW_LEFT": several_queries and window_left >= 0,
        "ROW_RIGHT": several_queries and window_right >= 0,
        "HAS_SOFTCAP": call.softcap > 0.0,
        "SCALE_PER_TOKEN": call.k_scale is not None and call.k_scale.dim() > 1,
        "FORMAT": _format(call.k_cache),
        "PRECISION": dot_precision(call.q.dtype, allow_tf32),
        "DIM": sizes.head_dim, "BLOCK_DIM": block_dim(sizes.head_dim),
        "VALUE_DIM": sizes.value_dim, "BLOCK_VALUE_DIM": block_dim(sizes.value_dim),
    }  # fmt: skip


def _format(cache: Tensor) -> str:
    """How the kernel reads elements of a cache; of an instruction for float8 only the device's generation knows."""
    if cache.dtype == torch.float8_e4m3fn:
        return "e4m3_sm89" if device_limits(cache.device).arch >= 89 else "e4m3"
    return "int8" if cache.dtype == torch.int8 else "native"


def _views(call: DecodeCall, sizes: Sizes) -> dict[str, Callable[[Tensor], Tensor]]:
    """The fields of which the kernel takes something else than the call has, and how that is made."""
    views: dict[str, Callable[[Tensor], Tensor]] = {}
    if call.k_cache.dtype == torch.float8_e4m3fn:
        views |= {"k_cache": as_bytes, "v_cache": as_bytes}
    if call.mask is not None and call.mask.dtype == torch.bool:
        views["mask"] = as_bytes
    if call.cache_leftpad is not None and sizes.keys < sizes.capacity:
        views["cache_seqlens"] = functools.partial(torch.clamp, max=sizes.keys)
    return views


def _new(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, value: float | None = None
) -> Callable[[], Tensor]:
    """Makes contiguous tensors, uninitialised or full of a value."""
    if value is not None:
        return functools.partial(torch.full, shape, value, dtype=dtype, device=device)
    # With the strides given the host takes half the time of torch.empty.
    return functools.partial(torch.empty_strided, shape, contiguous_strides(shape), dtype=dtype, device=device)
