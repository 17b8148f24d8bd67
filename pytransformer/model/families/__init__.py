"""Public families of checkpoints (Hugging Face layout): one declarative, reversible mapping each."""

from __future__ import annotations

from . import (  # isort: skip
    bart, bert, bloom, distilbert, falcon, gemma, glm, gpt2, gpt_neox, gpt_oss, llama, marian, mistral, mixtral, olmo2, phi3, qwen,
    qwen_moe, roberta, t5,
)  # fmt: skip
from .family import CheckpointError, Family, read_config, write_config

# Each module holds one or several families in FAMILIES.
_MODULES: tuple[object, ...] = (
    llama, mistral, qwen, phi3, gemma, olmo2, gpt2, gpt_neox, falcon, bloom, glm, mixtral, qwen_moe, gpt_oss, bert, distilbert, roberta,
    t5, bart, marian,
)  # fmt: skip

FAMILIES: dict[str, Family] = {family.name: family for module in _MODULES for family in module.FAMILIES}  # type: ignore[attr-defined]

__all__ = ["FAMILIES", "CheckpointError", "Family", "find_family", "read_config", "write_config"]


def find_family(model_type: object) -> Family:
    """The family of a ``model_type``; CheckpointError, with those that are known, for another."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(f"model_type must be one of {', '.join(sorted(FAMILIES))}, got {model_type!r}")
    return family
