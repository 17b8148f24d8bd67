"""A linear layer that may hold its weight a second time, in a layout that suits products with few rows on a CPU; and one in row blocks.

Decoding one token at a time reads every weight once per token and does two operations with it, so its speed is the speed of reading
memory. A weight that was reordered for the purpose ("prepacked") is read nearly as fast as memory allows: on AMD's CPUs 1.5 to 2
times as fast as ``F.linear`` reads a plain row-major one, on Intel's as fast for one row and twice as fast for eight. Packing costs a few
decoded tokens' time and a copy of the weight.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Beyond so many rows a matrix product is limited by arithmetic, and a layout for few rows no longer pays.
MAX_PACKED_ROWS = 16
# A weight this small stays in a core's cache between tokens, whatever its layout.
MIN_PACKED_ELEMENTS = 1 << 16
# From so many rows on it pays to let oneDNN reorder a plain weight within the call.
_MIN_FUSED_ROWS = 64
# What oneDNN does to a product before it leaves the registers, in the words of torch's op.
_FUSED: dict[str | None, tuple[str, list[float], str]] = {
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

    def product(self, activation: str | None = None, *, packed: bool = True) -> Callable[[Tensor], Tensor]:
        """x (…, in_features) -> x Wᵀ + bias, without autograd, with the weights of this moment: the packed ones if there are any.

        ``packed=False`` leaves those alone, whose being up to date :meth:`pack` would have to find out first.

        ``activation`` ("relu", "gelu", "gelu_tanh", "silu") follows, inside the product where oneDNN makes it faster: as a pass of its own
        GELU's tanh form takes a quarter of the time of the product before it (512 rows, 768 to 3072 features, AVX-512).
        """
        if packed and self._packed is not None:
            return self._packed.product(self.weight, self.bias, activation)
        return _plain_product(self.weight, self.bias, activation)

    def __getstate__(self) -> dict[str, Any]:
        # copy.deepcopy and pickle: an opaque packed tensor does not follow, the copy packs again.
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


class RowBlocks(nn.Module):
    """A :class:`Linear` whose weight is a pile of row blocks, each a parameter of its own.

    The projections to q, k and v (or to gate and up) of a public checkpoint are tensors apart, and one product here. Where a file is
    mapped, putting them together would copy all of it; so each block stays where it is, and the results are put together instead. To
    everything that names a weight (a state_dict, a file) this is one ``weight`` (out_features, in_features) and one ``bias``, as before.

    Args:
        blocks: (rows, in_features) each, of one dtype and device; they become the parameters ``weight_0``, ``weight_1``, …
        bias: (out_features), or ``None``.

    Raises:
        ValueError: blocks that do not stand on each other, or a bias that does not fit them.
    """

    bias: nn.Parameter | None

    def __init__(self, blocks: Sequence[Tensor], bias: Tensor | None = None) -> None:
        super().__init__()
        shapes = [tuple(block.shape) for block in blocks]
        if not shapes or any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
            raise ValueError(f"blocks must be matrices with as many columns each, got {shapes}")
        self.rows = [shape[0] for shape in shapes]
        self.in_features, self.out_features = shapes[0][1], sum(self.rows)
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"bias must have shape ({self.out_features},), got {tuple(bias.shape)}")
        for index, block in enumerate(blocks):
            self.register_parameter(f"weight_{index}", _parameter(block))
        self.register_parameter("bias", None if bias is None else _parameter(bias))
        self._packed: list[PackedWeight] = []

    @property
    def blocks(self) -> Sequence[nn.Parameter]:
        """The parameters that the weight is a pile of."""
        return [getattr(self, f"weight_{index}") for index in range(len(self.rows))]

    @property
    def weight(self) -> Tensor:
        """The whole weight, a copy."""
        return torch.cat(list(self.blocks))

    def forward(self, input: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features)."""
        return self.some_rows(input, 0, len(self.rows))

    def some_rows(self, input: Tensor, first: int, last: int) -> Tensor:
        """What the blocks from ``first`` to before ``last`` make of (…, in_features)."""
        biases = self._biases()[first:last]
        parts = [F.linear(input, block, bias) for block, bias in zip(self.blocks[first:last], biases)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def pack(self, rows: int = 1) -> bool:
        """Packs each block: see :meth:`Linear.pack`. A block too small to be packed leaves all as they are."""
        blocks = self.blocks
        if self._packed and all(
            packed.serves(rows) and packed.is_of(block) for packed, block in zip(self._packed, blocks)
        ):
            return True
        self._packed = []
        if all(why_not_packed(block, rows) is None for block in blocks):
            self._packed = [PackedWeight(block, rows) for block in blocks]
        return bool(self._packed)

    @property
    def is_packed(self) -> bool:
        """Whether there are packed copies, up to date or not."""
        return bool(self._packed)

    def unpack(self) -> None:
        """Frees the packed copies."""
        self._packed = []

    def product(self, *, packed: bool = True) -> Callable[[Tensor], Tensor]:
        """x (…, in_features) -> x Wᵀ + bias, without autograd: see :meth:`Linear.product`."""
        biases = self._biases()
        if packed and self._packed:
            products = [copy.product(block, bias) for copy, block, bias in zip(self._packed, self.blocks, biases)]
        else:
            products = [_plain_product(block, bias) for block, bias in zip(self.blocks, biases)]
        return lambda x: torch.cat([product(x) for product in products], dim=-1)

    def _biases(self) -> Sequence[Tensor | None]:
        return [None] * len(self.rows) if self.bias is None else torch.split(self.bias, self.rows)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        parts = dict(state_dict)
        weight = parts.pop(f"{prefix}weight", None)
        theirs = list[str]()
        if weight is None:
            missing_keys.append(f"{prefix}weight")
        elif tuple(weight.shape) != (self.out_features, self.in_features):
            expected = (self.out_features, self.in_features)
            error_msgs.append(f"size mismatch for {prefix}weight: {tuple(weight.shape)}, expected {expected}")
        else:
            parts.update((f"{prefix}weight_{index}", rows) for index, rows in enumerate(torch.split(weight, self.rows)))
        super()._load_from_state_dict(parts, prefix, local_metadata, strict, theirs, unexpected_keys, error_msgs)
        missing_keys += [name for name in theirs if name == f"{prefix}bias"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": []}  # as of Linear

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.rows}, bias={self.bias is not None}"


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


class PackedWeight:
    """A weight (out_features, in_features) reordered for inputs of ``rows`` rows; others are served too, but no faster than plainly.

    One float32 row goes through MKL on a single thread, where a call costs 4 µs against oneDNN's 30, and on Intel's CPUs: there all of
    GPT-2's products take 21 ms with two threads, and oneDNN's 28. On AMD's MKL stays on one thread, and oneDNN takes 0.6 to 0.8 of its
    time. Both ops are those that torch's compiler emits when it freezes weights for a CPU; they are not a public interface, so
    :func:`why_not_packed` tries them before they are relied on.
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

    def product(self, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Callable[[Tensor], Tensor]:
        """The layer, and an activation, as a function of x alone, which checks nothing."""
        product, reordered, rows = self._product, self._reordered, self.rows
        if self.library == "onednn":
            name, numbers, algorithm = _FUSED[activation]
            return lambda x: product(x, reordered, bias, name, numbers, algorithm)
        if activation is None:
            return lambda x: product(x, reordered, weight, bias, rows)
        activate = ACTIVATIONS[activation]
        return lambda x: activate(product(x, reordered, weight, bias, rows))


def _plain_product(weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Callable[[Tensor], Tensor]:
    """A product, and an activation if there is one, from a weight that is not packed."""
    if activation is None:
        by_linear: Callable[[Tensor], Tensor] = functools.partial(F.linear, weight=weight, bias=bias)
        # MKL's, before which the bias is copied to every row. On AMD's CPUs that takes 10 % longer, and bfloat16 is oneDNN's anyway.
        if _is_intel() or weight.dtype != torch.float32:
            return by_linear
    else:
        activate = ACTIVATIONS[activation]
        by_linear = lambda x: activate(F.linear(x, weight, bias))  # noqa: E731
    if why_not_packed(weight) is not None or not _works("onednn", weight.dtype):
        return by_linear
    # With AVX2 oneDNN's tanh takes longer than a pass of torch's over the product.
    is_apart = activation == "gelu_tanh" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    product, (name, numbers, algorithm) = _product("onednn"), _FUSED[None if is_apart else activation]
    least = _MIN_FUSED_ROWS * weight.shape[1]

    def by_onednn(x: Tensor) -> Tensor:
        if x.numel() < least:
            return by_linear(x)
        y: Tensor = product(x, weight, bias, name, numbers, algorithm)
        return torch.ops.aten.gelu_(y, approximate="tanh") if is_apart else y

    return by_onednn


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
    mkl_is_faster = rows == 1 and (torch.get_num_threads() == 1 or _is_intel())
    return "mkl" if (mkl_is_faster or not _works("onednn", dtype)) and rows == 1 and _works("mkl", dtype) else "onednn"


@functools.cache
def _is_intel() -> bool:
    """Whether the CPU says that it is Intel's; torch does not tell."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return "GenuineIntel" in platform.processor()


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
