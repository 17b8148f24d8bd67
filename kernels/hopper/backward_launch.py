"""The launches of attention's backward pass on Hopper: statistics of rows, the warp-specialised kernel, and dq from its sums."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from triton.experimental.gluon import language as gl

from ..attention.options import geometry, new_row_strides, row_strides
from ..launch import COMMON_OPTIONS, NewTensor
from ..mathematics import LOG2E
from ..prepared import PreparedLaunch, by_name
from .backward import BLOCK_M, BLOCK_N, Traits, attention_backward_kernel
from .backward_passes import backward_dq_kernel, backward_statistics_kernel
from .descriptors import ALIGNMENT, HostDescriptor
from .launch import boxes, prepare, window_of
from .serves import unwalkable

if TYPE_CHECKING:
    from pytransformer.ops.attention.call import AttentionCall

_FLOATS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
_VECTOR = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)

# dq, dk, dv, dbias, dsinks, dslopes.
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, torch.Tensor | None, None]


class HopperBackward:
    """The backward launches for calls that are alike, which :func:`.serves.refusal_backward` has nothing against; made any number of times.

    Args:
        call: as for the forward pass.
        dout: gradient of out, any strides.
        out, lse: what the forward pass returned.
        dlse: gradient of lse, or None for 0.

    Of all tensors only shapes, strides, dtypes and device count. Where the kernels cannot walk dout, out, lse or dlse, each call copies it.
    """

    __slots__ = (
        "_after", "_before", "_copied", "_launch", "_new_dk", "_new_dq", "_new_dsinks", "_new_dv", "_new_statistic", "_new_sums",
        "_sums_of_sinks",
    )  # fmt: skip

    def __init__(
        self,
        call: AttentionCall,
        dout: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dlse: torch.Tensor | None,
    ) -> None:
        shape = geometry(call)
        q, dim = call.q, shape.head_dim
        tiles_q, slots_q = shape.tiles(shape.seqlen_q, BLOCK_M.value), shape.slots(shape.num_heads)
        tiles_k, slots_k = shape.tiles(shape.seqlen_k, BLOCK_N.value), shape.slots(shape.num_kv_heads)
        rows = tiles_q * slots_q * BLOCK_M.value
        self._new_dq, self._new_dk, self._new_dv = NewTensor(q), NewTensor(call.k), NewTensor(call.v)
        empty = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
        self._new_statistic, self._new_sums = functools.partial(empty, rows), functools.partial(empty, rows, dim)
        self._new_dsinks = None
        if call.sinks is not None:
            self._new_dsinks = functools.partial(torch.zeros, slots_q, tiles_q, dtype=torch.float32, device=q.device)
        self._sums_of_sinks = (-1, shape.num_heads, tiles_q)
        walked = [unwalkable("dout", dout) is None, out.stride(-1) == 1]
        walked += [tensor is None or tensor.is_contiguous() for tensor in (lse, dlse)]
        self._copied = [index for index, walks in enumerate(walked) if not walks]

        strides = [
            row_strides(tensor) if walks else new_row_strides(tensor.shape)
            for tensor, walks in zip((dout, out), walked)
        ]
        values: dict[str, Any] = {
            "dout_strides": strides[0],
            "out_strides": strides[1],
            "dq_strides": new_row_strides(q.shape),
            "stride_lse_batch": shape.lse_strides[0],
            "stride_lse_head": shape.lse_strides[1],
            **dict(zip(("batch", "num_heads", "seqlen_q", "seqlen_k"), shape.sizes)),
            "num_tiles": tiles_q,
            "num_slots": slots_q,
            "softmax_scale": call.softmax_scale,
            "HEAD_DIM": dim,
            "BLOCK_M": BLOCK_M.value,
        }
        given = (
            "dout",
            "out",
            "lse",
            "dlse",
            "sinks",
            "shift",
            "delta",
            "sums",
            "dsinks",
            "dq",
            "cu_seqlens_q",
            "cu_seqlens_k",
        )
        options = {"num_warps": 4, **COMMON_OPTIONS}
        self._before, self._after = (
            PreparedLaunch(kernel, (tiles_q * slots_q,), *by_name(kernel, values, given, options))
            for kernel in (backward_statistics_kernel, backward_dq_kernel)
        )
        left, right = window_of(call, shape)
        constants = {
            "HEADS_PER_KV": shape.num_heads // shape.num_kv_heads,
            "HEAD_DIM": dim,
            "PACKED": shape.packed,
            "HAS_LEFT": left >= 0,
            "HAS_RIGHT": right >= 0,
            "HAS_SOFTCAP": call.softcap > 0.0,
        }
        factor, cap = call.softmax_scale * LOG2E.value, call.softcap * LOG2E.value
        if call.softcap > 0.0:
            # tanh(x) = 1 - 2 / (1 + exp2(2 · log2(e) · x)).
            factor = 2.0 * factor / call.softcap
        m, n = BLOCK_M.value, BLOCK_N.value
        contiguous = [torch.empty(x.shape, dtype=x.dtype, device="meta") for x in (call.k, call.v, dout)]
        arguments = (
            boxes(q, m, dim), boxes(call.k, n, dim), boxes(call.v, n, dim), boxes(dout if walked[0] else contiguous[2], m, dim),
            HostDescriptor((rows,), (1,), torch.float32, (m,), _VECTOR), HostDescriptor((rows,), (1,), torch.float32, (m,), _VECTOR),
            HostDescriptor((rows, dim), (dim, 1), torch.float32, (m, dim), _FLOATS),
            boxes(contiguous[0], n, dim), boxes(contiguous[1], n, dim), None, None,
            shape.batch, shape.num_kv_heads, shape.seqlen_q, shape.seqlen_k, slots_k, tiles_q,
            factor, call.softmax_scale, cap, left, right,
            Traits(**{name: gl.constexpr(value) for name, value in constants.items()}),
        )  # fmt: skip
        options = {"num_warps": 8, **COMMON_OPTIONS}
        self._launch = prepare(attention_backward_kernel, (tiles_k * slots_k,), arguments, options)

    def __call__(
        self,
        call: AttentionCall,
        dout: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dlse: torch.Tensor | None,
    ) -> Gradients:
        """(dq, dk, dv, None, dsinks, None), contiguous, in the dtypes of q, k, v and sinks, of a call that is like the first; dsinks is
        None without sinks."""
        if self._copied:
            given: list[Any] = [dout, out, lse, dlse]
            for index in self._copied:
                given[index] = given[index].contiguous()
            dout, out, lse, dlse = given
        if dout.data_ptr() % ALIGNMENT:
            # With its strides, which the launches were prepared for: a clone of rows with gaps has none.
            dout = torch.empty_strided(dout.shape, dout.stride(), dtype=dout.dtype, device=dout.device).copy_(dout)
        dq, dk, dv = self._new_dq(call.q), self._new_dk(call.k), self._new_dv(call.v)
        shift, delta, sums = self._new_statistic(), self._new_statistic(), self._new_sums()
        dsinks = None if self._new_dsinks is None else self._new_dsinks()
        cu_seqlens = (call.cu_seqlens_q, call.cu_seqlens_k)
        pointers = (dout, out, lse, dlse, call.sinks, shift, delta, sums, dsinks, dq, *cu_seqlens)
        self._before(pointers)
        self._launch((call.q, call.k, call.v, dout, shift, delta, sums, dk, dv, *cu_seqlens))
        self._after(pointers)
        if dsinks is not None:
            assert call.sinks is not None
            dsinks = dsinks.view(self._sums_of_sinks).sum((0, 2)).to(call.sinks.dtype)
        return dq, dk, dv, None, dsinks, None
