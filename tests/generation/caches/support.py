"""What the tests of the caches share."""

from __future__ import annotations

import torch

from tests.model.configs import CONFIGS, EXPERT_CONFIGS, FAMILY_CONFIGS


def serves(config) -> bool:
    """Whether a model of this configuration generates with a cache."""
    positions = config.positions not in ("relative_key", "relative_key_query") and not config.positions_skip_padding
    return config.head == "lm" and config.causal and positions


ALL_CONFIGS = {**CONFIGS, **FAMILY_CONFIGS, **EXPERT_CONFIGS}
GENERATING = {name: config for name, config in ALL_CONFIGS.items() if serves(config)}


def logits_through(model, cache, ids, memory=None):
    """Logits of every position: a prefill of 5, one of 3, then token by token."""
    parts, start = [], 0
    if memory is not None:
        cache.memory_kv = model.model.keys_and_values(memory)
    for chunk in (5, 3, 1, 1):
        parts.append(model.lm_head(model.model(ids[:, start : start + chunk], cache=cache)))
        cache.advance(chunk)
        start += chunk
    return torch.cat(parts, dim=1)
