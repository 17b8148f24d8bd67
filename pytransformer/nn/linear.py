"""A linear layer that may hold its weight a second time, in a layout that suits products with few rows on a CPU.

Decoding one token at a time reads every weight once per token and does two operations with it, so its speed is the speed of reading
memory. A weight that was reordered for the purpose ("prepacked") is read nearly as fast as memory allows, 1.5 to 2 times as fast as
``F.linear`` reads a plain row-major one. Packing costs a few decoded tokens' time and a copy of the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Beyond so many rows a matrix product is limited by arithmetic, and a layout for few rows no longer pays.
MAX_PACKED_ROWS = 16
# A weight this small stays in a core's cache between tokens, whatever its layout.
MIN_PACKED_ELEMENTS = 1 << 16


class Linear(nn.Linear):
    """``torch.nn.Linear``; on a CPU it can be prepared for decoding.

    Its forward pass is torch's and knows nothing of packing. :meth:`pack` makes a packed copy, which is outside the state_dict, and
    :meth:`product` gives the layer as a function that reads it. A decoder calls both before it starts, every time.
    """

    _packed: PackedWeight | None = None

    def pack(self, rows: int = 1) -> bool:
        """Packs the weight for inputs of ``rows`` rows, unless that has been done; returns whether a packed copy is there now.

        A copy that no longer fits is made anew: another number of rows, another tensor, a write that torch has counted, or (by checksum,
        which costs one read of the weight) a write through ``weight.data`` that it has not.

        False, without an error, where packing would not help or cannot be done: see :func:`why_not_packed`.
        """
        packed = self._packed
        if packed is not None and packed.serves(rows) and packed.is_of(self.weight):
            return True
        self._packed = None  # the old copy goes before the new one is made
        if why_not_packed(self.weight, rows) is None:
            self._packed = PackedWeight(self.weight, rows)
        return self._packed is not None

    @property
    def is_packed(self) -> bool:
        """Whether there is a packed copy, up to date or not."""
        return self._packed is not None

    def unpack(self) -> None:
        """Frees the packed copy."""
        self._packed = None

    def product(self) -> Callable[[Tensor], Tensor]:
        """x (…, in_features) -> x Wᵀ + bias, without autograd, with the weights of this moment: the packed ones if there are any."""
        weight, bias = self.weight, self.bias
        if self._packed is not None:
            return self._packed.product(weight, bias)
        return lambda x: F.linear(x, weight, bias)

    def __getstate__(self) -> dict[str, Any]:
        # copy.deepcopy and pickle: an opaque packed tensor does not follow, the copy packs again.
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


class PackedWeight:
    """A weight (out_features, in_features) reordered for inputs of ``rows`` rows; others are served too, but no faster than plainly.

    oneDNN's product uses every thread: with two, GPT-2's projections take 0.6 to 0.8 of the time that MKL's take, which stays on one. A
    single thread with one float32 row goes through MKL where torch was built with it: a call costs 4 µs, against oneDNN's 30. Both ops are
    those that torch's compiler emits when it freezes weights for a CPU; they are not a public interface, so :func:`why_not_packed` tries
    them before they are relied on.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.library = _library(rows, weight.dtype)
        self.rows = rows
        with torch.no_grad():
            self._reordered = _reorder(self.library, weight.detach().contiguous(), rows)
        self._product = _product(self.library)
        self._version = weight._version
        self._pointer = weight.data_ptr()
        self._dtype = weight.dtype
        self._checksum = _checksum(weight)

    def serves(self, rows: int) -> bool:
        """Whether this is what would be packed now for so many rows: the number of threads may have changed."""
        return self.rows == rows and self.library == _library(rows, self._dtype)

    def is_of(self, weight: Tensor) -> bool:
        """Whether ``weight`` is still the tensor that was packed, with the bits that were packed."""
        same = weight._version == self._version and weight.data_ptr() == self._pointer and weight.dtype == self._dtype
        return same and _checksum(weight) == self._checksum

    def product(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """The layer as a function of x alone, which checks nothing."""
        product, reordered, rows = self._product, self._reordered, self.rows
        if self.library == "mkl":
            return lambda x: product(x, reordered, weight, bias, rows)
        return lambda x: product(x, reordered, bias, "none", [], "")


def why_not_packed(weight: Tensor, rows: int = 1) -> str | None:
    """The reason why :meth:`Linear.pack` would leave this weight as it is, or ``None``."""
    if weight.device.type != "cpu":
        return f"packing is for CPUs, the weight is on {weight.device}"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"packing is for float32 and bfloat16, the weight is {weight.dtype}"
    if not 1 <= rows <= MAX_PACKED_ROWS:
        return f"packing is for 1 to {MAX_PACKED_ROWS} rows, got {rows}"
    if weight.numel() < MIN_PACKED_ELEMENTS:
        return f"packing is for weights of at least {MIN_PACKED_ELEMENTS} elements, this one has {weight.numel()}"
    if weight.is_inference():
        return "the weight was made under torch.inference_mode(), which does not count writes"
    if not _works(_library(rows, weight.dtype), weight.dtype):
        return f"this build of torch packs no {weight.dtype} weights"
    return None


def _library(rows: int, dtype: torch.dtype) -> str:
    """The faster of the libraries that serve; "onednn" where none does."""
    mkl_is_faster = rows == 1 and torch.get_num_threads() == 1
    return "mkl" if (mkl_is_faster or not _works("onednn", dtype)) and rows == 1 and _works("mkl", dtype) else "onednn"


def _reorder(library: str, weight: Tensor, rows: int) -> Tensor:
    ops = torch.ops.mkl._mkl_reorder_linear_weight if library == "mkl" else torch.ops.mkldnn._reorder_linear_weight
    reordered: Tensor = ops(weight, rows)
    return reordered


def _product(library: str) -> Any:
    op = torch.ops.mkl._mkl_linear if library == "mkl" else torch.ops.mkldnn._linear_pointwise
    return op.default


@functools.cache
def _works(library: str, dtype: torch.dtype) -> bool:
    """Whether this build of torch packs with ``library`` ("mkl" or "onednn") and multiplies rightly, found by trying it."""
    if library == "mkl" and dtype != torch.float32:
        return False
    try:
        with torch.no_grad():
            weight = torch.eye(16, dtype=dtype).roll(3, dims=0)
            x = torch.arange(16, dtype=dtype)[None]
            reordered = _reorder(library, weight, 1)
            tail: tuple[Any, ...] = (weight, None, 1) if library == "mkl" else (None, "none", [], "")
            result = _product(library)(x, reordered, *tail)
            return torch.equal(result, F.linear(x, weight))
    except (AttributeError, RuntimeError):  # NotImplementedError is a RuntimeError
        return False


def _checksum(weight: Tensor) -> int:
    """A number that a single write to the weight, or an exchange of rows, changes; read at the speed of memory."""
    rows = weight.detach().contiguous()
    words_fit = rows.shape[1] * rows.dtype.itemsize % 8 == 0 and rows.data_ptr() % 8 == 0
    narrow = torch.int32 if rows.dtype.itemsize == 4 else torch.int16
    sums = rows.view(torch.int64 if words_fit else narrow).sum(dim=1)
    places = torch.arange(1, 2 * len(sums), 2)  # odd factors lose no bit of a sum, modulo 2^64
    return int((sums * places).sum())
