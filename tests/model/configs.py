"""Small configurations that between them use every choice, and models made from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer import Transformer, TransformerConfig, reference
from pytransformer.generation import KVCache

_GPT2: dict[str, Any] = {"vocab_size": 67, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_seqlen": 24}
_LLAMA: dict[str, Any] = {**_GPT2, "num_kv_heads": 2, "intermediate_size": 48}

CONFIGS = {
    "gpt2": TransformerConfig.gpt2(**_GPT2),
    "gpt2-untied-relu-no-bias": TransformerConfig.gpt2(
        **_GPT2, tie_embeddings=False, activation="relu", attention_bias=False, mlp_bias=False, norm_bias=False
    ),
    "original-post-norm-sinusoidal": TransformerConfig.gpt2(
        **_GPT2, positions="sinusoidal", norm_placement="post", activation="relu", scale_embeddings=True
    ),
    "llama": TransformerConfig.llama(**_LLAMA),
    "llama-qk-norm-head-dim": TransformerConfig.llama(**_LLAMA, qk_norm=True, head_dim=16, tie_embeddings=True),
    "llama-partial-interleaved": TransformerConfig.llama(
        **{**_LLAMA, "num_kv_heads": 1},
        head_dim=16,
        rotary_dim=8,
        rope_interleaved=True,
        rope_base=500.0,
        norm_placement="post",
    ),
    "mistral-window": TransformerConfig.llama(**_LLAMA, sliding_window=5),
    "gemma": TransformerConfig.llama(
        **_LLAMA,
        norm_weight_offset=1.0,
        activation="geglu_tanh",
        attention_softcap=4.0,
        logit_softcap=5.0,
        scale_embeddings=True,
        softmax_scale=0.3,
    ),
    "alibi-window-geglu": TransformerConfig.gpt2(**_GPT2, positions="alibi", sliding_window=6, activation="geglu"),
    "no-positions-gelu": TransformerConfig.gpt2(**_GPT2, positions="none", activation="gelu"),
    "rope-llama3-scaling": TransformerConfig.llama(
        **_LLAMA,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
}

# What the interpreted kernels are shown: each uses other ops and options, and is small enough for an interpreter.
TINY: dict[str, Any] = {"vocab_size": 31, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_seqlen": 16}
TINY_CONFIGS = {
    "gpt2": TransformerConfig.gpt2(**TINY),
    "llama-qk-norm-window": TransformerConfig.llama(
        **TINY, num_kv_heads=1, intermediate_size=24, qk_norm=True, sliding_window=3
    ),
}


def make_model(
    config: TransformerConfig, seed: int, device: torch.device, dtype: torch.dtype | None = None
) -> Transformer:
    """A model in evaluation mode whose every parameter is random, norms and biases too, so that none can be forgotten unseen."""
    torch.manual_seed(seed)
    model = Transformer(config, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else 0.15
            parameter.add_(torch.randn(parameter.shape, device=device).to(parameter.dtype), alpha=spread)
    return model.eval()


def make_twin(model: Transformer, dtype: torch.dtype | None = None) -> reference.Transformer:
    """The naive model with the same weights, in ``dtype`` (float64: the golden one)."""
    twin = reference.Transformer(model.config)
    twin.load_state_dict(model.state_dict())
    device = model.model.embed_tokens.weight.device
    return twin.to(device=device, dtype=model.model.embed_tokens.weight.dtype if dtype is None else dtype).eval()


def random_ids(config: TransformerConfig, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, shape, generator=generator).to(device)


def gradients(model: torch.nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Gradient of a fixed random projection of the logits with respect to every parameter, tied ones under the embedding's name."""
    logits = model(ids)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(logits.shape, generator=generator).to(logits)
    model.zero_grad()
    (logits * direction).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@torch.no_grad()
def cached_logits(model: Transformer, ids: Tensor, chunks: list[int], poison: float | None = None) -> Tensor:
    """Logits of every position, computed chunk after chunk through a KV cache. ``poison``: what the cache holds before."""
    weight = model.model.embed_tokens.weight
    cache = KVCache(model.config, ids.shape[0], ids.shape[1], device=ids.device, dtype=weight.dtype)
    if poison is not None:
        cache.k_cache.fill_(poison)
        cache.v_cache.fill_(poison)
    parts, start = [], 0
    for chunk in chunks:
        parts.append(model(ids[:, start : start + chunk], cache=cache))
        cache.advance(chunk)
        start += chunk
    assert start == ids.shape[1]
    return torch.cat(parts, dim=1)
