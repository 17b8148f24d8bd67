"""What is done to a model once before decoding: on a CPU, packing its linear layers for single rows."""

from __future__ import annotations

from torch import nn

from pytransformer.nn import Linear


def prepare_for_decoding(model: nn.Module, rows: int = 1) -> int:
    """Packs every linear layer, the head included, for inputs of ``rows`` rows (the batch size); layers that are packed stay so.

    Takes a few milliseconds when everything is packed already (each weight is read once, to see that it has not changed).

    Returns:
        Number of layers that hold a packed weight now; 0 where packing does not serve (a GPU, float16, a build of torch without it).
    """
    return sum(module.pack(rows) for module in model.modules() if isinstance(module, Linear))
