"""Linear attention forward, in time that grows with the length: states of chunks, their scan, results of rows; or a recurrence.

Three launches (states.py, rows.py), each with a program for every tile of every chunk, so that one long sequence fills a GPU; the scan
goes from chunk to chunk, with a program for every SCAN_BLOCK numbers of a state. For T tokens of one head with D features and E values, and
chunks of C: 4·T·D·E + T·C·(D + E) FLOP; q, k, v read and out written once, k and v once more, and 16·(T / C)·D·(E + 1) bytes of states.
A few tokens with a state, as in decoding, are one launch (recurrence.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention.options import maker, new_row_strides
from ..launch import cdiv, device_limits
from ..prepared import PreparedLaunch
from .policy import (
    FEW_TOKENS,
    LinearConfig,
    Passes,
    geometry,
    linear_config,
    state_strides,
    strides_of,
    tiles_of,
    traits_of,
)
from .recurrence import recurrence_launch
from .rows import rows_launch
from .states import states_of_keys

if TYPE_CHECKING:
    from pytransformer.ops.linear_attention.call import LinearAttentionCall

_INPUTS = ("q", "k", "v", "decay", "state", "normalizer")
_NAMES = (*_INPUTS, "out", "last_state", "last_normalizer", "denominator", "states")


class LinearForward:
    """The forward launches for calls that are alike, to be made any number of times.

    Args:
        call: a checked call, of whose tensors only shapes, strides, dtypes and device count.
        allow_tf32: whether float32 products may be of tf32, whose operands lack the low 13 bits.
        config: replaces the launch policy (tests use small tiles), and the recurrence.
    """

    def __init__(
        self, call: LinearAttentionCall, *, allow_tf32: bool = False, config: LinearConfig | None = None
    ) -> None:
        shape, q = geometry(call), call.q
        out_shape = (*q.shape[:-1], shape.value_dim)
        state = (shape.batch, shape.num_kv_heads, shape.head_dim)
        self._new = [
            maker(q, out_shape),
            maker(q, (*state, shape.value_dim), torch.float32),
            maker(q, state, torch.float32),
        ]
        absent = [name for name in ("decay", "state", "normalizer") if getattr(call, name) is None]
        self._new_denominator = self._new_states = None
        self._launches: list[PreparedLaunch | None]
        if call.normalize:
            self._new_denominator = maker(q, (shape.batch, shape.num_heads, shape.seqlen_q), torch.float32)
        else:
            absent.append("denominator")
        strides = {name: strides_of(getattr(call, name)) for name in ("q", "k", "v")}
        strides |= {name: state_strides(getattr(call, name)) for name in ("state", "normalizer")}
        strides["out"] = new_row_strides(out_shape)
        rows = [strides[name] for name in ("q", "k", "v", "out")]
        common = {
            "traits": traits_of(call, shape, allow_tf32, *rows),
            "stride_decay": 0 if call.decay is None else call.decay.stride(0),
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
        }
        passes = Passes(_NAMES, strides, common, absent)
        if call.causal and 0 < shape.seqlen_q <= FEW_TOKENS and config is None:
            self._launches = [recurrence_launch(passes, shape)]
            return
        config = config or linear_config(shape.head_dim, shape.value_dim, q.dtype, device_limits(q.device).arch)
        num_chunks = cdiv(shape.seqlen_k, config.chunk)
        self._new_states = maker(q, shape.states(num_chunks), torch.float32)
        common |= tiles_of(config, *rows)
        self._launches = [
            *states_of_keys(passes, shape, config, num_chunks),
            rows_launch(passes, shape, config, "out", num_chunks),
        ]

    def __call__(self, call: LinearAttentionCall) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(out, S, z, denominators of out before a 0 of them counts as 1: (batch, num_heads, seqlen_q), None without ``normalize``) of a
        call that is like the first; it may be a plain tuple in the order of the arguments."""
        q = call[0]
        out, state, normalizer = (new(q) for new in self._new)
        denominator = None if self._new_denominator is None else self._new_denominator(q)
        scratch = None if self._new_states is None else self._new_states(q)
        pointers = (*call[:6], out, state, normalizer, denominator, scratch)
        for launch in self._launches:
            if launch is not None:
                launch(pointers)
        return out, state, normalizer, denominator
