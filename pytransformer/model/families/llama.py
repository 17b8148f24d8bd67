"""Llama 2 and 3.x (Touvron et al. 2023; Grattafiori et al. 2024), and what its many relatives share with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, Field, Harmless, Used
from .parts import read_labels, write_labels
from .rope import FULL, SLIDING, read_rope, write_rope
from .weights import QKV, Halves, Weight, affine, same

# Their names of the gate's activation -> our gated feed-forward; the first of each of ours is the one that is written.
ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
    "gelu_fast": "geglu_tanh",
    "gelu_accurate": "geglu_tanh",
    "gelu_python_tanh": "geglu_tanh",
    "gelu": "geglu",
    "gelu_python": "geglu",
    "relu": "reglu",
}
LAYER_TYPES = {FULL: "full", SLIDING: "sliding"}

# Fields that every relative has, most with these defaults, and the older spelling of RoPE.
COMMON_FIELDS: dict[str, Field] = {
    "vocab_size": Used(32000),
    "hidden_size": Used(4096),
    "intermediate_size": Used(11008),
    "num_hidden_layers": Used(32),
    "num_attention_heads": Used(32),
    "num_key_value_heads": Used(),
    "head_dim": Used(),
    "hidden_act": Used("silu"),
    "max_position_embeddings": Used(2048),
    "rms_norm_eps": Used(1e-6),
    "attention_dropout": Used(0.0),
    "tie_word_embeddings": Used(False),
    "rope_parameters": Used(),
    "rope_theta": Used(),
    "rope_scaling": Used(),
    "partial_rotary_factor": Used(),
    "original_max_position_embeddings": Used(),
}
# Of these, what their configuration class does not have today, but reads.
OLDER_FIELDS = ("rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings")

IGNORED = (r"rotary_emb\.inv_freq$",)
PREFIXES = ("model.", "")


def classes(name: str, *, base: str = "", classifier: str = "") -> dict[str, dict[str, Any]]:
    """The classes of a family called ``name`` that are served: language model, base model, classifier of a sequence."""
    return {
        f"{name}ForCausalLM": {"head": "lm"},
        base or f"{name}Model": {"head": "none", "tie_embeddings": False},
        classifier or f"{name}ForSequenceClassification": {
            "head": "classification",
            "pooling": "last",
            "tie_embeddings": False,
        },
    }


def weights(
    *,
    norms: Mapping[str, str] | None = None,
    qk_norm: bool = False,
    fused: bool = False,
) -> tuple[Weight, ...]:
    """The table of a relative.

    Args:
        norms: our names of the norms in a layer -> theirs; ``None`` = Llama's.
        qk_norm: q and k have norms.
        fused: q, k and v are one tensor in the file, and gate and up another (Phi-3).
    """
    layer, theirs = "model.layers.{i}", "model.layers.{i}"
    attention, feed_forward = f"{theirs}.self_attn", f"{theirs}.mlp"
    norms = norms or {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
    table = [same("model.embed_tokens.weight", "model.embed_tokens.weight")]
    table += [same(f"{layer}.{ours}.weight", f"{theirs}.{name}.weight") for ours, name in norms.items()]
    for kind in ("weight", "bias"):
        if fused:
            table.append(same(f"{layer}.attention.qkv_proj.{kind}", f"{attention}.qkv_proj.{kind}"))
            table.append(same(f"{layer}.feed_forward.gate_up_proj.{kind}", f"{feed_forward}.gate_up_proj.{kind}"))
            continue
        qkv = tuple(f"{attention}.{part}_proj.{kind}" for part in "qkv")
        table.append(Weight(f"{layer}.attention.qkv_proj.{kind}", qkv, QKV()))
        gate_up = tuple(f"{feed_forward}.{part}_proj.{kind}" for part in ("gate", "up"))
        table.append(Weight(f"{layer}.feed_forward.gate_up_proj.{kind}", gate_up, Halves()))
    table += affine(f"{layer}.attention.out_proj", f"{attention}.o_proj")
    table += affine(f"{layer}.feed_forward.down_proj", f"{feed_forward}.down_proj")
    if qk_norm:
        table += [
            same(f"{layer}.attention.{part}_norm.weight", f"{attention}.{part}_norm.weight") for part in ("q", "k")
        ]
    table.append(same("model.norm.weight", "model.norm.weight"))
    table.append(same("lm_head.weight", "lm_head.weight"))
    table.append(same("classifier.weight", "score.weight"))
    return tuple(table)


def head_width(values: Mapping[str, Any]) -> int:
    """``head_dim``, where it is given."""
    return int(values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"])


def read_shape(values: Mapping[str, Any], *, activation: str = "hidden_act") -> dict[str, Any]:
    """What all relatives have: sizes, RMSNorm, gated feed-forward, tokens, labels; without positions and windows."""
    act = values[activation]
    if act not in ACTIVATIONS:
        raise ValueError(f"{activation} must be one of {', '.join(map(repr, ACTIVATIONS))}, got {act!r}")
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    return {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_width(values),
        "causal": bool(values["is_causal"]),
        "norm": "rms_norm",
        "norm_bias": False,
        "norm_eps": values["rms_norm_eps"],
        "activation": ACTIVATIONS[act],
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": values["attention_dropout"] or 0.0,
        "tie_embeddings": values["tie_word_embeddings"],
        "initializer_range": values["initializer_range"],
        **read_tokens(values),
        **read_labels(values),
    }


def write_shape(config: TransformerConfig, *, activation: str = "hidden_act") -> dict[str, Any]:
    """The inverse of :func:`read_shape`."""
    written = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        activation: next((name for name, ours in ACTIVATIONS.items() if ours == config.activation), config.activation),
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.initializer_range,
        **write_tokens(config),
        **write_labels(config),
    }
    if config.head == "lm":  # nothing to tie for the others, so the family's default does
        written["tie_word_embeddings"] = config.tie_embeddings
    return written if config.causal else {**written, "is_causal": False}


def read_tokens(values: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens. Old files have a padding token of -1 where there is none."""
    padding = values["pad_token_id"]
    end = values["eos_token_id"]
    return {
        "bos_token_id": values["bos_token_id"],
        "eos_token_id": tuple(end) if isinstance(end, list) else end,
        "pad_token_id": None if padding is not None and padding < 0 else padding,
    }


def write_tokens(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of :func:`read_tokens`."""
    end = config.eos_token_id
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(end) if isinstance(end, tuple) else end,
        "pad_token_id": config.pad_token_id,
    }


def check_heads_share(family: str, config: TransformerConfig) -> None:
    """ValueError where the configuration class wants a hidden size that is a multiple of the heads, whatever head_dim is."""
    if config.hidden_size % config.num_heads:
        raise ValueError(
            f"the family {family} cannot express this model: hidden_size must be a multiple of num_heads, "
            f"got {config.hidden_size} and {config.num_heads}"
        )


def read_window(values: Mapping[str, Any], *, window: int | None, causal: bool) -> dict[str, Any]:
    """The sliding window, and which layers have it: ``layer_types`` of theirs, all if they have none.

    With ``is_causal`` false their window is the largest distance, at either side; ours counts the token itself.
    """
    types = values.get("layer_types")
    if types is not None and not isinstance(types, (list, tuple)):
        raise ValueError(f"layer_types must be a list with the kind of each layer, got {types!r}")
    if types is not None and (unknown := sorted(set(types) - set(LAYER_TYPES))):
        raise ValueError(f"layer_types must be {' or '.join(LAYER_TYPES)}, got {', '.join(map(str, unknown))}")
    return {
        "sliding_window": window if window is None or causal else window + 1,
        "layer_types": None if types is None else tuple(LAYER_TYPES[kind] for kind in types),
    }


def write_window(config: TransformerConfig) -> int | None:
    """Their ``sliding_window``."""
    return config.sliding_window if config.sliding_window is None or config.causal else config.sliding_window - 1


def write_layer_types(config: TransformerConfig) -> list[str]:
    """Their ``layer_types``."""
    names = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
    return [names[kind] for kind in config.layer_types]


def read(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`."""
    shape = read_shape(values)
    biases = {name: values[name] for name in ("attention_bias", "mlp_bias")}
    return {**shape, **biases, **read_rope(values, shape["head_dim"])}


def write(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    check_heads_share("llama", config)
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return {**write_shape(config), **biases, **write_rope(config)}


LLAMA = Family(
    name="llama",
    classes=classes("Llama"),
    fields={
        **COMMON_FIELDS,
        "bos_token_id": Used(1),
        "eos_token_id": Used(2),
        "attention_bias": Used(False),
        "mlp_bias": Used(False),
        "pretraining_tp": Harmless(1),
    },
    read=read,
    write=write,
    weights=weights(),
    prefixes=PREFIXES,
    ignored=IGNORED,
)

FAMILIES = (LLAMA,)
