"""What a configuration refuses, each with the name of the field, its value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TransformerConfig

GATED_ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_clamped")
PLAIN_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
CHOICES = {
    "architecture": ("decoder", "encoder", "encoder-decoder"),
    "positions": ("learned", "sinusoidal", "rope", "alibi", "t5", "relative_key", "relative_key_query", "none"),
    "norm": ("layer_norm", "rms_norm"),
    "norm_placement": ("pre", "post", "both", "output"),
    "activation": (*PLAIN_ACTIVATIONS, *GATED_ACTIVATIONS),
    "head": ("lm", "masked_lm", "classification", "none"),
    "head_transform": (None, "tanh", *PLAIN_ACTIVATIONS),
    "problem": ("multi_class", "multi_label", "binary", "regression"),
    "pooling": (None, "first", "last", "mean"),
    "parallel_norms": (1, 2),
    "quantization": (None, "int8", "int4-32", "int4-64", "int4-128"),
}
_FLAGS = (
    "causal", "share_embeddings", "positions_skip_padding", "sinusoidal_halves", "rope_interleaved", "alibi_bfloat16", "norm_bias",
    "final_norm", "embedding_norm", "parallel", "residual_from_norm", "qk_norm", "qk_norm_whole", "attention_bias",
    "attention_output_bias", "mlp_bias", "scale_by_layer", "sinks", "norm_topk_prob", "router_bias", "shared_expert_gate", "head_bias",
    "pooler", "tie_embeddings", "scale_embeddings",
)  # fmt: skip
_COUNTS = (
    "num_encoder_layers", "encoder_num_heads", "encoder_intermediate_size", "src_vocab_size", "intermediate_size", "experts_per_token",
    "expert_size", "num_labels", "relative_buckets", "relative_max_distance",
)  # fmt: skip
_COUNTS_OR_NONE = ("position_offset", "num_experts", "shared_expert_size", "type_vocab_size")
_RATES = ("embedding_dropout", "attention_dropout", "residual_dropout", "feed_forward_dropout", "head_dropout")
_ABOVE_ZERO = ("rope_base", "norm_eps", "initializer_range", "activation_limit", "activation_alpha", "alibi_scale")
_AT_LEAST_ZERO = ("attention_softcap", "logit_softcap", "router_aux_coef", "router_z_coef")


def check_sizes(config: TransformerConfig) -> None:
    """What derived fields are computed from."""
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_seqlen"):
        _check_int(name, getattr(config, name), minimum=1)
    if config.head_dim is None and config.hidden_size % config.num_heads:
        raise ValueError(
            f"hidden_size must be a multiple of num_heads when head_dim is not given, got {config.hidden_size} and {config.num_heads}"
        )


def check(config: TransformerConfig) -> None:
    """Everything else, once derived fields are filled in."""
    for name, allowed in CHOICES.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    for name in _FLAGS:
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(config, name)!r}")
    for name in _COUNTS:
        _check_int(name, getattr(config, name), minimum=1)
    for name in _COUNTS_OR_NONE:
        _check_int(name, getattr(config, name), minimum=0)
    _check_heads(config)
    _check_numbers(config)
    _check_layers(config)
    _check_combinations(config)
    _check_tokens(config)
    if config.is_encoder_decoder:
        _check_encoder(config)


def _check_encoder(config: TransformerConfig) -> None:
    """The encoder's side, which has fields of its own and must be a model too."""
    try:
        _ = config.encoder
    except (TypeError, ValueError) as error:
        sizes = f"encoder_num_heads = {config.encoder_num_heads}, num_encoder_layers = {config.num_encoder_layers}"
        raise type(error)(f"{error} (in the encoder: {sizes})") from error


def _check_heads(config: TransformerConfig) -> None:
    _check_int("num_kv_heads", config.num_kv_heads, minimum=1)
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, got {config.num_heads} and {config.num_kv_heads}"
        )
    _check_int("head_dim", config.head_dim, minimum=1)
    _check_int("rotary_dim", config.rotary_dim, minimum=1)
    rotates = config.positions == "rope" or config.rotary_dim != config.head_dim
    if rotates and (config.rotary_dim % 2 or config.rotary_dim > config.head_dim):
        raise ValueError(f"rotary_dim must be even and at most head_dim ({config.head_dim}), got {config.rotary_dim}")
    for name in ("rope_scaling", "local_rope_scaling", "family_fields"):
        value = getattr(config, name)
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a mapping or None, got {value!r}")


def _check_numbers(config: TransformerConfig) -> None:
    for name in _RATES:
        rate = _check_number(name, getattr(config, name))
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{name} must be at least 0 and below 1, got {rate}")
    for name in _ABOVE_ZERO:
        if not _check_number(name, getattr(config, name)) > 0.0:
            raise ValueError(f"{name} must be above 0, got {getattr(config, name)}")
    for name in _AT_LEAST_ZERO:
        if _check_number(name, getattr(config, name)) < 0.0:
            raise ValueError(f"{name} must be at least 0 (0 = none), got {getattr(config, name)}")
    for name in ("norm_weight_offset", "logit_scale"):
        _check_number(name, getattr(config, name))
    for name in ("softmax_scale", "local_rope_base"):
        if getattr(config, name) is not None:
            _check_number(name, getattr(config, name))


def _check_layers(config: TransformerConfig) -> None:
    if config.sliding_window is not None:
        _check_int("sliding_window", config.sliding_window, minimum=1)
    types = config.layer_types
    if not isinstance(types, tuple) or len(types) != config.num_layers or not set(types) <= {"full", "sliding"}:
        raise ValueError(
            f"layer_types must be 'full' or 'sliding' for each of the {config.num_layers} layers, got {types!r}"
        )
    if "sliding" in types and config.sliding_window is None:
        raise ValueError("layer_types has sliding layers, so sliding_window must be given, got None")
    if not isinstance(config.dense_layers, tuple):
        raise TypeError(f"dense_layers must be a tuple of layers, got {config.dense_layers!r}")
    for layer in config.dense_layers:
        _check_int("dense_layers", layer, minimum=0)
    if config.num_experts and config.experts_per_token > config.num_experts:
        raise ValueError(
            f"experts_per_token must be at most num_experts ({config.num_experts}), got {config.experts_per_token}"
        )


def _check_combinations(config: TransformerConfig) -> None:
    if config.num_experts and config.shared_expert_gate and not config.shared_expert_size:
        raise ValueError("shared_expert_gate needs a shared expert, got shared_expert_size=0")
    if config.positions == "sinusoidal" and config.hidden_size % 2:
        raise ValueError(f"hidden_size must be even for sinusoidal positions, got {config.hidden_size}")
    if config.positions == "t5":
        _check_buckets(config)
    whole = config.architecture == "encoder" and config.num_kv_heads == config.num_heads
    if config.positions.startswith("relative_key") and not whole:
        raise ValueError(
            f"positions={config.positions!r} is for encoders with num_kv_heads = num_heads, got architecture "
            f"{config.architecture!r}, {config.num_kv_heads} and {config.num_heads}"
        )
    if config.norm_weight_offset and config.norm == "layer_norm":
        raise ValueError(
            f"norm_weight_offset is for norm='rms_norm', got {config.norm_weight_offset} with 'layer_norm'"
        )
    for name in ("parallel", "residual_from_norm"):
        if getattr(config, name) and config.norm_placement != "pre":
            raise ValueError(f"{name} is for norm_placement='pre', got {config.norm_placement!r}")
    if config.parallel and config.residual_from_norm:
        raise ValueError("residual_from_norm is for sublayers one after the other, got parallel=True")
    if config.parallel and config.is_encoder_decoder:
        raise ValueError("parallel is for models without cross-attention, got architecture 'encoder-decoder'")
    if config.qk_norm_whole and not config.qk_norm:
        raise ValueError("qk_norm_whole needs qk_norm=True")
    if config.positions_skip_padding and config.pad_token_id is None:
        raise ValueError("positions_skip_padding needs a pad_token_id, got None")
    if config.positions_skip_padding and config.positions not in (
        "learned",
        "sinusoidal",
        "relative_key",
        "relative_key_query",
    ):
        raise ValueError(f"positions_skip_padding is for positions in a table, got positions={config.positions!r}")
    if config.positions_skip_padding and config.positions in ("learned", "sinusoidal") and not config.position_offset:
        raise ValueError("positions_skip_padding needs a position_offset of at least 1, a row for padding, got 0")
    if config.share_embeddings and config.src_vocab_size != config.vocab_size:
        raise ValueError(
            f"share_embeddings needs src_vocab_size = vocab_size, got {config.src_vocab_size} and {config.vocab_size}"
        )
    heads = config.encoder_num_heads
    if (
        config.is_encoder_decoder
        and config.head_dim * config.num_heads == config.hidden_size
        and config.hidden_size % heads
    ):
        raise ValueError(f"hidden_size must be a multiple of encoder_num_heads, got {config.hidden_size} and {heads}")
    if config.is_encoder_decoder and config.head not in ("lm", "none"):
        raise ValueError(f"head must be 'lm' or 'none' for an encoder-decoder, got {config.head!r}")
    if config.pooler and (config.head in ("lm", "masked_lm") or config.is_encoder_decoder):
        raise ValueError(
            f"pooler is for vectors of sequences (head 'classification' or 'none'), got head={config.head!r}, "
            f"architecture={config.architecture!r}"
        )
    if config.tie_embeddings and config.head not in ("lm", "masked_lm"):
        raise ValueError(f"tie_embeddings is for heads that predict tokens, got head={config.head!r}")


def _check_buckets(config: TransformerConfig) -> None:
    """T5's buckets: the first half of a direction's holds one distance each, the rest those up to the largest, which must lie beyond."""
    both = config.is_encoder_decoder or not config.causal
    directions = 2 if both else 1
    if config.relative_buckets < 2 * directions:
        raise ValueError(
            f"relative_buckets must be at least {2 * directions}, two for each direction, got {config.relative_buckets}"
        )
    # A decoder spends all of them on one direction.
    exact = config.relative_buckets // (2 if config.causal else 4)
    if config.relative_max_distance <= exact:
        raise ValueError(
            f"relative_max_distance must be above {exact}, the distances that have one of the {config.relative_buckets} buckets each, "
            f"got {config.relative_max_distance}"
        )


def _check_tokens(config: TransformerConfig) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        value = getattr(config, name)
        if value is None:
            continue
        for token in value if name == "eos_token_id" and isinstance(value, tuple) else (value,):
            _check_int(name, token, minimum=0)
            if token >= config.vocab_size:
                raise ValueError(f"{name} must be below vocab_size ({config.vocab_size}), got {token}")


def _check_int(name: str, value: Any, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _check_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
