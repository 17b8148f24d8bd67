"""What is done to a model once before decoding: on a CPU, packing its linear layers for few rows."""

from __future__ import annotations

from torch import nn

from pytransformer.nn import Linear, QuantizedLinear, RowBlocks

# Packing takes about as long as it saves in so many tokens, whatever the size of the model (GPT-2 124M: 0.4 s, then 9 ms of 37 ms a token).
WORTHWHILE_TOKENS = 48
QUANTIZED_TOKENS = 4


def prepare_for_decoding(model: nn.Module, rows: int = 1) -> int:
    """Packs every linear layer of ``model``, the head included, for inputs of ``rows`` rows (the batch size); what is packed stays so.

    When everything is packed already this takes the time of about one token, because each weight is read to see that it has not changed.
    The packed copies take the memory of the weights once more (with MKL a fifth more than that); :func:`release` frees them.

    Returns:
        Number of layers that hold a packed weight now; 0 where packing does not serve (a GPU, float16, a build of torch without it).
    """
    return sum(layer.pack(rows) for layer in _layers(model))


def release(model: nn.Module) -> None:
    """Frees the packed copies of every linear layer of ``model``."""
    for layer in _layers(model):
        layer.unpack()


def prepare(model: nn.Module, rows: int, new_tokens: int, pack_weights: bool | None) -> None:
    """Packs or releases as the option ``pack_weights`` of :func:`pytransformer.generation.generate` says."""
    if pack_weights is None:
        # Copies that are there must be brought up to date, or they would be used as they are.
        layers = _layers(model)
        # Codes that are not packed are taken apart in every step, which soon takes longer than packing them once.
        worthwhile = (
            QUANTIZED_TOKENS if any(isinstance(layer, QuantizedLinear) for layer in layers) else WORTHWHILE_TOKENS
        )
        pack_weights = new_tokens >= worthwhile or any(layer.is_packed for layer in layers)
    if pack_weights:
        prepare_for_decoding(model, rows)
    else:
        release(model)


def _layers(model: nn.Module) -> list[Linear | RowBlocks | QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, (Linear, RowBlocks, QuantizedLinear))]
