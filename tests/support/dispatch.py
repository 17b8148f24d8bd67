"""What goes through torch's dispatcher: the ops that do, and the claim that none does."""

from __future__ import annotations

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from pytransformer.ops.registered import REGISTERED


class SeenOps(TorchDispatchMode):
    """Names of the ops that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _refuse(*args: object) -> None:
    raise AssertionError("went through the dispatcher")


def refuse_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a call of a registered op of ours fails the test."""
    for op in REGISTERED:
        monkeypatch.setattr(op, "op", _refuse)
