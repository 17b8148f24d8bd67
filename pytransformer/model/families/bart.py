"""BART (Lewis et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, Field, Harmless, Refused, Used
from .parts import GENERATION, read_activation, with_aliases, write_activation
from .weights import QKV, First, Halves, Row, Weight, affine, same

CLASSES: dict[str, dict[str, Any]] = {
    "BartForConditionalGeneration": {"head": "lm"},
    "BartModel": {"head": "none", "head_bias": False},
}

_ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "encoder_attention_heads",
    "num_hidden_layers": "encoder_layers",
}
# Of BART and of Marian.
FIELDS: dict[str, Field] = {
    **GENERATION,
    "vocab_size": Used(50265),
    "max_position_embeddings": Used(1024),
    "encoder_layers": Used(12),
    "encoder_ffn_dim": Used(4096),
    "encoder_attention_heads": Used(16),
    "decoder_layers": Used(12),
    "decoder_ffn_dim": Used(4096),
    "decoder_attention_heads": Used(16),
    **{name: Used() for name in _ALIASES},
    "encoder_layerdrop": Harmless(0.0),  # active in training only, where no layer is dropped here
    "decoder_layerdrop": Harmless(0.0),
    "activation_function": Used("gelu"),
    "d_model": Used(1024),
    "dropout": Used(0.1),
    "attention_dropout": Used(0.0),
    "activation_dropout": Used(0.0),
    "init_std": Used(0.02),
    "classifier_dropout": Harmless(0.0),
    "classif_dropout": Harmless(0.0),
    "scale_embedding": Used(False),
    "pad_token_id": Used(1),
    "bos_token_id": Used(0),
    "eos_token_id": Used(2),
    "is_encoder_decoder": Harmless(True),
    "decoder_start_token_id": Used(2),
    "forced_eos_token_id": Harmless(2),
    # Ours: false where the embeddings are one and the head is another matrix, which transformers sees by the tensors alone.
    "tie_head": Used(True),
    "num_labels": Harmless(),
    "problem_type": Harmless(),
    "gradient_checkpointing": Harmless(False),
    "force_bos_token_to_be_generated": Harmless(),
    "output_past": Harmless(),
    # Choices of the first releases, before what differs became a family of its own.
    "normalize_before": Refused((False, None), "norms before the sublayers are another family's"),
    "add_final_layer_norm": Refused((False, None), "a norm after the last layer is another family's"),
    "add_bias_logits": Refused((False, None), "the bias of the logits is final_logits_bias"),
    "normalize_embedding": Refused((True, None), "BART has a norm after the embeddings"),
    "static_position_embeddings": Refused((False, None), "BART's positions are learned"),
    "extra_pos_embeddings": Refused((2, None), "BART's positions begin in row 2 of their table"),
}


def read_stacks(values: Mapping[str, Any]) -> dict[str, Any]:
    """What BART and Marian have in common."""
    values = with_aliases(values, _ALIASES)
    return {
        "architecture": "encoder-decoder",
        "causal": bool(values["is_causal"]),
        "vocab_size": values["vocab_size"],
        "hidden_size": values["d_model"],
        "num_layers": values["decoder_layers"],
        "num_heads": values["decoder_attention_heads"],
        "intermediate_size": values["decoder_ffn_dim"],
        "num_encoder_layers": values["encoder_layers"],
        "encoder_num_heads": values["encoder_attention_heads"],
        "encoder_intermediate_size": values["encoder_ffn_dim"],
        "max_seqlen": values["max_position_embeddings"],
        "share_embeddings": values["tie_word_embeddings"],
        "norm_placement": "post",
        "activation": read_activation("activation_function", values["activation_function"]),
        "scale_embeddings": values["scale_embedding"],
        "embedding_dropout": values["dropout"],
        "residual_dropout": values["dropout"],
        "attention_dropout": values["attention_dropout"],
        "feed_forward_dropout": values["activation_dropout"],
        "head_bias": True,
        "initializer_range": values["init_std"],
        "bos_token_id": values["bos_token_id"],
        "eos_token_id": values["eos_token_id"],
        "pad_token_id": values["pad_token_id"],
        "decoder_start_token_id": values["decoder_start_token_id"],
    }


def write_stacks(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of :func:`read_stacks`."""
    values = {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "decoder_layers": config.num_layers,
        "decoder_attention_heads": config.num_heads,
        "decoder_ffn_dim": config.intermediate_size,
        "encoder_layers": config.num_encoder_layers,
        "encoder_attention_heads": config.encoder_num_heads,
        "encoder_ffn_dim": config.encoder_intermediate_size,
        "max_position_embeddings": config.max_seqlen,
        "activation_function": write_activation(config.activation),
        "scale_embedding": config.scale_embeddings,
        "dropout": config.residual_dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.feed_forward_dropout,
        "init_std": config.initializer_range,
        "is_encoder_decoder": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
    }
    if config.share_embeddings and not config.tie_embeddings and config.head != "none":
        values["tie_head"] = False
    return values if config.causal else {**values, "is_causal": False}


def read(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`.

    One flag ties the head to the embedding and the embeddings of both sides to each other.
    """
    headless = str((values["architectures"] or [""])[0]) == "BartModel"
    tied = values["tie_word_embeddings"] and values["tie_head"]
    return {
        **read_stacks(values),
        "positions": "learned",
        "position_offset": 2,
        "embedding_norm": True,
        "tie_embeddings": tied and not headless,
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    return {**write_stacks(config), "tie_word_embeddings": config.share_embeddings}


def _is_shared(config: TransformerConfig) -> bool:
    return config.share_embeddings


def _is_unshared(config: TransformerConfig) -> bool:
    return not config.share_embeddings


def embeddings(*, unused: bool) -> tuple[Weight, ...]:
    """The embeddings of both sides.

    Where they are one, files hold ``shared``, earlier ones also again for each side. Where they are not, files of transformers 4 hold
    ``shared`` alone and mean it for both sides, and those of 5 (``unused``) have a third embedding of that name that nothing reads.
    """
    shared, source, target = (
        "model.shared.weight",
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
    )
    both = (Weight("model.embed_tokens.weight", (target, shared), First(), when=_is_unshared),) if unused else ()
    return (
        Weight("model.embed_tokens.weight", (shared,), when=_is_shared, copies=(source, target)),
        *both,
        same("model.embed_tokens.weight", target, when=_is_unshared),
        same("model.embed_tokens.weight", shared, when=_is_unshared),
        same("encoder.embed_tokens.weight", source, when=_is_unshared),
        same("encoder.embed_tokens.weight", shared, when=_is_unshared),
    )


def stack(ours: str, theirs: str, *, cross: bool) -> tuple[Weight, ...]:
    """The layers of an encoder or, with cross-attention, of a decoder."""
    layer, other = f"{ours}layers.{{i}}", f"{theirs}layers.{{i}}"
    weights = [
        *(
            Weight(
                f"{layer}.attention.qkv_proj.{name}",
                tuple(f"{other}.self_attn.{part}_proj.{name}" for part in "qkv"),
                QKV(),
            )
            for name in ("weight", "bias")
        ),
        *affine(f"{layer}.attention.out_proj", f"{other}.self_attn.out_proj"),
        *affine(f"{layer}.attention_norm", f"{other}.self_attn_layer_norm"),
        *affine(f"{layer}.feed_forward.up_proj", f"{other}.fc1"),
        *affine(f"{layer}.feed_forward.down_proj", f"{other}.fc2"),
        *affine(f"{layer}.feed_forward_norm", f"{other}.final_layer_norm"),
    ]
    if cross:
        attention = f"{other}.encoder_attn"
        weights += [
            *affine(f"{layer}.cross_attention.q_proj", f"{attention}.q_proj"),
            *(
                Weight(
                    f"{layer}.cross_attention.kv_proj.{name}",
                    (f"{attention}.k_proj.{name}", f"{attention}.v_proj.{name}"),
                    Halves(),
                )
                for name in ("weight", "bias")
            ),
            *affine(f"{layer}.cross_attention.out_proj", f"{attention}.out_proj"),
            *affine(f"{layer}.cross_attention_norm", f"{other}.encoder_attn_layer_norm"),
        ]
    return tuple(weights)


FINAL_BIAS = Weight(
    "lm_head.bias", ("final_logits_bias",), Row(), optional=True
)  # not in every file; it is zero until it is trained

FAMILIES = (
    Family(
        name="bart",
        classes=CLASSES,
        fields=FIELDS,
        read=read,
        write=write,
        weights=(
            *embeddings(unused=True),
            *(
                weight
                for ours, theirs in (("model.", "model.decoder."), ("encoder.", "model.encoder."))
                for weight in (
                    same(f"{ours}embed_positions.weight", f"{theirs}embed_positions.weight"),
                    *affine(f"{ours}embed_norm", f"{theirs}layernorm_embedding"),
                    *stack(ours, theirs, cross=ours == "model."),
                )
            ),
            same("lm_head.weight", "lm_head.weight"),
            FINAL_BIAS,
        ),
        prefixes=("model.", ""),
        ignored=(r"(^|\.)(encoder|decoder)\.version$", r"^lm_head\.", r"^final_logits_bias$"),
    ),
)
