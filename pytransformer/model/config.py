"""One configuration class for every model: the families differ by its fields only.

Sources of the choices: Vaswani et al. 2017 (encoder–decoder, sinusoidal positions, post-norm), Devlin et al. 2019 (BERT), Radford et al.
2019 (GPT-2), Raffel et al. 2020 (T5), Touvron et al. 2023 (Llama), Jiang et al. 2024 (Mixtral). What each public family chooses: families/.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import config_checks
from .config_checks import GATED_ACTIVATIONS

# Gated feed-forwards are rounded up to this width, which the tiles of every matrix unit divide.
_GATED_MULTIPLE = 64


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and choices of a transformer: decoder-only, encoder-only or encoder–decoder.

    Derived fields that are ``None`` are filled in at construction, so every attribute can be read as it is. A public family is a choice of
    these fields; what they do is written down once, in nn/ and in the blocks.

    Attributes:
        vocab_size: entries of the token embedding (of an encoder–decoder: the target's).
        hidden_size: width of the residual stream.
        num_layers: blocks (of an encoder–decoder: the decoder's).
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of ``num_heads``; ``None`` = ``num_heads`` (1 = multi-query).
        head_dim: width of a head; ``None`` = ``hidden_size / num_heads``. The kernels serve multiples of 8 up to 256, torch the rest.
        intermediate_size: width of the feed-forward; ``None`` = 4 · hidden, or 8/3 · hidden rounded up to a multiple of 64 if gated.
        max_seqlen: the context limit in tokens.

        architecture: "decoder", "encoder" or "encoder-decoder".
        causal: whether a token sees only those before it; ``None`` = all but an encoder's. An encoder–decoder's encoder never is causal.
        num_encoder_layers, encoder_num_heads, encoder_intermediate_size: of the encoder; ``None`` = as the decoder.
        src_vocab_size: entries of the source's embedding; ``None`` = ``vocab_size``.
        share_embeddings: source and target use one embedding.
        decoder_start_token_id: the token that generation of an encoder–decoder begins with.

        positions: "learned" table, "sinusoidal", "rope", "alibi", "t5" (a learned bias for each distance, in buckets), "relative_key" (a
            learned vector for each distance, times q), "relative_key_query" (times k too) or "none".
        position_offset: row of the table at which position 0 stands (BART: 2).
        positions_skip_padding: positions count the tokens that are not ``pad_token_id`` (RoBERTa); padding has position -1.
        sinusoidal_halves: [sin ‖ cos] instead of interleaved pairs (Marian).
        rope_base, rope_scaling, rotary_dim, rope_interleaved: see :func:`pytransformer.rope_tables` and :func:`pytransformer.rope`;
            ``rotary_dim`` ``None`` = ``head_dim``.
        local_rope_base, local_rope_scaling: of layers with a sliding window, where it is another one (Gemma 3); ``None`` = ``rope_base``.
        alibi_scale: multiplier of the ALiBi slopes (Falcon divides by sqrt(head_dim)).
        alibi_bfloat16: slopes · key position are rounded to bfloat16 and added per key (Falcon), instead of slopes · distance.
        relative_buckets, relative_max_distance: of "t5".

        norm: "layer_norm" or "rms_norm"; with ``norm_eps``, ``norm_bias`` (LayerNorm only) and ``norm_weight_offset`` (RMSNorm only:
            1.0 multiplies by 1 + weight).
        norm_placement: "pre" (before each sublayer), "post" (after each residual addition), "both" (before each sublayer and on its output,
            Gemma 2) or "output" (on the output of each sublayer alone, OLMo 2).
        final_norm: a norm after the last block; ``None`` = unless "post".
        embedding_norm: a norm after the embeddings (BERT, BLOOM).
        parallel: attention and feed-forward read the same stream and are added together ("pre" only); ``parallel_norms`` 1 = one norm
            for both (PaLM, Falcon 7B), 2 = one each (GPT-NeoX).
        residual_from_norm: the residual is the norm's output, not its input ("pre" only; BLOOM's variant).
        qk_norm: RMSNorm over each head of q and k, before RoPE; with ``qk_norm_whole`` over all heads together (OLMo 2).

        activation: "relu", "gelu" (exact), "gelu_tanh", "silu", or gated: "swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_clamped"
            ((up + 1) · gate · σ(alpha · gate) with gate at most and |up| at most ``activation_limit``, GPT-OSS; ``activation_alpha``).
        attention_bias, attention_output_bias, mlp_bias: biases of the projections to q, k, v, of the projection back (``None`` =
            ``attention_bias``), and of the feed-forward.
        softmax_scale: multiplier of q·k; ``None`` = 1 / sqrt(head_dim).
        scale_by_layer: q·k is also divided by the number of the layer, counted from 1 (GPT-2's option).
        attention_softcap, logit_softcap: c in c · tanh(s / c); 0 = none.
        sliding_window: keys a query sees, itself included; ``None`` = all before it. Without a causal mask: as far to both sides.
        layer_types: "full" or "sliding" for each layer; ``None`` = all sliding if there is a ``sliding_window``.
        sinks: a learned sink for each head (GPT-OSS).

        num_experts: 0 = a plain feed-forward; else each token goes to ``experts_per_token`` of so many.
        expert_size: width of an expert; ``None`` = ``intermediate_size``.
        norm_topk_prob: the chosen experts' weights are divided by their sum.
        router_bias: of the router's projection.
        shared_expert_size: width of an expert that every token goes to; 0 = none. ``shared_expert_gate``: times σ(x·w) (Qwen2-MoE).
        dense_layers: layers with a plain feed-forward all the same.
        router_aux_coef, router_z_coef: weights of the balancing loss and of the router's z-loss in training.

        head: "lm", "masked_lm", "classification" or "none" (hidden states, or with ``pooling`` one vector for each sequence).
        head_bias: of the head's output.
        head_transform: activation of a linear layer between hidden states and head, or ``None``; before "masked_lm" a norm follows it.
        num_labels, problem: of "classification": "multi_class" (softmax), "multi_label", "binary" (sigmoid) or "regression".
        pooling: the token that stands for a sequence: "first", "last" (that is not padding) or "mean"; ``None`` = "first" to classify.
        pooler: a linear layer and tanh over the pooled vector (BERT).
        logit_scale: multiplier of the hidden states before the head (T5: hidden_size^-½).

        embedding_dropout, attention_dropout, residual_dropout, feed_forward_dropout, head_dropout: rates, active in training only: after
            the embeddings, on the attention probabilities, on each sublayer's output, after the feed-forward's activation, before the
            classifier.
        tie_embeddings: the head uses the token embedding's weight.
        scale_embeddings: token embeddings × sqrt(hidden_size), rounded to the embedding's dtype.
        type_vocab_size: entries of the token types' embedding (BERT); 0 = none.
        quantization: ``None``, or how the weights of linear layers are held: "int8", or "int4-32", "int4-64", "int4-128" with the columns
            of a group (:func:`pytransformer.model.quantized.quantize` sets it).
        initializer_range: standard deviation of the initial weights; the projections into the residual stream are smaller by
            sqrt(2 · num_layers) (GPT-2), embeddings that are scaled start with hidden_size^-½.
        bos_token_id, eos_token_id, pad_token_id: special tokens; several end tokens are given as a tuple.
        family, family_fields: the public family that a model was loaded from and is saved as, and what its own configuration holds besides
            (see :mod:`pytransformer.model.families`).

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a value out of range, or fields that do not fit each other.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = None  # type: ignore[assignment]  # filled in by __post_init__, as are the next two
    head_dim: int = None  # type: ignore[assignment]
    intermediate_size: int = None  # type: ignore[assignment]
    max_seqlen: int = 1024

    architecture: str = "decoder"
    causal: bool = None  # type: ignore[assignment]  # filled in
    num_encoder_layers: int = None  # type: ignore[assignment]  # filled in, as are the next three
    encoder_num_heads: int = None  # type: ignore[assignment]
    encoder_intermediate_size: int = None  # type: ignore[assignment]
    src_vocab_size: int = None  # type: ignore[assignment]
    share_embeddings: bool = False
    decoder_start_token_id: int | None = None

    positions: str = "learned"
    position_offset: int = 0
    positions_skip_padding: bool = False
    sinusoidal_halves: bool = False
    rope_base: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    rotary_dim: int = None  # type: ignore[assignment]  # filled in by __post_init__
    rope_interleaved: bool = False
    local_rope_base: float | None = None
    local_rope_scaling: Mapping[str, Any] | None = None
    alibi_scale: float = 1.0
    alibi_bfloat16: bool = False
    relative_buckets: int = 32
    relative_max_distance: int = 128

    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    norm_weight_offset: float = 0.0
    norm_placement: str = "pre"
    final_norm: bool = None  # type: ignore[assignment]  # filled in
    embedding_norm: bool = False
    parallel: bool = False
    parallel_norms: int = 1
    residual_from_norm: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False

    activation: str = "gelu"
    activation_limit: float = 7.0
    activation_alpha: float = 1.702
    attention_bias: bool = True
    attention_output_bias: bool = None  # type: ignore[assignment]  # filled in
    mlp_bias: bool = True
    softmax_scale: float | None = None
    scale_by_layer: bool = False
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = None  # type: ignore[assignment]  # filled in
    sinks: bool = False

    num_experts: int = 0
    experts_per_token: int = 2
    expert_size: int = None  # type: ignore[assignment]  # filled in
    norm_topk_prob: bool = True
    router_bias: bool = False
    shared_expert_size: int = 0
    shared_expert_gate: bool = False
    dense_layers: tuple[int, ...] = ()
    router_aux_coef: float = 0.0
    router_z_coef: float = 0.0

    head: str = "lm"
    head_bias: bool = False
    head_transform: str | None = None
    num_labels: int = 2
    problem: str = "multi_class"
    pooling: str | None = None
    pooler: bool = False
    logit_scale: float = 1.0

    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    feed_forward_dropout: float = 0.0
    head_dropout: float = 0.0
    tie_embeddings: bool = None  # type: ignore[assignment]  # filled in: True for language models
    scale_embeddings: bool = False
    type_vocab_size: int = 0
    quantization: str | None = None
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    family: str | None = None
    family_fields: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        # Numbers of numpy's, as arithmetic with sizes gives them, become Python's, and JSON's lists tuples.
        for field in dataclasses.fields(self):
            _set(self, field.name, _pythons(getattr(self, field.name)))
        config_checks.check_sizes(self)
        for name, value in self._derived().items():
            if getattr(self, name) is None:
                _set(self, name, value)
        config_checks.check(self)

    def _derived(self) -> dict[str, Any]:
        """What a field that was not given is; in an order in which none needs a later one."""
        intermediate = 4 * self.hidden_size
        if self.is_gated:
            intermediate = math.ceil(8 * self.hidden_size / 3 / _GATED_MULTIPLE) * _GATED_MULTIPLE
        given = self.intermediate_size
        intermediate = intermediate if given is None else given
        head_dim = self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim
        return {
            "num_kv_heads": self.num_heads,
            "head_dim": head_dim,
            "intermediate_size": intermediate,
            "rotary_dim": head_dim,
            "causal": self.architecture != "encoder",
            "num_encoder_layers": self.num_layers,
            "encoder_num_heads": self.num_heads,
            "encoder_intermediate_size": intermediate,
            "src_vocab_size": self.vocab_size,
            "final_norm": self.norm_placement != "post",
            "attention_output_bias": self.attention_bias,
            "layer_types": ("full" if self.sliding_window is None else "sliding",) * self.num_layers,
            "expert_size": intermediate,
            "tie_embeddings": self.head in ("lm", "masked_lm"),
            "pooling": "first" if self.head == "classification" else None,
        }

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward multiplies a gate with a linear branch (SwiGLU, GEGLU)."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether a decoder attends to an encoder's memory."""
        return self.architecture == "encoder-decoder"

    @functools.cached_property  # a table of tensors asks for it once for each
    def encoder(self) -> TransformerConfig:
        """The encoder of an encoder–decoder as a configuration of its own."""
        return dataclasses.replace(
            self,
            architecture="encoder",
            causal=False,
            vocab_size=self.src_vocab_size,
            num_layers=self.num_encoder_layers,
            num_heads=self.encoder_num_heads,
            num_kv_heads=self.encoder_num_heads if self.num_kv_heads == self.num_heads else self.num_kv_heads,
            head_dim=self._encoder_head_dim,
            rotary_dim=self._encoder_head_dim if self.rotary_dim == self.head_dim else self.rotary_dim,
            intermediate_size=self.encoder_intermediate_size,
            layer_types=None,  # type: ignore[arg-type]  # filled in
            head="none",
            tie_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None
            if self.pad_token_id is not None and self.pad_token_id >= self.src_vocab_size
            else self.pad_token_id,
            decoder_start_token_id=None,
        )

    @property
    def _encoder_head_dim(self) -> int:
        """As the decoder's, unless its heads share out the hidden size and the encoder has another number of them."""
        shared_out = self.head_dim * self.num_heads == self.hidden_size
        return self.hidden_size // self.encoder_num_heads if shared_out else self.head_dim

    def window(self, layer: int = 0) -> tuple[int, int]:
        """The (left, right) of :func:`pytransformer.attention` in a layer: W keys including itself are left = W - 1."""
        if self.layer_types[layer] == "full" or self.sliding_window is None:
            return -1, -1
        return self.sliding_window - 1, -1 if self.causal else self.sliding_window - 1

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's feed-forward is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def has_local_rope(self) -> bool:
        """Whether layers with a sliding window rotate by other frequencies than the rest."""
        return self.positions == "rope" and self.local_rope_base is not None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end tokens as a tuple, empty if there are none."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @classmethod
    def gpt2(cls, **overrides: Any) -> TransformerConfig:
        """GPT-2's choices (LayerNorm, learned positions, tanh-GELU, biases, tied head); the 124M shape unless overridden."""
        shape = {"vocab_size": 50257, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "max_seqlen": 1024}
        return cls(**{**shape, "positions": "learned", "norm": "layer_norm", "activation": "gelu_tanh", **overrides})

    @classmethod
    def llama(cls, **overrides: Any) -> TransformerConfig:
        """Llama's choices (RMSNorm, RoPE, SwiGLU, no biases, untied head); the 7B shape unless overridden.

        Another ``hidden_size`` without ``intermediate_size`` takes the 8/3 rule (Llama 7B's own 11008 is rounded up further).
        """
        shape = {"vocab_size": 32000, "hidden_size": 4096, "num_layers": 32, "num_heads": 32, "max_seqlen": 4096}
        choices = {
            "positions": "rope", "norm": "rms_norm", "norm_bias": False, "activation": "swiglu", "attention_bias": False,
            "mlp_bias": False, "tie_embeddings": False,
        }  # fmt: skip
        if "hidden_size" not in overrides:
            choices["intermediate_size"] = 11008
        return cls(**{**shape, **choices, **overrides})

    @classmethod
    def bert(cls, **overrides: Any) -> TransformerConfig:
        """BERT's choices (encoder, post-norm, token types, masked-LM head); the base shape unless overridden."""
        shape = {"vocab_size": 30522, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "max_seqlen": 512}
        choices = {
            "architecture": "encoder", "norm_placement": "post", "norm_eps": 1e-12, "embedding_norm": True, "type_vocab_size": 2,
            "head": "masked_lm", "head_transform": "gelu", "head_bias": True, "pad_token_id": 0,
        }  # fmt: skip
        return cls(**{**shape, **choices, **overrides})

    @classmethod
    def original(cls, **overrides: Any) -> TransformerConfig:
        """The encoder–decoder of Vaswani et al. 2017 (sinusoidal positions, post-norm, ReLU, scaled embeddings); the base shape."""
        shape = {"vocab_size": 37000, "hidden_size": 512, "num_layers": 6, "num_heads": 8, "max_seqlen": 1024}
        choices = {
            "architecture": "encoder-decoder", "positions": "sinusoidal", "norm_placement": "post", "activation": "relu",
            "scale_embeddings": True, "tie_embeddings": False,
        }  # fmt: skip
        return cls(**{**shape, **choices, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON types, derived ones filled in."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TransformerConfig:
        """The inverse of :meth:`to_dict`; fields that are left out take their defaults.

        Raises:
            TypeError: not a mapping.
            ValueError: unknown keys, or a required one is missing; the message names them.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"a configuration must be a mapping of field names to values, got {type(values).__name__}")
        fields = dataclasses.fields(cls)
        unknown = sorted(set(values) - {field.name for field in fields})
        if unknown:
            raise ValueError(f"unknown configuration keys: {', '.join(map(repr, unknown))}")
        required = {field.name for field in fields if field.default is dataclasses.MISSING}
        missing = sorted(required - set(values))
        if missing:
            raise ValueError(f"missing configuration keys: {', '.join(map(repr, missing))}")
        return cls(**values)

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TransformerConfig:
        """The inverse of :meth:`to_json`; ValueError if the text is not JSON or the fields do not fit."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a configuration must be JSON: {error}") from error
        return cls.from_dict(values)


def _set(config: TransformerConfig, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)  # the dataclass is frozen


def _pythons(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(map(_pythons, value))
    return value.item() if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0 else value
