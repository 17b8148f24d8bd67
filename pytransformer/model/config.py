"""One configuration class for every model: the families differ by its fields only.

Sources of the choices: Radford et al. 2019 (GPT-2), Touvron et al. 2023 (Llama), Vaswani et al. 2017 (sinusoidal positions, post-norm).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "t5", "none")
NORMS = ("layer_norm", "rms_norm")
NORM_PLACEMENTS = ("pre", "post")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh")
GATED_ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh")
# Gated feed-forwards are rounded up to this width, which the tiles of every matrix unit divide.
_GATED_MULTIPLE = 64


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and choices of a decoder-only transformer.

    Derived fields that are ``None`` are filled in at construction, so every attribute can be read as it is.

    Attributes:
        vocab_size: entries of the token embedding.
        hidden_size: width of the residual stream.
        num_layers: blocks.
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of ``num_heads``; ``None`` = ``num_heads`` (1 = multi-query).
        head_dim: width of a head, a multiple of 8 up to 256; ``None`` = ``hidden_size / num_heads``.
        intermediate_size: width of the feed-forward; ``None`` = 4 · hidden, or 8/3 · hidden rounded up to a multiple of 64 if gated.
        max_seqlen: the context limit in tokens.
        positions: "learned" table, "sinusoidal", "rope", "alibi", or "none" ("t5" comes with the encoder-decoder).
        rope_base, rope_scaling, rotary_dim, rope_interleaved: see :func:`pytransformer.rope_tables` and :func:`pytransformer.rope`;
            ``rotary_dim`` ``None`` = ``head_dim``.
        norm: "layer_norm" or "rms_norm"; with ``norm_eps``, ``norm_bias`` (LayerNorm only) and ``norm_weight_offset`` (RMSNorm only:
            1.0 multiplies by 1 + weight).
        norm_placement: "pre" (norm before each sublayer and a final one) or "post" (norm after each residual addition).
        qk_norm: RMSNorm over each head of q and k, before RoPE.
        activation: "relu", "gelu" (exact), "gelu_tanh", "swiglu", "geglu" or "geglu_tanh" (exact and tanh GELU gate).
        attention_bias, mlp_bias: biases of the projections of the two sublayers.
        softmax_scale: multiplier of q·k; ``None`` = 1 / sqrt(head_dim).
        attention_softcap, logit_softcap: c in c · tanh(s / c); 0 = none.
        sliding_window: keys a query sees, itself included; ``None`` = all before it.
        embedding_dropout, attention_dropout, residual_dropout, feed_forward_dropout: rates, active in training only: after the
            embeddings, on the attention probabilities, on each sublayer's output, after the feed-forward's activation.
        tie_embeddings: the head uses the token embedding's weight.
        scale_embeddings: token embeddings × sqrt(hidden_size).
        initializer_range: standard deviation of the initial weights; the projections into the residual stream are smaller by
            sqrt(2 · num_layers) (GPT-2).
        bos_token_id, eos_token_id, pad_token_id: special tokens; several end tokens are given as a tuple.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a value out of range, or fields that do not fit each other.
        NotImplementedError: ``positions="t5"``.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = None  # type: ignore[assignment]  # filled in by __post_init__, as are the next two
    head_dim: int = None  # type: ignore[assignment]
    intermediate_size: int = None  # type: ignore[assignment]
    max_seqlen: int = 1024
    positions: str = "learned"
    rope_base: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    rotary_dim: int = None  # type: ignore[assignment]  # filled in by __post_init__
    rope_interleaved: bool = False
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    norm_weight_offset: float = 0.0
    norm_placement: str = "pre"
    qk_norm: bool = False
    activation: str = "gelu"
    attention_bias: bool = True
    mlp_bias: bool = True
    softmax_scale: float | None = None
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    sliding_window: int | None = None
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    feed_forward_dropout: float = 0.0
    tie_embeddings: bool = True
    scale_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        # Numbers of numpy's, as arithmetic with sizes gives them, become Python's: JSON and torch.compile know those.
        for field in dataclasses.fields(self):
            _set(self, field.name, _pythons(getattr(self, field.name)))
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_seqlen"):
            _check_int(name, getattr(self, name), minimum=1)
        self._fill_in()
        self._check_attention()
        self._check_choices()
        self._check_numbers()
        self._check_tokens()

    def _fill_in(self) -> None:
        if self.num_kv_heads is None:
            _set(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"hidden_size must be a multiple of num_heads when head_dim is not given, got {self.hidden_size} and {self.num_heads}"
                )
            _set(self, "head_dim", self.hidden_size // self.num_heads)
        if self.rotary_dim is None:
            _set(self, "rotary_dim", self.head_dim)
        if self.intermediate_size is None:
            width = 4 * self.hidden_size
            if self.is_gated:
                width = math.ceil(8 * self.hidden_size / 3 / _GATED_MULTIPLE) * _GATED_MULTIPLE
            _set(self, "intermediate_size", width)
        if isinstance(self.eos_token_id, list):  # as JSON gives it
            _set(self, "eos_token_id", tuple(self.eos_token_id))

    def _check_attention(self) -> None:
        _check_int("num_kv_heads", self.num_kv_heads, minimum=1)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        _check_int("head_dim", self.head_dim, minimum=1)
        if self.head_dim % 8 or self.head_dim > 256:
            raise ValueError(f"head_dim must be a multiple of 8 from 8 to 256, got {self.head_dim}")
        _check_int("rotary_dim", self.rotary_dim, minimum=2)
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim must be even and at most head_dim ({self.head_dim}), got {self.rotary_dim}")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, Mapping):
            raise TypeError(f"rope_scaling must be a mapping or None, got {self.rope_scaling!r}")
        if self.sliding_window is not None:
            _check_int("sliding_window", self.sliding_window, minimum=1)

    def _check_choices(self) -> None:
        for name, allowed in (
            ("positions", POSITIONS),
            ("norm", NORMS),
            ("norm_placement", NORM_PLACEMENTS),
            ("activation", ACTIVATIONS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        if self.positions == "t5":
            raise NotImplementedError(
                "positions='t5' (relative bias) is not served yet: it belongs to the encoder-decoder family"
            )
        if self.positions == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"hidden_size must be even for sinusoidal positions, got {self.hidden_size}")
        for name in (
            "rope_interleaved",
            "norm_bias",
            "qk_norm",
            "attention_bias",
            "mlp_bias",
            "tie_embeddings",
            "scale_embeddings",
        ):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.norm_weight_offset and self.norm == "layer_norm":
            raise ValueError(
                f"norm_weight_offset is for norm='rms_norm', got {self.norm_weight_offset} with 'layer_norm'"
            )

    def _check_numbers(self) -> None:
        _check_int("intermediate_size", self.intermediate_size, minimum=1)
        for name in ("embedding_dropout", "attention_dropout", "residual_dropout", "feed_forward_dropout"):
            rate = _check_number(name, getattr(self, name))
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {rate}")
        for name in ("rope_base", "norm_eps", "initializer_range"):
            if not _check_number(name, getattr(self, name)) > 0.0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("attention_softcap", "logit_softcap"):
            if _check_number(name, getattr(self, name)) < 0.0:
                raise ValueError(f"{name} must be at least 0 (0 = none), got {getattr(self, name)}")
        _check_number("norm_weight_offset", self.norm_weight_offset)
        if self.softmax_scale is not None:
            _check_number("softmax_scale", self.softmax_scale)

    def _check_tokens(self) -> None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is None:
                continue
            for token in value if name == "eos_token_id" and isinstance(value, tuple) else (value,):
                _check_int(name, token, minimum=0)
                if token >= self.vocab_size:
                    raise ValueError(f"{name} must be below vocab_size ({self.vocab_size}), got {token}")

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward multiplies a gate with a linear branch (SwiGLU, GEGLU)."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def window(self) -> tuple[int, int]:
        """``sliding_window`` as the (left, right) of :func:`pytransformer.attention`: W keys including itself are left = W - 1."""
        return (-1, -1) if self.sliding_window is None else (self.sliding_window - 1, -1)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end tokens as a tuple, empty if there are none."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @classmethod
    def gpt2(cls, **overrides: Any) -> TransformerConfig:
        """GPT-2's choices (LayerNorm, learned positions, tanh-GELU, biases, tied head); the 124M shape unless overridden."""
        return cls(
            **{
                "vocab_size": 50257,
                "hidden_size": 768,
                "num_layers": 12,
                "num_heads": 12,
                "max_seqlen": 1024,
                "positions": "learned",
                "norm": "layer_norm",
                "norm_eps": 1e-5,
                "activation": "gelu_tanh",
                "attention_bias": True,
                "mlp_bias": True,
                "tie_embeddings": True,
                **overrides,
            }
        )

    @classmethod
    def llama(cls, **overrides: Any) -> TransformerConfig:
        """Llama's choices (RMSNorm, RoPE, SwiGLU, no biases, untied head); the 7B shape unless overridden.

        Another ``hidden_size`` without ``intermediate_size`` takes the 8/3 rule (Llama 7B's own 11008 is rounded up further).
        """
        defaults: dict[str, Any] = {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_layers": 32,
            "num_heads": 32,
            "max_seqlen": 4096,
            "positions": "rope",
            "norm": "rms_norm",
            "norm_eps": 1e-5,
            "norm_bias": False,
            "activation": "swiglu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_embeddings": False,
        }
        if "hidden_size" not in overrides:
            defaults["intermediate_size"] = 11008
        return cls(**{**defaults, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON types, derived ones filled in."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        if self.rope_scaling is not None:
            values["rope_scaling"] = dict(self.rope_scaling)
        return values

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
    if isinstance(value, tuple):
        return tuple(map(_pythons, value))
    return value.item() if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0 else value


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
