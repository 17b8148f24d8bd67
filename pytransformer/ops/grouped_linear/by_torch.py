"""grouped_linear by torch: its own grouped product on a GPU, elsewhere a product for each group, written where it belongs.

Autograd would make of the slices of each group a gradient as large as all of x and of all weights, and add them up; here each product is
written once. That is what takes other mixtures of experts half their time on a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer import reference
from pytransformer.ops.backend import Backend, Outputs, always
from pytransformer.ops.grouped_linear.call import GroupedLinearCall, GroupedLinearGradientCall


def forward(call: GroupedLinearCall) -> Outputs:
    """(y)."""
    # It takes no bias, and a sum after its rounding would round twice.
    if call.bias is None and _has_grouped_product(call.x, call.weight):
        return (grouped_product(call),)
    x, weight, offsets, bias = call
    y = x.new_empty(x.shape[0], weight.shape[1])
    x = _dense(x)
    for group, rows in _groups(offsets):
        transposed = _dense(weight[group]).t()
        if bias is None:
            torch.mm(x[rows], transposed, out=y[rows])
        else:
            torch.addmm(bias[group], x[rows], transposed, out=y[rows])
    return (y,)


def backward(call: GroupedLinearGradientCall) -> Outputs:
    """(dx, dweight, dbias), of each None if it is not wanted."""
    if _has_grouped_product(call.x, call.weight):
        return grouped_gradients(call)
    dy, x, weight = call.dy.contiguous(), _dense(call.x), call.weight
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if call.want_dx else None
    dweight = torch.empty(weight.shape, dtype=x.dtype, device=x.device) if call.want_dweight else None
    dbias = torch.empty(weight.shape[:2], dtype=x.dtype, device=x.device) if call.want_dbias else None
    for group, rows in _groups(call.offsets, empty=True):
        if dbias is not None:
            torch.sum(dy[rows], dim=0, out=dbias[group])
        if dweight is not None:
            torch.mm(dy[rows].t(), x[rows], out=dweight[group])
        if dx is not None and rows.start < rows.stop:
            torch.mm(dy[rows], _dense(weight[group]), out=dx[rows])
    return dx, dweight, dbias


def _groups(offsets: Tensor, *, empty: bool = False) -> Iterator[tuple[int, slice]]:
    """Each group with its rows; on a GPU the host waits for the offsets."""
    for group, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if start < end or empty:
            yield group, slice(start, end)


def _dense(tensor: Tensor) -> Tensor:
    # oneDNN's product with AMX (torch 2.13) reads behind the last column of rows with a stride: a NaN there makes the result NaN.
    return tensor if tensor.is_cuda or tensor.dtype.itemsize > 2 else tensor.contiguous()


# --- torch's own grouped product -------------------------------------------------------------------------------------------------------


def _has_grouped_product(x: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies all groups at once: bfloat16 on a GPU, rows of a multiple of 16 bytes."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    # What has no elements has no products, and its shapes are refused.
    return x.numel() > 0 and weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0


def grouped_product(call: GroupedLinearCall) -> Tensor:
    """y without a bias, by one call for all groups."""
    return _grouped(_aligned(call.x), _aligned(call.weight).transpose(1, 2), offs=call.offsets[1:])


def grouped_gradients(call: GroupedLinearGradientCall) -> Outputs:
    """(dx, dweight, dbias), by one call for all groups of each."""
    dy, x, ends = call.dy.contiguous(), _aligned(call.x), call.offsets[1:]
    is_empty = (call.offsets.diff() == 0)[:, None]
    dx = _grouped(dy, _aligned(call.weight), offs=ends) if call.want_dx else None
    dweight = dbias = None
    if call.want_dweight:
        # A product of no rows is not promised to be written.
        dweight = _grouped(dy.t(), x, offs=ends).masked_fill_(is_empty[:, :, None], 0)
    if call.want_dbias:
        # Sums of rows as a product with ones, of as many columns as it asks for: added up in float32, and in one order.
        ones = dy.new_ones(dy.shape[0], 8)
        dbias = _grouped(dy.t(), ones, offs=ends)[:, :, 0].masked_fill(is_empty, 0)
    return dx, dweight, dbias


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where rows do not begin at multiples of 16 bytes."""
    fits = all(stride % 8 == 0 for stride in tensor.stride()[:-1]) and tensor.data_ptr() % 16 == 0
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


_grouped: Callable[..., Tensor] = F.grouped_mm


def _by_reference(call: GroupedLinearCall) -> Outputs:
    return (reference.grouped_linear(call.x, call.weight, call.offsets, bias=call.bias),)


BACKEND = Backend("torch", forward)
BACKWARD = Backend("torch", backward)
REFERENCE = Backend("reference", _by_reference, is_transparent=always)
