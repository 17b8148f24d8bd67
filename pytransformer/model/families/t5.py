"""T5 1.0 and 1.1 (Raffel et al. 2020; Shazeer 2020) and mT5 (Xue et al. 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, Field, Harmless, Refused, Used
from .parts import GENERATION, read_activation, with_aliases, write_activation
from .weights import QKV, Halves, Weight, same

# Relative positions have no end; a limit of a model's own is kept under a name that transformers passes over.
_ENDLESS = 2**20
_GATED = {"gelu": "geglu", "gelu_tanh": "geglu_tanh", "silu": "swiglu", "relu": "reglu"}
_GATED_NAMES = {"geglu": "gated-gelu_python", "geglu_tanh": "gated-gelu", "swiglu": "gated-silu", "reglu": "gated-relu"}
_ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}
_ENCODER = {"architecture": "encoder", "head": "none", "tie_embeddings": False}

_FIELDS: dict[str, Field] = {
    **GENERATION,
    "vocab_size": Used(32128),
    "d_model": Used(512),
    "d_kv": Used(64),
    "d_ff": Used(2048),
    "num_layers": Used(6),
    "num_decoder_layers": Used(),
    "num_heads": Used(8),
    **{name: Used() for name in _ALIASES},
    "relative_attention_num_buckets": Used(32),
    "relative_attention_max_distance": Used(128),
    "dropout_rate": Used(0.1),
    "layer_norm_epsilon": Used(1e-6),
    "initializer_factor": Harmless(1.0),
    "feed_forward_proj": Used("relu"),
    # transformers makes these two of feed_forward_proj and writes them down; what a file says of them counts.
    "dense_act_fn": Used(),
    "is_gated_act": Used(),
    "is_encoder_decoder": Harmless(True),
    "pad_token_id": Used(0),
    "eos_token_id": Used(1),
    "classifier_dropout": Harmless(0.0),
    "scale_decoder_outputs": Used(),
    "max_position_embeddings": Used(),
    "is_causal": Refused((True,), "a T5 decoder that sees later tokens is not served"),
    "n_positions": Harmless(512),
    "output_past": Harmless(),
    "gradient_checkpointing": Harmless(False),
}


def read(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`.

    In transformers every T5 is tied unless its file holds a head of its own, and the files that it writes say ``tie_word_embeddings`` true
    whatever they hold. A published 1.1 says false and means that the output is not scaled; ``scale_decoder_outputs`` counts where it is
    there.
    """
    scaled, tied = values["scale_decoder_outputs"], values["tie_word_embeddings"] is not False
    return _read(values, scaled=tied if scaled is None else scaled)


def read_mt5(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`. The output is never scaled."""
    return _read(values, scaled=False)


def _read(values: Mapping[str, Any], *, scaled: bool) -> dict[str, Any]:
    decoder_layers = values["num_decoder_layers"]
    values = {**values, "num_decoder_layers": values["num_layers"] if decoder_layers is None else decoder_layers}
    values = with_aliases(values, _ALIASES)
    encoder_only = str((values["architectures"] or [""])[0]).endswith("EncoderModel")
    start = values["decoder_start_token_id"]
    return {
        "architecture": "encoder-decoder",
        "vocab_size": values["vocab_size"],
        "share_embeddings": True,
        "hidden_size": values["d_model"],
        "num_layers": values["num_layers"] if encoder_only else values["num_decoder_layers"],
        "num_encoder_layers": values["num_layers"],
        "num_heads": values["num_heads"],
        "head_dim": values["d_kv"],
        "intermediate_size": values["d_ff"],
        "max_seqlen": values["max_position_embeddings"] or _ENDLESS,
        "positions": "t5",
        "relative_buckets": values["relative_attention_num_buckets"],
        "relative_max_distance": values["relative_attention_max_distance"],
        "norm": "rms_norm",
        "norm_bias": False,
        "norm_eps": values["layer_norm_epsilon"],
        "activation": _read_activation(values),
        "attention_bias": False,
        "mlp_bias": False,
        "softmax_scale": 1.0,
        "logit_scale": values["d_model"] ** -0.5 if scaled and not encoder_only else 1.0,
        "embedding_dropout": values["dropout_rate"],
        "attention_dropout": values["dropout_rate"],
        "residual_dropout": values["dropout_rate"],
        "feed_forward_dropout": values["dropout_rate"],
        "tie_embeddings": values["tie_word_embeddings"] is not False,
        "initializer_range": values["initializer_range"],
        "bos_token_id": values["bos_token_id"],
        "eos_token_id": values["eos_token_id"],
        "pad_token_id": values["pad_token_id"],
        "decoder_start_token_id": values["pad_token_id"] if start is None else start,
    }


def _read_activation(values: Mapping[str, Any]) -> str:
    kind, *rest = str(values["feed_forward_proj"]).split("-")
    if len(rest) > 1 or (rest and kind != "gated"):
        raise ValueError(
            f"feed_forward_proj must be ACTIVATION or gated-ACTIVATION, got {values['feed_forward_proj']!r}"
        )
    name = (rest or [kind])[0]
    if rest and name == "gelu":
        name = "gelu_new"  # so the authors of 1.1 have it
    plain = read_activation("dense_act_fn", values["dense_act_fn"] or name)
    gated = bool(rest) if values["is_gated_act"] is None else values["is_gated_act"]
    return _GATED[plain] if gated else plain


def write(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    return {**_write(config), "scale_decoder_outputs": config.logit_scale != 1.0 or config.head == "none"}


def write_mt5(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    return _write(config)


def _write(config: TransformerConfig) -> dict[str, Any]:
    values = {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "d_kv": config.head_dim,
        "d_ff": config.intermediate_size,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "dropout_rate": config.residual_dropout,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": _GATED_NAMES.get(config.activation) or write_activation(config.activation),
        "is_encoder_decoder": config.is_encoder_decoder,
        "tie_word_embeddings": config.tie_embeddings or config.head == "none",
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
    }
    return values if config.max_seqlen == _ENDLESS else {**values, "max_position_embeddings": config.max_seqlen}


def settle(config: TransformerConfig, names: Collection[str]) -> TransformerConfig:
    """A head that is not there is the embedding, whatever ``tie_word_embeddings`` says."""
    if config.head == "lm" and not config.tie_embeddings and "lm_head.weight" not in names:
        return dataclasses.replace(config, tie_embeddings=True)
    return config


def _is_encoder(config: TransformerConfig) -> bool:
    return config.architecture == "encoder"


def _is_encoder_decoder(config: TransformerConfig) -> bool:
    return config.is_encoder_decoder


def _stack(ours: str, theirs: str, *, decoder: bool = False) -> tuple[Weight, ...]:
    """The tensors of an encoder or a decoder. The bias of relative positions stands in the first block and serves all."""
    layer, block = f"{ours}layers.{{i}}", f"{theirs}block.{{i}}.layer"
    attention, feed_forward = f"{block}.0.SelfAttention", f"{block}.{2 if decoder else 1}"
    weights = [
        same(f"{ours}relative_bias.weight", f"{theirs}block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        same(f"{layer}.attention_norm.weight", f"{block}.0.layer_norm.weight"),
        Weight(f"{layer}.attention.qkv_proj.weight", tuple(f"{attention}.{name}.weight" for name in "qkv"), QKV()),
        same(f"{layer}.attention.out_proj.weight", f"{attention}.o.weight"),
        same(f"{layer}.feed_forward_norm.weight", f"{feed_forward}.layer_norm.weight"),
        same(f"{layer}.feed_forward.up_proj.weight", f"{feed_forward}.DenseReluDense.wi.weight"),
        Weight(
            f"{layer}.feed_forward.gate_up_proj.weight",
            tuple(f"{feed_forward}.DenseReluDense.wi_{part}.weight" for part in (0, 1)),
            Halves(),
        ),
        same(f"{layer}.feed_forward.down_proj.weight", f"{feed_forward}.DenseReluDense.wo.weight"),
        same(f"{ours}norm.weight", f"{theirs}final_layer_norm.weight"),
    ]
    if decoder:
        cross = f"{block}.1.EncDecAttention"
        weights += [
            same(f"{layer}.cross_attention_norm.weight", f"{block}.1.layer_norm.weight"),
            same(f"{layer}.cross_attention.q_proj.weight", f"{cross}.q.weight"),
            Weight(f"{layer}.cross_attention.kv_proj.weight", (f"{cross}.k.weight", f"{cross}.v.weight"), Halves()),
            same(f"{layer}.cross_attention.out_proj.weight", f"{cross}.o.weight"),
        ]
    # Of a model that is an encoder alone, the encoder is what is elsewhere the decoder.
    when = _is_encoder if not decoder and ours == "model." else _is_encoder_decoder
    return tuple(dataclasses.replace(weight, when=when) for weight in weights)


_WEIGHTS = (
    Weight(
        "model.embed_tokens.weight",
        ("shared.weight",),
        copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    ),
    *_stack("model.", "decoder.", decoder=True),
    *_stack("encoder.", "encoder."),
    *_stack("model.", "encoder."),
    same("lm_head.weight", "lm_head.weight"),
)
# The first files have a bias of relative positions in cross-attention too, which was never used.
_IGNORED = (r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",)


def _classes(name: str) -> dict[str, dict[str, Any]]:
    return {f"{name}ForConditionalGeneration": {"head": "lm"}, f"{name}EncoderModel": _ENCODER}


FAMILIES = (
    # The first releases called the class otherwise, and files still say so.
    Family(
        "t5",
        {**_classes("T5"), "T5WithLMHeadModel": {"head": "lm"}},
        _FIELDS,
        read,
        write,
        _WEIGHTS,
        ignored=_IGNORED,
        settle=settle,
    ),
    Family(
        "mt5",
        _classes("MT5"),
        {
            **_FIELDS,
            "vocab_size": Used(250112),
            "d_ff": Used(1024),
            "num_layers": Used(8),
            "num_heads": Used(6),
            "feed_forward_proj": Used("gated-gelu"),
            "decoder_start_token_id": Used(0),
            "scale_decoder_outputs": Harmless(),  # T5's
        },
        read_mt5,
        write_mt5,
        _WEIGHTS,
        ignored=_IGNORED,
        settle=settle,
    ),
)
