"""A linear layer that may hold its weight a second time, in a layout that suits products with few rows on a CPU; and one in row blocks.

The layouts are in packed_weight.py. Packing costs a few decoded tokens' time and a copy of the weight; on AMD's CPUs one row is then
multiplied in half of the time of ``F.linear``, on Intel's in the same, and eight rows in half of it on both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packed_weight import (
    ACTIVATIONS,
    FUSED,
    PackedWeight,
    Product,
    is_intel,
    library_product,
    product_of_one_row,
    why_not_packed,
    works,
)

# From so many rows on it pays to let oneDNN reorder a plain weight within the call.
_MIN_FUSED_ROWS = 64


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


def _plain_product(weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Product:
    """A product, and an activation if there is one, from a weight that is not packed."""
    activate = None if activation is None else ACTIVATIONS[activation]
    one_row, many_rows = product_of_one_row(weight, bias), _product_of_many_rows(weight, bias, activation)
    in_features = weight.shape[1]
    least = _MIN_FUSED_ROWS * in_features

    def product(x: Tensor) -> Tensor:
        if many_rows is not None and x.numel() >= least:
            return many_rows(x)
        is_one_row = one_row is not None and x.numel() == in_features
        y = one_row(x) if is_one_row else F.linear(x, weight, bias)  # type: ignore[misc]
        return y if activate is None else activate(y)

    return product


def _product_of_many_rows(weight: Tensor, bias: Tensor | None, activation: str | None) -> Product | None:
    """The same for so many rows that oneDNN reorders the weight within the call, where it is faster or takes in the activation."""
    if activation is None and (is_intel() or weight.dtype != torch.float32):
        # F.linear is MKL's, before which the bias is copied to every row: 10 % longer on AMD's CPUs. bfloat16 is oneDNN's anyway.
        return None
    if why_not_packed(weight) is not None or not works("onednn", weight.dtype):
        return None
    # With AVX2 oneDNN's tanh takes longer than a pass of torch's over the product.
    is_apart = activation == "gelu_tanh" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    product, (name, numbers, algorithm) = library_product("onednn"), FUSED[None if is_apart else activation]

    def by_onednn(x: Tensor) -> Tensor:
        y: Tensor = product(x, weight, bias, name, numbers, algorithm)
        return torch.ops.aten.gelu_(y, approximate="tanh") if is_apart else y

    return by_onednn
