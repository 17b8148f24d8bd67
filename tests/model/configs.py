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

# The choices of other families, which share no code with those above: each is shown in some public model.
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 66, "decoder_start_token_id": 1}
_BERT: dict[str, Any] = {**_GPT2, "intermediate_size": 40}
_PAIR: dict[str, Any] = {**_GPT2, "num_encoder_layers": 1, "src_vocab_size": 53, "intermediate_size": 40, **_TOKENS}
_CLASSES: dict[str, Any] = {
    **_BERT, "head": "classification", "tie_embeddings": False, "head_transform": None, "pad_token_id": None,
}  # fmt: skip
_GEMMA: dict[str, Any] = {
    **_LLAMA, "norm_placement": "both", "norm_weight_offset": 1.0, "activation": "geglu_tanh", "scale_embeddings": True,
    "tie_embeddings": True, "sliding_window": 4, "layer_types": ("sliding", "full"),
}  # fmt: skip
_LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 8,
}  # fmt: skip
FAMILY_CONFIGS = {
    "gemma2": TransformerConfig.llama(**_GEMMA, attention_softcap=4.0, logit_softcap=5.0),
    "gemma3": TransformerConfig.llama(
        **_GEMMA, qk_norm=True, rope_base=500.0, rope_scaling={"rope_type": "linear", "factor": 2.0}, local_rope_base=30.0
    ),
    "olmo2": TransformerConfig.llama(**_LLAMA, norm_placement="output", qk_norm=True, qk_norm_whole=True),
    "gpt-neox": TransformerConfig.gpt2(**_GPT2, positions="rope", rotary_dim=4, parallel=True, parallel_norms=2, tie_embeddings=False),
    "falcon-alibi": TransformerConfig.gpt2(
        **_GPT2, num_kv_heads=1, positions="alibi", alibi_bfloat16=True, alibi_scale=8**-0.5, parallel=True, attention_bias=False,
        mlp_bias=False,
    ),
    "bloom": TransformerConfig.gpt2(**_GPT2, positions="alibi", alibi_scale=0.5, embedding_norm=True, residual_from_norm=True),
    "longrope": TransformerConfig.llama(**_LLAMA, rope_base=50.0, rope_scaling=_LONGROPE),
    "dynamic-ntk": TransformerConfig.llama(
        **_LLAMA, rope_base=50.0, rope_scaling={"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
    ),
    "sinks-biases": TransformerConfig.llama(
        **_LLAMA, sinks=True, attention_bias=True, attention_output_bias=False, mlp_bias=True, activation="swiglu_clamped",
        activation_limit=0.5, sliding_window=4, layer_types=("full", "sliding"),
    ),
    "odd-ones": TransformerConfig.gpt2(
        **_GPT2, position_offset=2, type_vocab_size=3, scale_by_layer=True, head_bias=True, head_transform="tanh", logit_scale=0.5,
        activation="reglu", final_norm=False,
    ),
    "t5-positions-decoder": TransformerConfig.gpt2(**_GPT2, positions="t5", relative_buckets=6, relative_max_distance=9, activation="silu"),
    "bert": TransformerConfig.bert(**_BERT),
    "roberta": TransformerConfig.bert(**_BERT, position_offset=1, positions_skip_padding=True, type_vocab_size=1),
    "bert-classes": TransformerConfig.bert(**_CLASSES, pooler=True, num_labels=3, head_bias=True),
    "last-token-regression": TransformerConfig.bert(
        **{**_CLASSES, "head_transform": "relu"}, problem="regression", num_labels=1, pooling="last"
    ),
    "mean-vectors-window": TransformerConfig.bert(
        **{**_CLASSES, "head": "none"}, pooling="mean", positions="rope", sliding_window=3, norm="rms_norm", norm_placement="pre"
    ),
    "original": TransformerConfig.original(**_PAIR, head_bias=True),
    "t5": TransformerConfig.original(
        **{**_PAIR, "src_vocab_size": 67}, head_dim=16, positions="t5", relative_buckets=8, relative_max_distance=6, norm="rms_norm",
        norm_bias=False, norm_placement="pre", attention_bias=False, mlp_bias=False, softmax_scale=1.0, share_embeddings=True,
        tie_embeddings=True, logit_scale=32**-0.5, scale_embeddings=False, activation="geglu_tanh",
    ),
    "bart": TransformerConfig.original(
        **{**_PAIR, "src_vocab_size": 67}, positions="learned", position_offset=2, embedding_norm=True, share_embeddings=True,
        tie_embeddings=True, head_bias=True, activation="gelu",
    ),
    "pair-pre-norm-one-wide-head": TransformerConfig.original(
        **{**_PAIR, "num_heads": 1}, head_dim=264, sinusoidal_halves=True, norm_placement="pre", activation="silu"
    ),
}  # fmt: skip
EXPERT_CONFIGS = {
    "mixtral": TransformerConfig.llama(**_LLAMA, num_experts=4),
    "qwen2-moe": TransformerConfig.llama(
        **_LLAMA, num_experts=6, experts_per_token=3, expert_size=20, norm_topk_prob=False, shared_expert_size=24, shared_expert_gate=True,
        dense_layers=(1,),
    ),
    "gpt-oss": TransformerConfig.llama(
        **_LLAMA, num_experts=4, router_bias=True, mlp_bias=True, activation="swiglu_clamped", sinks=True, attention_bias=True
    ),
    "pair-of-experts": TransformerConfig.original(**_PAIR, num_experts=3, experts_per_token=1, norm_topk_prob=False, shared_expert_size=16),
}  # fmt: skip

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


def make_twin(model: Transformer, dtype: torch.dtype | None = None) -> Any:
    """The naive model with the same weights, in ``dtype`` (float64: the golden one)."""
    twin: Any = (reference.EncoderDecoder if model.config.is_encoder_decoder else reference.Transformer)(model.config)
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
