"""What a training run is told: its text, its model and its numbers, each checked where it is written down.

This module imports nothing heavy, so that the command line can describe its options at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytransformer.model.config import TransformerConfig

MIN_VOCAB_SIZE = 257
"""256 bytes and the end-of-text token."""
BAD_BYTES_CHOICES = ("refuse", "skip")
FAMILIES = ("llama", "gpt2")
OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("cosine", "wsd", "constant")
PRECISIONS = ("fp32", "bf16")
# These say when to look and what to keep; changing them on resume changes no loss.
_FREE_ON_RESUME = frozenset({"eval_every", "save_every", "keep_checkpoints", "log_every"})


@dataclass(frozen=True)
class CorpusConfig:
    """What text to train on.

    Attributes:
        source: a folder, file or glob of UTF-8 text; None = the Python standard library's source.
        vocab_size: the most tokens the tokenizer may learn.
        validation_fraction: the share of files held out. Where whole files would be more than twice or less than half of it (one file,
            a few, or one that is much larger than the rest): the share of each file's tokens, at its end.
        bad_bytes: "refuse" = a file that isn't UTF-8 is an error; "skip" = it is reported and left out.
    """

    source: str | None = None
    vocab_size: int = 2048
    validation_fraction: float = 0.05
    bad_bytes: str = "refuse"

    def __post_init__(self) -> None:
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and the end-of-text token), but is {self.vocab_size}"
            )
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must be between 0 and 1, but is {self.validation_fraction}")
        if self.bad_bytes not in BAD_BYTES_CHOICES:
            raise ValueError(f"bad_bytes must be one of {', '.join(BAD_BYTES_CHOICES)}, but is {self.bad_bytes!r}")


@dataclass(frozen=True)
class ModelShape:
    """The model to train, without what the text decides (the vocabulary).

    Attributes:
        family: "llama" (RMSNorm, RoPE, SwiGLU) or "gpt2" (LayerNorm, learned positions, GELU).
        hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size: as in :class:`TransformerConfig`; None = its default.
        max_seqlen: the context limit; None = the context length trained with.
        dropout: one rate for embeddings, attention, residual and feed-forward.
        tie_embeddings: the head uses the token embedding's weight.
        initializer_range: standard deviation of the initial weights.
    """

    family: str = "llama"
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int | None = None
    intermediate_size: int | None = None
    max_seqlen: int | None = None
    dropout: float = 0.0
    tie_embeddings: bool = True
    initializer_range: float = 0.02

    def build(self, vocab_size: int, end_token_id: int, context_length: int) -> TransformerConfig:
        """Raises ValueError if the family is unknown or the context limit is shorter than what is trained with."""
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, but is {self.family!r}")
        max_seqlen = context_length if self.max_seqlen is None else self.max_seqlen
        if max_seqlen < context_length:
            raise ValueError(f"max_seqlen must be at least the context length ({context_length}), but is {max_seqlen}")
        fields = asdict(self)
        rate = fields.pop("dropout")
        del fields["family"]
        fields.update(
            vocab_size=vocab_size,
            max_seqlen=max_seqlen,
            eos_token_id=end_token_id,
            embedding_dropout=rate,
            attention_dropout=rate,
            residual_dropout=rate,
            feed_forward_dropout=rate,
        )
        from pytransformer.model.config import TransformerConfig  # brings torch with it

        make = TransformerConfig.llama if self.family == "llama" else TransformerConfig.gpt2
        return make(**fields)


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The defaults, with those of :class:`ModelShape`, are the demo.

    They are chosen for the lowest loss after about a hundred seconds on two CPU cores: with so little arithmetic a small model that sees
    many tokens in many small steps is ahead of a larger one (measurements in docs/lab-notes.md).

    Attributes:
        steps: optimizer steps.
        batch_size: sequences per optimizer step.
        context_length: tokens per sequence.
        accumulation_steps: a batch goes through the model in this many equal parts (less memory, the same gradient).
        optimizer: "adamw", "adam" or "sgd".
        learning_rate: the highest of the schedule.
        schedule: after the warm-up, "cosine" down to ``min_learning_rate_ratio``, "wsd" (stable, then linear decay over the last
            ``decay_fraction`` of the steps), or "constant".
        min_learning_rate_ratio: the last learning rate as a share of the highest.
        warmup_steps: steps of linear warm-up from 0.
        decay_fraction: share of the steps in which "wsd" decays.
        weight_decay: of matrices only, never of biases and norm weights ("adamw": decoupled; "adam" and "sgd": L2).
        beta1, beta2, epsilon: of AdamW and Adam.
        momentum: of SGD.
        max_grad_norm: the gradient is scaled down to this norm; 0 = no clipping.
        precision: "fp32", or "bf16" (autocast; the weights stay float32).
        seed: of the initial weights, the batches and dropout.
        eval_every: steps between evaluations (the last step always evaluates).
        eval_tokens: validation targets per evaluation, at most.
        save_every: steps between checkpoints (the last step always saves).
        keep_checkpoints: how many of the newest checkpoints stay.
        log_every: steps between updates of the display; metrics are recorded for every step.

    Raises:
        ValueError: a value out of range.
    """

    steps: int = 3600
    batch_size: int = 4
    context_length: int = 128
    accumulation_steps: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 3e-3
    schedule: str = "cosine"
    min_learning_rate_ratio: float = 0.0
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    momentum: float = 0.9
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    seed: int = 0
    eval_every: int = 400
    eval_tokens: int = 32768
    save_every: int = 600
    keep_checkpoints: int = 2
    log_every: int = 20

    def __post_init__(self) -> None:
        for name in (
            "steps", "batch_size", "context_length", "accumulation_steps", "eval_every", "eval_tokens", "save_every",
            "keep_checkpoints", "log_every",
        ):  # fmt: skip
            self._check(name, "an integer of at least 1", lambda value: isinstance(value, int) and value >= 1)
        for name in ("warmup_steps", "seed"):
            self._check(name, "an integer of at least 0", lambda value: isinstance(value, int) and value >= 0)
        for name in ("learning_rate", "epsilon"):
            self._check(name, "above 0 and finite", lambda value: 0.0 < value < float("inf"))
        for name in ("weight_decay", "max_grad_norm"):
            self._check(name, "at least 0 and finite", lambda value: 0.0 <= value < float("inf"))
        for name in ("beta1", "beta2", "momentum"):
            self._check(name, "at least 0 and below 1", lambda value: 0.0 <= value < 1.0)
        self._check("decay_fraction", "above 0 and at most 1", lambda value: 0.0 < value <= 1.0)
        self._check("min_learning_rate_ratio", "between 0 and 1", lambda value: 0.0 <= value <= 1.0)
        for name, choices in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
            self._check(name, f"one of {', '.join(choices)}", choices.__contains__)
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"accumulation_steps must divide batch_size ({self.batch_size}), but is {self.accumulation_steps}"
            )

    def _check(self, name: str, allowed: str, is_valid: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if not is_valid(value):
            raise ValueError(f"{name} must be {allowed}, but is {value!r}")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run does."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    model: ModelShape = field(default_factory=ModelShape)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> RunConfig:
        return cls(
            CorpusConfig(**fields["corpus"]), ModelShape(**fields["model"]), TrainingConfig(**fields["training"])
        )


def differences(saved: dict[str, object], given: dict[str, object]) -> list[str]:
    """Every field in which two configurations differ in a way that changes losses, as "name: saved value, now other value"."""
    return [
        f"{name}: {_show(saved, name)} in the checkpoint, {_show(given, name)} now"
        for name in sorted(saved.keys() | given.keys())
        if name not in _FREE_ON_RESUME and _show(saved, name) != _show(given, name)
    ]


def _show(fields: dict[str, object], name: str) -> str:
    return repr(fields[name]) if name in fields else "absent"
