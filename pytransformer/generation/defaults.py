"""What a checkpoint's generation_config.json means for :func:`pytransformer.generation.generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytransformer.model.generation_defaults import FILE_NAME, GenerationDefaults

_BEAMS = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False}
_LIMITS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # with what means none in the file


def checkpoint_options(generation_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of ``generate`` as the authors of a checkpoint mean it; what their file does not say is left out.

    ``model.generate(ids, 100, **checkpoint_options(model.generation_config))``. End tokens are in the model's configuration already.
    A file that says ``do_sample: false`` means greedy, whatever limits stand beside it; one that says ``true`` without a temperature
    means 1. A ``top_k`` that it does not state is none (transformers takes 50 there). ``num_beams`` above 1 means beam search, without a
    temperature, unless the file says ``do_sample: true``, which there is none of with beams. How many results it wants is left out.

    Args:
        generation_config: the file's fields, as ``model.generation_config`` has them.

    Raises:
        ValueError: a field is wrong.
    """
    defaults = _parsed(generation_config)
    options: dict[str, Any] = {}
    has_beams = (defaults.num_beams or 1) > 1 and not defaults.do_sample
    if defaults.do_sample is False or has_beams:
        options["temperature"] = 0.0
    elif defaults.temperature is not None:
        options["temperature"] = defaults.temperature
    elif defaults.do_sample:
        options["temperature"] = 1.0
    if options.get("temperature") != 0.0:
        values = {name: getattr(defaults, name) for name in _LIMITS}
        options.update({name: value for name, value in values.items() if value not in (None, _LIMITS[name])})
    if has_beams:
        values = {name: getattr(defaults, name) for name in _BEAMS}
        options.update({name: value for name, value in values.items() if value not in (None, _BEAMS[name])})
    if defaults.repetition_penalty not in (None, 1.0):
        options["repetition_penalty"] = defaults.repetition_penalty
    return options


def with_defaults(
    given: Mapping[str, Any], generation_config: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options with a checkpoint's in the place of those that were not ``given`` (or ``None``), and the latter alone.

    What was given wins where the two contradict each other: a temperature of 0 is greedy, without the checkpoint's limits; and a limit
    means drawing, also from a checkpoint that is meant to be greedy. With beams that were given nothing is drawn; who gives a temperature
    or a limit wants no beams.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    taken = {name: value for name, value in checkpoint_options(generation_config).items() if name not in chosen}
    if any(name in chosen for name in ("temperature", *_LIMITS)) or chosen.get("num_beams") == 1:
        taken = {name: value for name, value in taken.items() if name not in _BEAMS}
    if chosen.get("num_beams", 1) != 1:
        taken = {name: value for name, value in taken.items() if name != "temperature" and name not in _LIMITS}
    elif chosen.get("temperature") == 0:
        taken = {name: value for name, value in taken.items() if name not in _LIMITS}
    elif taken.get("temperature") == 0.0 and any(name in chosen for name in _LIMITS):
        del taken["temperature"]
    return {**taken, **chosen}, taken


def not_followed(generation_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the file asks for beyond :func:`checkpoint_options` that would change the text."""
    defaults = _parsed(generation_config)
    plain = {"num_beams": 1, "no_repeat_ngram_size": 0, "typical_p": 1.0, "min_length": 0, "min_new_tokens": 0}
    if "num_beams" in checkpoint_options(generation_config):
        del plain["num_beams"]
    names = (
        *plain, "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
    )  # fmt: skip
    return {
        name: getattr(defaults, name) for name in names if getattr(defaults, name) not in (None, (), plain.get(name))
    }


def _parsed(generation_config: Mapping[str, Any] | None) -> GenerationDefaults:
    try:
        return GenerationDefaults.from_dict({} if generation_config is None else generation_config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{FILE_NAME}: {error}") from error
