"""Evaluation mode for as long as a model generates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The modules in evaluation mode, and afterwards each as it was."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
