"""A linear layer that may hold its weight a second time, in the layout that suits matrix-vector products on a CPU.

Decoding one token at a time reads every weight once per token and does two operations with it, so its speed is the speed of reading
memory. oneDNN reads a weight that was reordered for the purpose ("prepacked") nearly as fast as memory allows, 1.5 to 2 times as fast as
``F.linear`` reads a plain row-major one. Packing costs about as much as one decoded token and a copy of the weight.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Beyond so many rows a matrix product is limited by arithmetic, and the layout packed for one row no longer pays.
MAX_PACKED_ROWS = 16


class Linear(nn.Linear):
    """``torch.nn.Linear``; :meth:`pack` prepares it for decoding on a CPU.

    The packed copy is outside the state_dict, is used only without autograd, and is dropped as soon as the weight is another tensor or
    was written in place. A write through ``weight.data`` leaves no trace on the weight: :meth:`pack`, called again, finds it.
    """

    _packed: PackedWeight | None = None

    def forward(self, input: Tensor) -> Tensor:
        packed = self._packed
        if packed is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.linear(input, self.weight, self.bias)
        if not packed.is_of(self.weight):
            self._packed = None
        elif packed.serves(input):
            return packed.linear(input, self.bias)
        return F.linear(input, self.weight, self.bias)

    def pack(self) -> bool:
        """Packs the weight unless an up-to-date packed copy is there; returns whether there is one now.

        False, without an error, where it would not help or this build of torch cannot: another device than a CPU, another dtype than
        float32 or bfloat16, no oneDNN.
        """
        if self._packed is None or not self._packed.is_of(self.weight) or not self._packed.matches(self.weight):
            self._packed = None  # the old copy goes before the new one is made
            if why_not_packed(self.weight) is None:
                self._packed = PackedWeight(self.weight)
        return self._packed is not None

    def unpack(self) -> None:
        """Frees the packed copy."""
        self._packed = None

    def __getstate__(self) -> dict[str, Any]:
        # copy.deepcopy and pickle: an opaque oneDNN tensor does not follow, the copy packs again.
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


class PackedWeight:
    """A weight (out_features, in_features) reordered by oneDNN for inputs of few rows."""

    def __init__(self, weight: Tensor) -> None:
        with torch.no_grad():
            source = weight.detach().contiguous()
            self._reordered = torch.ops.mkldnn._reorder_linear_weight(source, 1)
        self._linear = torch.ops.mkldnn._linear_pointwise.default
        self._checksum = _checksum(weight)
        self._version = weight._version
        self._pointer = weight.data_ptr()
        self._dtype = weight.dtype
        self._in_features = weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed copy (oneDNN may pad it by less than a tile)."""
        return self._reordered.numel() * self._dtype.itemsize

    def is_of(self, weight: Tensor) -> bool:
        """Whether ``weight`` is still the tensor that was packed, not written since (as far as torch counts writes)."""
        return weight._version == self._version and weight.data_ptr() == self._pointer and weight.dtype == self._dtype

    def matches(self, weight: Tensor) -> bool:
        """Whether ``weight`` still holds the bits that were packed, by checksum: costs one read of it."""
        return _checksum(weight) == self._checksum

    def serves(self, x: Tensor) -> bool:
        """Whether this input has few enough rows, and is one that oneDNN takes."""
        return (
            x.dtype == self._dtype
            and 0 < x.numel() <= MAX_PACKED_ROWS * self._in_features
            and x.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
        )

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (…, in_features) Wᵀ + bias."""
        result: Tensor = self._linear(x, self._reordered, bias, "none", [], "")
        return result


def why_not_packed(weight: Tensor) -> str | None:
    """The reason why :meth:`Linear.pack` would leave this weight as it is, or ``None``."""
    if weight.device.type != "cpu":
        return f"packing is for CPUs, the weight is on {weight.device}"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"packing is for float32 and bfloat16, the weight is {weight.dtype}"
    if weight.numel() == 0:
        return "the weight is empty"
    if weight.is_inference():
        return "the weight was made under torch.inference_mode(), which does not count writes"
    return _packing_unavailable(weight.dtype)


@functools.cache
def _packing_unavailable(dtype: torch.dtype) -> str | None:
    """Whether this build of torch packs and multiplies: these are inductor's own ops, not a public interface, so they are tried."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this build of torch has no oneDNN"
    try:
        with torch.no_grad():
            weight = torch.eye(8, dtype=dtype)
            reordered = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
            result = torch.ops.mkldnn._linear_pointwise.default(weight[:1], reordered, None, "none", [], "")
            if not torch.equal(result, weight[:1]):
                return "oneDNN's packed product is wrong here"
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"this build of torch cannot pack: {str(error).splitlines()[0]}"
    return None


def _checksum(weight: Tensor) -> int:
    """A number that a single write to the weight, or an exchange of rows, changes; read at the speed of memory."""
    rows = weight.detach().contiguous()
    words_fit = rows.shape[1] * rows.dtype.itemsize % 8 == 0 and rows.data_ptr() % 8 == 0
    narrow = torch.int32 if rows.dtype.itemsize == 4 else torch.int16
    sums = rows.view(torch.int64 if words_fit else narrow).sum(dim=1)
    places = torch.arange(1, 2 * len(sums), 2)  # odd factors lose no bit of a sum, modulo 2^64
    return int((sums * places).sum())
