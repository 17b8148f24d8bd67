"""A model whose linear layers hold 8- or 4-bit codes: made from one in full precision, and made anew to be filled from a file.

Quantised are the projections of attention and feed-forward and the head, which is nearly all that a decoded token reads. Embeddings, norms,
biases and routers stay as they are, and so do the tensors that hold all experts of a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import nn

from pytransformer.nn import Linear, QuantizedLinear, RowBlocks
from pytransformer.nn.quantized import Codes, check_bits, round_to_nearest

from .config import TransformerConfig
from .heads import LMHead, QuantizedLMHead

if TYPE_CHECKING:
    from .transformer import Transformer

# Gives the codes of a layer, by its name in the model.
Quantizer = Callable[[str, nn.Module], Codes]


def quantize(
    model: Transformer, bits: int = 8, *, group_size: int = 64, quantizer: Quantizer | None = None
) -> Transformer:
    """Puts codes in the place of the model's linear layers; the model itself is changed, and returned.

    Memory: a quarter of float32 (half of bfloat16) with 8 bits, about an eighth with 4: 4.375 bits a weight in groups of 64. A head that
    was tied to the embedding becomes codes of its own beside it.

    Args:
        model: whose weights have values; one that is quantised already is refused.
        bits: 8, a scale for each row; or 4, a scale and zero point for each group of columns.
        group_size: 32, 64 or 128, with 4 bits; it must divide the width of every layer's input.
        quantizer: of a layer's name and the layer, its codes; by default each weight is rounded to the nearest.
            :func:`pytransformer.model.gptq.gptq` makes one from calibration text.

    Raises:
        ValueError: bits or a group size that there are not or that do not divide a width; a weight that is not finite or has no values; a
            model that is quantised. The model is as it was.
    """
    check_bits(bits, group_size)
    if model.config.quantization is not None:
        raise ValueError(
            f"model must hold its weights in full precision, it is quantised to {model.config.quantization!r}"
        )
    layers = dict(layers_of(model))
    made = {}
    for name, layer in layers.items():
        if any(parameter.is_meta for parameter in layer.parameters()):
            raise ValueError(f"{name} is on the meta device and has no values to quantise")
        try:
            check_bits(bits, group_size, layer.in_features)
            codes = quantizer(name, layer) if quantizer else round_to_nearest(layer.weight, bits, group_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        made[name] = _empty(layer, bits, group_size).set_codes(codes)
    _put(model, made)
    model.config = dataclasses.replace(model.config, quantization="int8" if bits == 8 else f"int4-{group_size}")
    return model


def replace_layers(model: nn.Module, config: TransformerConfig) -> None:
    """Puts layers without codes yet in the place of linear ones, as a quantised configuration says, for a state_dict to fill."""
    if config.quantization is not None:
        bits, group_size = parse(config.quantization)
        _put(model, {name: _empty(layer, bits, group_size) for name, layer in layers_of(model)})


def parse(quantization: str) -> tuple[int, int]:
    """(bits, group size) of a configuration's word for them; 8 bits have rows for groups, and say 64."""
    bits, _, group_size = quantization.removeprefix("int").partition("-")
    return int(bits), int(group_size or 64)


def names_of_codes(model: nn.Module) -> set[str]:
    """The tensors of a state_dict that keep their dtype whatever the model's is."""
    return {
        f"{place}.{kind}"
        for place, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
        for kind in ("weight", "scale", "zero_point")
    }


def codes_not_counted(model: nn.Module) -> int:
    """Weights that codes stand for, less the elements of the tensors that hold them."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return sum(
        layer.in_features * layer.out_features - sum(p.numel() for p in layer.parameters(recurse=False))
        + (0 if layer.bias is None else layer.bias.numel())
        for layer in layers
    )  # fmt: skip


def memory_of(model: nn.Module) -> int:
    """Bytes of the model's parameters, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def layers_of(model: nn.Module) -> Iterator[tuple[str, Linear | RowBlocks]]:
    """Name and layer of all that are quantised. A subclass may do anything with its weight, so exactly these."""
    for name, module in model.named_modules():
        if type(module) in (Linear, RowBlocks, LMHead):
            yield name, module


def _empty(layer: Linear | RowBlocks, bits: int, group_size: int) -> QuantizedLinear:
    kind = QuantizedLMHead if isinstance(layer, LMHead) else QuantizedLinear
    return kind.like(layer, bits, group_size)


def _put(model: nn.Module, layers: dict[str, QuantizedLinear]) -> None:
    # Deepest first: a head's own layer is replaced in the head that is about to go, and the new head must have the new one.
    for name, layer in sorted(layers.items(), key=lambda item: -item[0].count(".")):
        place, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(place), leaf, layer)
        for kind in ("transform", "transform_norm"):
            if isinstance(layer, QuantizedLMHead) and f"{name}.{kind}" in layers:
                setattr(layer, kind, layers[f"{name}.{kind}"])
