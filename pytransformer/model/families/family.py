"""A public family of checkpoints: how its configuration and its weights become ours, and back.

A family is data: the fields of its configuration with what each means here, two functions that translate them, and a table of tensors. All
of it can be read backwards, so what is loaded can be saved: :func:`write_config` reads what it wrote again and refuses a configuration that
the family cannot express.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import TransformerConfig
from .weights import Weight


class CheckpointError(ValueError):
    """A folder that does not hold a model that can be loaded; the message lists everything that does not fit."""


@dataclass(frozen=True)
class Used:
    """A field that ``Family.read`` takes into account, with what transformers takes for it where a file does not have it."""

    default: Any = None


@dataclass(frozen=True)
class Harmless:
    """A field that changes no number a model computes here; it is kept and written again."""

    default: Any = None


@dataclass(frozen=True)
class Refused:
    """A field that is served with one of these values only (the first is the default); ``why`` ends the error message."""

    allowed: tuple[Any, ...]
    why: str

    @property
    def default(self) -> Any:
        return self.allowed[0]


Field = Used | Harmless | Refused

# Fields of every configuration class (transformers' PreTrainedConfig, 5.23), and what older releases wrote into every file.
COMMON: dict[str, Field] = {
    "model_type": Used(),
    "architectures": Used(),
    "id2label": Harmless(),  # its length is read; it is kept for the names
    "label2id": Harmless(),
    "num_labels": Used(),
    "problem_type": Used(),
    "is_encoder_decoder": Harmless(False),
    "tie_word_embeddings": Used(True),
    "pad_token_id": Used(),
    "bos_token_id": Used(),
    "eos_token_id": Used(),
    "decoder_start_token_id": Used(),
    "dtype": Harmless(),
    "torch_dtype": Harmless(),
    "transformers_version": Harmless(),
    "output_hidden_states": Harmless(False),
    "output_attentions": Harmless(False),
    "return_dict": Harmless(True),
    "use_return_dict": Harmless(True),
    "use_cache": Harmless(True),
    "attn_implementation": Harmless(),
    "experts_implementation": Harmless(),
    "chunk_size_feed_forward": Harmless(0),
    "initializer_range": Used(0.02),
    "is_decoder": Refused((False,), "an encoder used as a decoder is not served"),
    "add_cross_attention": Refused((False,), "cross-attention of a decoder-only family is not served"),
    "is_causal": Used(True),  # whatever is false to Python makes a decoder see both ways, null too
    "pruned_heads": Refused(({}, None), "pruned heads are not served"),
    "per_layer_config": Refused((None, {}), "layers of different shapes are not served"),
    "tie_last_hidden_states": Harmless(),
    "quantization_config": Refused((None,), "quantised weights are not served"),
    "name_or_path": Harmless(),
    "task_specific_params": Harmless(),
    "finetuning_task": Harmless(),
    "tokenizer_class": Harmless(),
    "prefix": Harmless(),
    "auto_map": Harmless(),
    # Of the first releases.
    "output_past": Harmless(),
    "torchscript": Harmless(),
    "use_bfloat16": Harmless(),
    "tf_legacy_loss": Harmless(),
    "xla_device": Harmless(),
    "cross_attention_hidden_size": Harmless(),  # there is none
}


def as_configured(config: TransformerConfig, names: Collection[str]) -> TransformerConfig:
    """The ``settle`` of a family whose ``config.json`` leaves nothing open."""
    return config


@dataclass(frozen=True)
class Family:
    """One public family.

    Attributes:
        name: the ``model_type`` of its configuration.
        classes: transformers' classes that can be loaded, and what each says of our configuration (``{"head": "lm"}``, …); the first is
            the one for a configuration that names none.
        fields: every field of its configuration class, beside those of every class (:data:`COMMON`), which it may override.
        read: their values, defaults filled in -> fields of :class:`TransformerConfig` (without those of ``classes``).
        write: the inverse: fields of theirs.
        weights: every tensor; those that a model does not have (a bias, say) are left out.
        prefixes: what may stand before the names of a file, the usual one first (a base model lacks "transformer.", say).
        settle: the configuration as the names of a file's tensors (as the table has them) make it, where ``config.json`` leaves it open.
        ignored: regular expressions of tensors that a file may hold beside those of the table that the model has (tables, masks, the
            parts of another head).
    """

    name: str
    classes: Mapping[str, Mapping[str, Any]]
    fields: Mapping[str, Field]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[TransformerConfig], dict[str, Any]]
    weights: tuple[Weight, ...]
    prefixes: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = field(default=())
    settle: Callable[[TransformerConfig, Collection[str]], TransformerConfig] = as_configured

    def field(self, name: str) -> Field | None:
        """What the field means, or ``None`` for one that the family does not have."""
        return self.fields.get(name, COMMON.get(name))


def read_config(family: Family, values: Mapping[str, Any]) -> TransformerConfig:
    """The configuration that a ``config.json`` of the family means.

    Raises:
        CheckpointError: a value that is not served, a class that is not known, or fields that do not fit each other.
    """
    faults = [
        f"{name} must be {' or '.join(map(repr, known.allowed))}, got {value!r}: {known.why}"
        for name, value in values.items()
        if isinstance(known := family.field(name), Refused) and value not in known.allowed
    ]
    classes = values.get("architectures") or [next(iter(family.classes))]
    classes = [classes] if isinstance(classes, str) else classes
    chosen = family.classes.get(classes[0])
    if chosen is None:
        faults.append(f"architectures must be one of {', '.join(family.classes)}, got {classes[0]!r}")
    if faults:
        raise CheckpointError(f"a {family.name} model that is not served: " + "; ".join(faults))
    unknown = sorted(name for name in values if family.field(name) is None and not name.startswith("_"))
    if unknown:
        warnings.warn(
            f"config.json has fields that {family.name} does not know: {', '.join(unknown)}; they are ignored",
            stacklevel=3,
        )
    filled = {name: known.default for name, known in {**COMMON, **family.fields}.items()} | dict(values)
    kept = {name: value for name, value in values.items() if not isinstance(family.field(name), Used)}
    assert chosen is not None
    try:
        # A family may read what is saved as another one: a part of a model with several.
        return TransformerConfig(
            **{"family": family.name, "family_fields": kept, **within_vocabulary(family.read(filled)), **chosen},
        )
    except (
        TypeError,
        ValueError,
        KeyError,
        ArithmeticError,
        AttributeError,
    ) as error:  # whatever stands in the place of a number
        raise CheckpointError(f"config.json is no {family.name} configuration: {error}") from error


def within_vocabulary(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without special tokens that the vocabulary does not have: a family's defaults, in the file of a small model."""
    limit = fields["vocab_size"]
    known = dict(fields)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        value = fields.get(name)
        tokens = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
        if any(isinstance(token, int) and token >= limit for token in tokens):
            kept = tuple(token for token in tokens if token < limit)
            warnings.warn(f"{name} {value} is beyond the vocabulary of {limit} tokens: ignored", stacklevel=5)
            known[name] = None if not kept else kept if isinstance(value, (tuple, list)) else kept[0]
    return known


def write_config(family: Family, config: TransformerConfig) -> dict[str, Any]:
    """The ``config.json`` of the family that means ``config``.

    Raises:
        ValueError: the family cannot express it; the message names the fields.
    """
    fitting = [
        name
        for name, says in family.classes.items()
        if all(getattr(config, key) == value for key, value in says.items())
    ]
    kept = config.family_fields if config.family == family.name and config.family_fields is not None else {}
    values = {**kept, "model_type": family.name, **family.write(config)}
    if fitting:
        values["architectures"] = fitting[:1]
    try:
        again = read_config(family, values)
    except CheckpointError as error:
        raise ValueError(f"the family {family.name} cannot express this model: {error}") from error
    lost = [
        f"{entry.name} = {getattr(config, entry.name)!r}"
        for entry in dataclasses.fields(config)
        if entry.name not in ("family", "family_fields") and getattr(again, entry.name) != getattr(config, entry.name)
    ]
    if lost:
        raise ValueError(f"the family {family.name} cannot express this model: {', '.join(lost)}")
    return values
