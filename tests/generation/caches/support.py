"""What the tests of the caches share."""

from __future__ import annotations

from tests.model.configs import CONFIGS, EXPERT_CONFIGS, FAMILY_CONFIGS


def serves(config) -> bool:
    """Whether a model of this configuration generates with a cache."""
    positions = config.positions not in ("relative_key", "relative_key_query") and not config.positions_skip_padding
    return config.head == "lm" and config.causal and positions


ALL_CONFIGS = {**CONFIGS, **FAMILY_CONFIGS, **EXPERT_CONFIGS}
GENERATING = {name: config for name, config in ALL_CONFIGS.items() if serves(config)}
