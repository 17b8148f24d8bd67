"""What configurations and tables of several families have in common: names of activations, labels, old spellings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Field, Harmless
from .weights import Weight, always, same

# Their name of an activation -> ours. The tanh forms differ from each other by the order of operations alone.
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}

# What older releases wrote into config.json for generate(); the logits do not depend on it.
GENERATION: dict[str, Field] = {
    name: Harmless()
    for name in (
        "forced_bos_token_id", "forced_eos_token_id", "max_length", "min_length", "max_new_tokens", "num_beams", "num_beam_groups",
        "early_stopping", "length_penalty", "repetition_penalty", "diversity_penalty", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "do_sample", "temperature", "top_k", "top_p", "typical_p",
        "remove_invalid_values", "output_scores", "return_dict_in_generate", "suppress_tokens", "begin_suppress_tokens",
        "exponential_decay_length_penalty", "sep_token_id",
    )
}  # fmt: skip


def read_activation(field: str, name: Any) -> str:
    """Our name of one of their activations; ValueError, naming the ``field``, for one that is not served."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"{field} must be one of {', '.join(sorted(_ACTIVATIONS))}, got {name!r}")
    return _ACTIVATIONS[name]


def write_activation(name: str) -> str:
    """Their name of one of ours (not gated)."""
    return _NAMES.get(name, name)


def read_labels(values: Mapping[str, Any]) -> dict[str, Any]:
    """``num_labels`` and ``problem`` of a classifier; ``id2label`` counts before ``num_labels``.

    A model without a ``problem_type`` decides by the labels that it is given: one is a regression, several are classes.
    """
    names = values["id2label"]
    count = len(names) if names else values["num_labels"] or 2
    problem = {
        None: "regression" if count == 1 else "multi_class",
        "regression": "regression",
        "single_label_classification": "multi_class",
        "multi_label_classification": "binary" if count == 1 else "multi_label",
    }.get(values["problem_type"])
    if problem is None or (problem == "multi_class" and count == 1):
        raise ValueError(f"problem_type must be one that can have {count} labels, got {values['problem_type']!r}")
    return {"num_labels": count, "problem": problem}


def write_labels(config: TransformerConfig) -> dict[str, Any]:
    """The fields of which :func:`read_labels` makes the same; the labels' names are numbers unless the model was loaded with others."""
    kept = config.family_fields or {}
    names: dict[str, Any] = {}
    if len(kept.get("id2label") or "ab") != config.num_labels:  # two is what is meant where a file has none
        labels = {str(number): f"LABEL_{number}" for number in range(config.num_labels)}
        names = {"id2label": labels, "label2id": {label: int(number) for number, label in labels.items()}}
    if config.head != "classification":
        return names
    kinds = {"multi_class": "single_label_classification", "regression": "regression"}
    return {**names, "problem_type": kinds.get(config.problem, "multi_label_classification")}


def with_aliases(values: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """The values with those that stand under another name (its name -> the field) in the field's place, as a file's order has it.

    transformers reads a field under its own name first and then under the other, so the other counts where both are there.
    """
    return {**values, **{field: values[name] for name, field in aliases.items() if values[name] is not None}}


def old_norm(ours: str, theirs: str, *, when: Callable[[TransformerConfig], bool] = always) -> tuple[Weight, ...]:
    """A LayerNorm whose weight and bias are called gamma and beta in files converted from TensorFlow."""
    return tuple(
        same(f"{ours}.{name}", f"{theirs}.{spelling}", when=when)
        for name, old in (("weight", "gamma"), ("bias", "beta"))
        for spelling in (name, old)
    )
