"""Codes chosen by what a layer's inputs make of them: GPTQ (Frantar et al. 2022).

Rounding to the nearest code makes each weight's own error least. What counts is the error of the layer's output, ‖(W - Ŵ) X‖² over the
inputs X of some text. GPTQ walks the columns; the error that rounding one of them makes is taken up by the columns that are still to come,
as the inverse of the Hessian H = X Xᵀ says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pytransformer.nn.quantized import Codes, check_bits, grid_of, packed_halves, round_to_nearest

from .heads import LMHead

if TYPE_CHECKING:
    from .transformer import Transformer

# Hessians in memory at once; for those of the other layers the text is read again.
HESSIAN_BYTES = 2 * 10**9
# Columns whose errors reach the rest of the weight together.
_BLOCK = 128


def gptq(
    model: Transformer,
    batches: Sequence[Tensor],
    bits: int = 4,
    *,
    group_size: int = 64,
    damping: float = 0.01,
    act_order: bool = False,
) -> Callable[[str, nn.Module], Codes]:
    """What :func:`pytransformer.model.quantized.quantize` takes as ``quantizer``: codes of each layer by GPTQ.

    The inputs of all layers are those of the model in full precision. Hessians of several layers, up to 2 GB, are added up in one reading
    of the text. A layer that the text never reaches is rounded to the nearest.

    Args:
        model: a decoder, in full precision; the one that is quantised.
        batches: calibration text, token ids (batch, seqlen) each, without padding.
        bits, group_size: as of ``quantize``.
        damping: this share of the Hessian's mean diagonal is added to it.
        act_order: columns with the largest inputs come first. Groups then have the scales that rounding to the nearest has.

    Raises:
        ValueError: a model that is no decoder, no text, damping that is not above 0, or bits and groups that there are not.
    """
    check_bits(bits, group_size)
    if model.config.architecture != "decoder":
        raise ValueError(f"model must be a decoder for calibration, got architecture {model.config.architecture!r}")
    if not batches or any(ids.ndim != 2 or ids.numel() == 0 for ids in batches):
        raise ValueError("batches must hold token ids (batch, seqlen), at least one token")
    if not damping > 0:
        raise ValueError(f"damping must be above 0, got {damping}")
    collected: dict[str, Tensor] = {}

    def codes_of(name: str, layer: nn.Module) -> Codes:
        if name not in collected:
            collected.update(hessians(model, batches, name))
        weight, hessian = layer.weight, collected.pop(name)
        assert isinstance(weight, Tensor)
        if not bool(hessian.any()):
            return round_to_nearest(weight, bits, group_size)
        return choose_codes(weight, hessian, bits, group_size, damping=damping, act_order=act_order)

    return codes_of


@torch.no_grad()
def hessians(model: Transformer, batches: Iterable[Tensor], first: str) -> dict[str, Tensor]:
    """X Xᵀ, float32 (in_features, in_features), of the layer ``first`` and those after it, as many as fit into memory."""
    from .quantized import layers_of

    names = [name for name, _ in layers_of(model)]
    layers = dict(layers_of(model))
    found: dict[str, Tensor] = {}
    hooks = []
    for name in names[names.index(first) :]:
        layer, width = layers[name], layers[name].in_features
        if found and 4 * (width**2 + sum(hessian.numel() for hessian in found.values())) > HESSIAN_BYTES:
            break
        hessian = found[name] = torch.zeros(width, width, device=next(layer.parameters()).device)
        hooks.append(layer.register_forward_pre_hook(_adding_to(hessian)))
    was_training = model.training
    model.eval()
    try:
        for ids in batches:
            model(ids.to(model.model.embed_tokens.weight.device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found


def _adding_to(hessian: Tensor) -> Callable[[nn.Module, Any], None]:
    def add(layer: nn.Module, given: Any) -> None:
        x = layer.features(given[0]) if isinstance(layer, LMHead) else given[0]
        x = x.reshape(-1, x.shape[-1]).float()
        hessian.addmm_(x.t(), x)

    return add


@dataclass
class _Grid:
    """Scales and zero points of a weight's groups (out_features, groups), and the codes between ``low`` and ``high``."""

    scale: Tensor
    zero: Tensor
    low: int
    high: int

    def codes(self, column: Tensor, group: int) -> Tensor:
        scaled = (column / self.scale[:, group]).round() + self.zero[:, group]
        return scaled.clamp(self.low, self.high)

    def values(self, codes: Tensor, group: int) -> Tensor:
        return (codes - self.zero[:, group]) * self.scale[:, group]

    def fit(self, columns: Tensor, group: int) -> None:
        """New values for a group of 4-bit codes, from its columns as they are now."""
        scale, self.zero[:, group] = grid_of(columns)
        self.scale[:, group] = scale.float()


@torch.no_grad()
def choose_codes(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int, *, damping: float = 0.01, act_order: bool = False
) -> Codes:
    """Codes of a weight (out_features, in_features) for inputs whose X Xᵀ is ``hessian`` (in_features, in_features)."""
    nearest = round_to_nearest(weight, bits, group_size)
    rest, hessian = weight.detach().float().clone(), hessian.clone()
    grid = _grid(nearest, bits)
    width = group_size if bits == 4 else rest.shape[1]
    silent = hessian.diagonal() == 0  # no input: no error either
    hessian.diagonal()[silent] = 1
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(len(hessian))
    rest, hessian = rest[:, order], hessian[order][:, order]
    root = _inverse_root(hessian, damping)
    codes = torch.empty_like(rest)
    groups = (order // width).tolist()
    block = width if bits == 4 and not act_order else _BLOCK
    for start in range(0, rest.shape[1], block):
        end = min(start + block, rest.shape[1])
        errors = torch.zeros_like(rest[:, start:end])
        for index in range(start, end):
            group = groups[index]
            if bits == 4 and not act_order and index % width == 0:
                grid.fit(rest[:, index : index + width], group)
            column = rest[:, index]
            codes[:, index] = grid.codes(column, group)
            error = (column - grid.values(codes[:, index], group)) / root[index, index]
            rest[:, index + 1 : end] -= error[:, None] * root[index, index + 1 : end]
            errors[:, index - start] = error
        rest[:, end:] -= errors @ root[start:end, end:]
    codes = codes[:, order.argsort()]
    if bits == 8:
        return Codes(codes.to(torch.int8), nearest.scale, None)
    halves = packed_halves(codes.view(len(codes), -1, width))
    return Codes(halves, grid.scale.to(torch.bfloat16), grid.zero.to(torch.uint8))


def _grid(nearest: Codes, bits: int) -> _Grid:
    scale = nearest.scale.float()
    if bits == 8:
        return _Grid(scale[:, None], torch.zeros_like(scale[:, None]), -127, 127)
    assert nearest.zero_point is not None
    return _Grid(scale, nearest.zero_point.float(), 0, 15)


def _inverse_root(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U with Uᵀ U the inverse of the damped Hessian: row i, over its diagonal, says who takes up column i's error."""
    mean = hessian.diagonal().mean()
    hessian.diagonal().add_(damping * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    root: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return root
