"""What the code of a model makes of its masks, told from its configuration and its own declarations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

_ADDITIVE: dict[type, bool] = {}


def takes_additive_masks(config: Any) -> bool:
    """Whether the code of this configuration's models was written for "eager" alone, whose masks are floating and added to the scores.

    A model that serves "sdpa" (``_supports_sdpa``) knows boolean masks, and that None means what its modules' ``is_causal`` says. One that
    does not has only ever seen eager's: its layers may add to a mask, or extend it by a bias in the mask's dtype, and None hides nothing.
    """
    kind = type(config)
    if torch.compiler.is_compiling():  # what is looked up would be guarded
        return bool(_ask_classes(kind))
    if kind not in _ADDITIVE:
        _ADDITIVE[kind] = _ask_classes(kind)
    return _ADDITIVE[kind]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _ask_classes(kind: type) -> bool:
    for config_class in kind.__mro__:  # a configuration may be derived from that of a model
        served = [model._supports_sdpa for model in _subclasses(PreTrainedModel) if model.config_class is config_class]
        if served:
            return not any(served)
    return False


def _subclasses(parent: type[Any]) -> Iterator[type[Any]]:
    for child in parent.__subclasses__():
        yield child
        yield from _subclasses(child)
