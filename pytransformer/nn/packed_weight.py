"""A weight a second time, in a layout that a CPU reads fast for products with few rows, and the products themselves.

Decoding one token at a time reads every weight once and does two operations with each number, so it can be as fast as memory. Plain
libraries are not: MKL multiplies one row on one thread on AMD's CPUs. Four layouts (all products of GPT-2 124M, docs/lab-notes.md):

* "pieces": the transposed weight in pieces of its columns, whose products with pieces of the row are one batch, and their sum. MKL takes
  the problems of a batch to all threads, and reads each at the full speed of memory. For one float32 row, but not on Intel's CPUs.
* "mkl": as MKL packs it, for one float32 row on Intel's CPUs, where its own threads are no worse and a call costs 4 µs.
* "bags": tables for FBGEMM's weighted sums (bags.py), for one bfloat16 row where oneDNN has no product, which asks for AVX-512.
* "onednn": as oneDNN packs it, for several rows, and for bfloat16.

The ops of "mkl" and "onednn" are those that torch's compiler emits when it freezes weights for a CPU; they are not a public interface, so
:func:`why_not_packed` tries them before they are relied on.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bags

# Beyond so many rows a matrix product is limited by arithmetic, and a layout for few rows no longer pays.
MAX_PACKED_ROWS = 16
# A weight this small stays in a core's cache between tokens, whatever its layout.
MIN_PACKED_ELEMENTS = 1 << 16
# A batch of so many problems feeds as many threads. A fixed number, so that a token's bits do not follow from the number of threads.
_PIECES = 8
# What oneDNN does to a product before it leaves the registers, in the words of torch's op.
FUSED: dict[str | None, tuple[str, list[float], str]] = {
    None: ("none", [], ""),
    "relu": ("relu", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "silu": ("swish", [], ""),
}
# Those that a product takes in.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
Product = Callable[[Tensor], Tensor]


class PackedWeight:
    """A weight (out_features, in_features) reordered for inputs of ``rows`` rows; others are served too, but no faster than plainly."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.library = library_for(rows, weight.dtype)
        self.rows = rows
        with torch.no_grad():
            self._reordered = reorder(self.library, weight.detach().contiguous(), rows)
        self._version = weight._version
        self._pointer = weight.data_ptr()
        self._dtype = weight.dtype
        self._checksum = _checksum(weight)

    def serves(self, rows: int) -> bool:
        """Whether this is what would be packed now for so many rows."""
        return self.rows == rows and self.library == library_for(rows, self._dtype)

    def is_of(self, weight: Tensor) -> bool:
        """Whether ``weight`` is still the tensor that was packed, with the bits that were packed."""
        same = weight._version == self._version and weight.data_ptr() == self._pointer and weight.dtype == self._dtype
        return same and _checksum(weight) == self._checksum

    def product(self, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Product:
        """The layer, and an activation, as a function of x alone, which checks nothing."""
        reordered, rows = self._reordered, self.rows
        if self.library == "onednn":
            by_onednn, (name, numbers, algorithm) = library_product("onednn"), FUSED[activation]
            return lambda x: by_onednn(x, reordered, bias, name, numbers, algorithm)
        if self.library == "mkl":
            by_mkl = library_product("mkl")
            product: Product = lambda x: by_mkl(x, reordered, weight, bias, rows)  # noqa: E731
        elif self.library == "bags":
            product = _product_of_bags(reordered, weight, bias)
        else:
            product = product_of_pieces(reordered, weight, bias)
        if activation is None:
            return product
        activate = ACTIVATIONS[activation]
        return lambda x: activate(product(x))


def why_not_packed(weight: Tensor, rows: int = 1) -> str | None:
    """The reason why :meth:`pytransformer.nn.Linear.pack` would leave this weight as it is, or ``None``."""
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
    if not works(library_for(rows, weight.dtype), weight.dtype):
        return f"this build of torch packs no {weight.dtype} weights"
    return None


def library_for(rows: int, dtype: torch.dtype) -> str:
    """The fastest of the layouts that serve; "onednn" where none does."""
    if rows == 1 and dtype == torch.float32:
        first = "mkl" if is_intel() else "pieces"
        return first if works(first, dtype) else "onednn"
    return "bags" if rows == 1 and not works("onednn", dtype) and works("bags", dtype) else "onednn"


def product_of_one_row(weight: Tensor, bias: Tensor | None) -> Product | None:
    """The layer as a function of one row, from the weight as it is, where that is faster than ``F.linear``.

    A batch over blocks of rows, as "pieces" is one over blocks of columns: 0.65 of the time of ``F.linear`` with two threads.
    """
    out_features, in_features = weight.shape
    pays = not is_intel() and torch.get_num_threads() > 1 and works("pieces", weight.dtype)
    if not pays or out_features < _PIECES or not weight.is_contiguous() or why_not_packed(weight) is not None:
        return None
    whole = out_features // _PIECES * _PIECES
    blocks, rest = weight[:whole].view(_PIECES, -1, in_features).transpose(1, 2), weight[whole:]

    def product(x: Tensor) -> Tensor:
        row = x.reshape(1, in_features)
        y = torch.bmm(row.expand(_PIECES, 1, in_features), blocks).view(1, whole)
        if len(rest):
            y = torch.cat((y, F.linear(row, rest)), dim=1)
        y = y if bias is None else y.add_(bias)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], out_features)

    return product


def reorder(library: str, weight: Tensor, rows: int) -> Tensor:
    """A weight (out_features, in_features) in a library's layout for so many rows."""
    if library == "pieces":
        out_features, in_features = weight.shape
        count = math.gcd(in_features, _PIECES)
        pieces = large_memory((count, in_features // count, out_features), weight.dtype)
        return pieces.copy_(weight.t().view(count, -1, out_features))
    if library == "bags":
        # One row more, for a bias.
        tables = large_memory((bags.bags_of(len(weight)), weight.shape[1] + 1, bags.OUTPUTS), weight.dtype)
        bags.fill(tables[:, :-1], weight)
        return tables
    ops = torch.ops.mkl._mkl_reorder_linear_weight if library == "mkl" else torch.ops.mkldnn._reorder_linear_weight
    reordered: Tensor = ops(weight, rows)
    return reordered


def library_product(library: str) -> Any:
    """torch's op for "mkl" or "onednn"."""
    op = torch.ops.mkl._mkl_linear if library == "mkl" else torch.ops.mkldnn._linear_pointwise
    return op.default


@functools.cache
def works(library: str, dtype: torch.dtype) -> bool:
    """Whether this build of torch has this layout's products for this dtype; where its ops are not public, found by trying them."""
    if library == "pieces":
        return dtype == torch.float32 and bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]
    if library == "bags":
        return dtype == torch.bfloat16 and bags.has_bags()
    if library == "mkl" and dtype != torch.float32:
        return False
    try:
        with torch.no_grad():
            weight = torch.eye(16, dtype=dtype).roll(3, dims=0)
            x = torch.arange(16, dtype=dtype)[None]
            reordered = reorder(library, weight, 1)
            tail: tuple[Any, ...] = (weight, None, 1) if library == "mkl" else (None, "none", [], "")
            result = library_product(library)(x, reordered, *tail)
            return torch.equal(result, F.linear(x, weight))
    except (AttributeError, RuntimeError):  # NotImplementedError is a RuntimeError
        return False


@functools.cache
def is_intel() -> bool:
    """Whether the CPU says that it is Intel's; torch does not tell."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return "GenuineIntel" in platform.processor()


def product_of_pieces(pieces: Tensor, weight: Tensor, bias: Tensor | None) -> Product:
    """The layer by pieces (count, in_features / count, out_features) for one row, and plainly for others."""
    count, length, out_features = pieces.shape
    in_features = count * length
    ones = torch.ones(1, 1, count)
    addend = None if bias is None else bias.view(1, 1, out_features)
    # The sum of the parts is a batch too: its code is still in the caches, and it takes in the bias.
    bmm, baddbmm, linear = torch.bmm, torch.baddbmm, F.linear

    def product(x: Tensor) -> Tensor:
        if x.numel() != in_features:
            return linear(x, weight, bias)
        parts = bmm(x.reshape(count, 1, length), pieces).view(1, count, out_features)
        y = bmm(ones, parts) if addend is None else baddbmm(addend, ones, parts)
        return y if x.ndim == 3 else y.view(*x.shape[:-1], out_features)

    return product


def _product_of_bags(tables: Tensor, weight: Tensor, bias: Tensor | None) -> Product:
    """The layer by tables (bags, in_features + 1, outputs) for one row, and plainly for others."""
    out_features, in_features = weight.shape
    # As a row of the table it is added before the sum is rounded to 16 bits.
    bags.fill(tables[:, -1:], weight.new_zeros(out_features, 1) if bias is None else bias.detach()[:, None])
    count, length, _ = tables.shape
    table, (indices, starts) = tables.view(count * length, -1), bags.places(count, length)
    one = tables.new_ones(1)
    sum_up, repeated, linear, cat = torch.embedding_bag, bags.repeated, F.linear, torch.cat

    def product(x: Tensor) -> Tensor:
        if x.numel() != in_features:
            return linear(x, weight, bias)
        y = sum_up(table, indices, starts, False, 0, False, repeated(cat((x.reshape(-1), one)), count))[0]
        return y.view(-1)[:out_features].view(*x.shape[:-1], out_features)

    return product


def large_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in huge pages, where the system has them.

    Memory that is read from one end to the other changes its page every 4 KiB, and behind it nothing of the rest of the program is
    found in the TLB any more: in pages of 2 MiB a token takes 5 to 8 % less time. Linux gives them to those that ask.
    """
    size = dtype.itemsize * math.prod(shape)
    if not hasattr(mmap, "MADV_HUGEPAGE") or size < 1 << 21:
        return torch.empty(tuple(shape), dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))


def _checksum(weight: Tensor) -> int:
    """A number that a single write to the weight, or an exchange of rows, changes; read at the speed of memory."""
    rows = weight.detach().contiguous()
    words_fit = rows.shape[1] * rows.dtype.itemsize % 8 == 0 and rows.data_ptr() % 8 == 0
    narrow = torch.int32 if rows.dtype.itemsize == 4 else torch.int16
    sums = rows.view(torch.int64 if words_fit else narrow).sum(dim=1)
    places = torch.arange(1, 2 * len(sums), 2)  # odd factors lose no bit of a sum, modulo 2^64
    return int((sums * places).sum())
