"""What goes through torch's dispatcher: the ops that do, and the claim that none does."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class SeenOps(TorchDispatchMode):
    """Names of the ops that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _Refused:
    def __getattr__(self, name: str) -> object:
        raise AssertionError("went through the dispatcher")


def refuse_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a call of a registered op of ours fails the test."""
    monkeypatch.setattr(torch.ops, "pytransformer", _Refused())
