"""Linear attention backward: to q, k, v, the decay and the initial state, of the gradients of the results and of the last state.

The states before each chunk are made again rather than kept, and the gradients of the states behind each in the same way from the end
(states.py); then dq, dk and dv are each a pass over rows (rows.py). Seven or eight launches; for T tokens of one head with D features, E
values and chunks of C 10·T·D·E + 3·T·C·(D + E) FLOP, and C·D more with a gradient of the decay. No atomics: the same bits each run.

The gradient of the decay is that of each power of it where it stands (in rows of dq for the chunk's own products and what the state adds to
results, in rows of dk for what keys add to the state behind, in the scan for what lies between), a number for each program, added up by
torch. The difference of two sums over positions, φ(q) · dφ(q) and φ(k) · dφ(k), would be one reduction, but cancels, and is 0 / 0 for a
decay of 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention.options import maker, new_row_strides
from ..launch import cdiv, device_limits
from .policy import LinearConfig, Passes, geometry, linear_config, state_strides, strides_of, tiles_of, traits_of
from .rows import num_programs, rows_launch
from .states import chunk_launch, scan_blocks, scan_launch, states_of_keys
from .statistics import statistics_launch

_NAMES = (
    *("q", "k", "v", "decay", "state", "normalizer", "dout", "out", "denominator", "dlast_state", "dlast_normalizer"),
    *("inverse", "delta", "states", "gradients", "dq", "dk", "dv", "dstate", "dnormalizer"),
    *("dq_partial", "dk_partial", "scan_partial"),
)


class LinearBackward:
    """The backward launches for calls that are alike, to be made any number of times.

    Args:
        given: a call of ops/linear_attention/gradient.py, of whose tensors only shapes, strides, dtypes and device count.
        allow_tf32, config: as for the forward pass.
    """

    def __init__(self, given: Any, *, allow_tf32: bool = False, config: LinearConfig | None = None) -> None:
        shape, q = geometry(given), given.q
        config = config or linear_config(shape.head_dim, shape.value_dim, q.dtype, device_limits(q.device).arch)
        chunks_k, chunks_q = cdiv(shape.seqlen_k, config.chunk), cdiv(shape.seqlen_q, config.chunk)
        state = (shape.batch, shape.num_kv_heads, shape.head_dim)
        # A number of the decay's gradient for each program.
        partial = {
            "dq_partial": num_programs(shape, config, "dq"),
            "dk_partial": num_programs(shape, config, "dk"),
            "scan_partial": shape.slots * scan_blocks(shape),
        }
        per_query = (shape.batch, shape.num_heads, shape.seqlen_q)
        new = {
            "inverse": per_query if given.normalize else None,
            "delta": per_query if given.normalize else None,
            "states": shape.states(chunks_k),
            "gradients": shape.states(chunks_q),
            "dq": tuple(q.shape),
            "dk": tuple(given.k.shape),
            "dv": tuple(given.v.shape),
            "dstate": (*state, shape.value_dim),
            "dnormalizer": state,
            **{
                name: (*state[:2], programs // max(shape.slots, 1)) if given.wants_decay else None
                for name, programs in partial.items()
            },
        }
        rows_of = ("dq", "dk", "dv")
        self._new: dict[str, Any] = {
            name: size and maker(q, size, q.dtype if name in rows_of else torch.float32) for name, size in new.items()
        }
        optional = ("decay", "state", "normalizer", "denominator", "dlast_state", "dlast_normalizer")
        absent = [name for name in optional if getattr(given, name) is None]
        absent += [name for name, size in new.items() if size is None]
        strides = {name: strides_of(getattr(given, name)) for name in ("q", "k", "v", "dout", "out")}
        strides |= {name: new_row_strides(new[name]) for name in rows_of}  # type: ignore[arg-type]
        rows = list(strides.values())
        of_states = ("state", "normalizer", "dlast_state", "dlast_normalizer")
        strides |= {name: state_strides(getattr(given, name)) for name in of_states}
        common = {
            "traits": traits_of(given, shape, allow_tf32, *rows),
            "stride_decay": 0 if given.decay is None else given.decay.stride(0),
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            **tiles_of(config, *rows),
        }
        passes = Passes(_NAMES, strides, common, absent)
        roles = {
            "states": "gradients",
            "first_state": "dlast_state",
            "first_normalizer": "dlast_normalizer",
            "last_state": "dstate",
            "last_normalizer": "dnormalizer",
            "before": "states" if given.wants_decay else None,
            "partial": "scan_partial",
        }
        self._launches = [
            statistics_launch(passes, shape) if given.normalize else None,
            *states_of_keys(passes, shape, config, chunks_k, returns_last=False),
            chunk_launch(passes, shape, config, chunks_q, of_gradient=True),
            scan_launch(passes, shape, chunks_q, roles, reverse=True),
            rows_launch(passes, shape, config, "dq", chunks_k),
            rows_launch(passes, shape, config, "dk", chunks_q),
            rows_launch(passes, shape, config, "dv", chunks_q),
        ]

    def __call__(self, given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """(dq, dk, dv, ddecay or None if it is not wanted, and the gradients of the initial S and z) of a call that is like the first."""
        q = given.q
        made: dict[str, Any] = {name: None if new is None else new(q) for name, new in self._new.items()}
        pointers = (
            *(given.q, given.k, given.v, given.decay, given.state, given.normalizer, given.dout, given.out),
            *(given.denominator, given.dlast_state, given.dlast_normalizer, *made.values()),
        )
        for launch in self._launches:
            if launch is not None:
                launch(pointers)
        ddecay = None
        if given.wants_decay:  # added up in one order
            parts = [made[name] for name in ("dq_partial", "dk_partial", "scan_partial")]
            ddecay = torch.cat(parts, -1).sum((0, 2))
        return made["dq"], made["dk"], made["dv"], ddecay, made["dstate"], made["dnormalizer"]
