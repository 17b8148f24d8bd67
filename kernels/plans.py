"""What was worked out for one call, kept for the calls that are like it. Imports no Triton, so that the ops may look here first."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Generic, TypeVar

from torch import Tensor

Plan = TypeVar("Plan")
_MOST_PLANS = 1024


def properties(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """All that a launch, and the checks before it, may ask of a tensor beside its values and its address.

    Raises:
        RuntimeError: a layout without strides.
    """
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


class Plans(Generic[Plan]):
    """Plans by key: a tuple of everything that they depend on."""

    __slots__ = ("_plans", "get")

    def __init__(self) -> None:
        self._plans: dict[Hashable, Plan] = {}
        self.get = self._plans.get

    def add(self, key: Hashable, plan: Plan) -> Plan:
        """Keeps ``plan`` and returns it; when there are too many, as with ever new lengths, it begins anew."""
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        self._plans[key] = plan
        return plan
