"""RoPE as the configurations of public families spell it, to our fields and back.

Today's spelling (transformers 5.x) is ``rope_parameters``, one mapping with everything, or one for each type of layer; the older one is
``rope_theta``, ``partial_rotary_factor`` and ``rope_scaling`` beside each other. Both are read, where both are there ``rope_scaling``
first, and what stands inside a mapping counts before what stands beside it, as transformers 5.23 does it
(``modeling_rope_utils.RotaryEmbeddingConfigMixin``). What is read is put into one form: the numbers that a file leaves to be derived
(``factor``, ``original_max_position_embeddings``) are filled in, so that the same rotation is the same configuration.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from pytransformer.ops.rope.call import check_positive, check_scaling
from pytransformer.reference.rope import rope_frequencies

from ..config import TransformerConfig

FULL, SLIDING = "full_attention", "sliding_attention"

# What each method needs, and what it may have; transformers has no more than these.
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor"),
}
_LISTS = ("short_factor", "long_factor")
_STRETCHED = ("llama3", "yarn", "longrope")
_KNOWN = {key for keys in (*_NEEDED.values(), *_OPTIONAL.values()) for key in keys} | {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "max_position_embeddings",
    "finetuned",  # of the first YaRN checkpoints: says how they came about
}  # fmt: skip


def read_rope(
    values: Mapping[str, Any],
    head_dim: int,
    *,
    base: float = 10_000.0,
    theta: str = "rope_theta",
    fraction: float | None = None,
    fraction_name: str = "partial_rotary_factor",
    renamed: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Fields of :class:`TransformerConfig` for a family with one RoPE for all layers.

    Args:
        values: the family's configuration; never changed.
        head_dim: width of a head.
        base: the family's, where the file says nothing.
        theta, fraction_name: how the family spells the base and the rotated part of a head outside ``rope_parameters``.
        fraction: the family's rotated part of a head where the file says nothing. ``None``: the family's plain RoPE ignores it, and its
            other methods cannot have one (transformers' Llama then crashes).
        renamed: names of methods that mean another one in this family (Phi-3).

    Returns:
        positions, rope_base, rope_scaling, rotary_dim and max_seqlen. "dynamic" serves sequences ``factor`` times as long as
        ``max_position_embeddings``, the length from which on it stretches.

    Raises:
        ValueError: a method or a number that is not served.
    """
    given = _mapping(values.get("rope_scaling") or values.get("rope_parameters") or {})
    if nested := sorted({FULL, SLIDING} & set(given)):
        raise ValueError(f"rope_parameters for each type of layer ({', '.join(nested)}) are not served in this family")
    # Not setdefault: an outer length is the one that counts, whatever stands inside.
    outer_length = values.get("original_max_position_embeddings")
    length = given.get("original_max_position_embeddings") if outer_length is None else outer_length
    outside = values.get(fraction_name)
    rotated = given.get("partial_rotary_factor", fraction if outside is None else outside)
    rope_base, scaling, rotary_dim = _read(
        {**given, "original_max_position_embeddings": length},
        values["max_position_embeddings"],
        head_dim,
        base=given.get("rope_theta", base if values.get(theta) is None else values[theta]),
        fraction=rotated,
        ignores_fraction=fraction is None,
        renamed=renamed or {},
    )
    return {
        "positions": "rope",
        "rope_base": rope_base,
        "rope_scaling": scaling,
        "rotary_dim": rotary_dim,
        "max_seqlen": _context(values["max_position_embeddings"], scaling),
    }


def read_layered_rope(
    values: Mapping[str, Any], head_dim: int, *, base: float, local_base: float, local_theta: str
) -> dict[str, Any]:
    """The same for a family whose layers with a sliding window have a RoPE of their own (Gemma 3).

    Args:
        base, local_base: of full and of sliding layers, where the file says nothing.
        local_theta: the older spelling of the sliding layers' base. ``rope_theta`` and ``rope_scaling`` are of the full ones.
    """
    given = _mapping(values.get("rope_parameters") or {})
    if given and not {FULL, SLIDING} & set(given):
        raise ValueError(
            f"rope_parameters must be given for each type of layer ({FULL}, {SLIDING}), got {sorted(given)}"
        )
    scaling = _mapping(values.get("rope_scaling") or {})
    outside = {FULL: values.get("rope_theta"), SLIDING: values.get(local_theta)}
    found = {}
    for kind, usual in ((FULL, base), (SLIDING, local_base)):
        inside = {**_mapping(given.get(kind) or {}), **(scaling if kind == FULL else {})}
        # transformers looks for it beside the types of layers, where it never is.
        inside.pop("truncate", None)
        found[kind] = _read(
            inside,
            values["max_position_embeddings"],
            head_dim,
            base=inside.get("rope_theta", usual if outside[kind] is None else outside[kind]),
            fraction=inside.get("partial_rotary_factor", values.get("partial_rotary_factor")),
            ignores_fraction=True,
            renamed={},
        )
    return {
        "positions": "rope",
        "rope_base": found[FULL][0],
        "rope_scaling": found[FULL][1],
        "rotary_dim": found[FULL][2],
        "local_rope_base": found[SLIDING][0],
        "local_rope_scaling": found[SLIDING][1],
        "max_seqlen": _context(values["max_position_embeddings"], found[FULL][1] or found[SLIDING][1]),
    }


def write_rope(config: TransformerConfig, *, fraction: bool = False) -> dict[str, Any]:
    """The inverse of :func:`read_rope`: ``rope_parameters`` and ``max_position_embeddings``.

    Args:
        fraction: the family has a ``partial_rotary_factor``.

    Raises:
        ValueError: a method that transformers does not have.
    """
    parameters = _written(config.rope_base, config.rope_scaling)
    if fraction:
        parameters["partial_rotary_factor"] = _fraction(config.rotary_dim, config.head_dim)
    return {"rope_parameters": parameters, "max_position_embeddings": _trained(config.max_seqlen, config.rope_scaling)}


def write_layered_rope(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of :func:`read_layered_rope`."""
    local_base = config.rope_base if config.local_rope_base is None else config.local_rope_base
    return {
        "rope_parameters": {
            FULL: _written(config.rope_base, config.rope_scaling),
            SLIDING: _written(local_base, config.local_rope_scaling),
        },
        "max_position_embeddings": _trained(config.max_seqlen, config.rope_scaling or config.local_rope_scaling),
    }


def _mapping(value: Any) -> dict[str, Any]:
    """A copy: a configuration may share its mapping with others."""
    if not isinstance(value, Mapping):
        raise ValueError(f"rope_parameters and rope_scaling must be mappings, got {value!r}")
    return dict(value)


def _read(
    given: Mapping[str, Any],
    max_positions: int,
    head_dim: int,
    *,
    base: Any,
    fraction: Any,
    ignores_fraction: bool,
    renamed: Mapping[str, str],
) -> tuple[float, dict[str, Any] | None, int]:
    """(base, scaling in one form, rotary_dim) of one mapping of parameters."""
    method = given.get("rope_type") or given.get("type") or "default"
    method = renamed.get(method, method)
    if method not in _NEEDED:
        raise ValueError(f"rope_type must be one of {', '.join(_NEEDED)}, got {method!r}")
    if unknown := sorted(set(given) - _KNOWN):
        warnings.warn(f"RoPE parameters that are not known are ignored: {', '.join(unknown)}", stacklevel=6)
    if ignores_fraction and fraction not in (None, 1, 1.0) and method != "default":
        raise ValueError(f"partial_rotary_factor must be 1 with rope_type {method!r} in this family, got {fraction!r}")
    rotary_dim = head_dim if ignores_fraction or fraction is None else int(head_dim * _number("fraction", fraction))
    rope_base = check_positive("rope_theta", _number("rope_theta", base))
    scaling = _scaling(method, given, max_positions)
    if rotary_dim % 2 and rotary_dim < head_dim:
        rope_base, rotary_dim = _evened(rope_base, scaling, rotary_dim)
    if rotary_dim % 2 or not rotary_dim:
        raise ValueError(
            f"RoPE must rotate an even number of features above 0, got {rotary_dim} (head_dim {head_dim}, part {fraction})"
        )
    # What is refused is refused before a model is made: the numbers, and the tables at either side of the length that LongRoPE looks at.
    if scaling is not None:
        check_scaling(scaling, rotary_dim)
        rope_frequencies(
            rotary_dim, 1 + scaling.get("original_max_position_embeddings", 0), base=rope_base, scaling=scaling
        )
    rope_frequencies(rotary_dim, 1, base=rope_base, scaling=scaling)
    return rope_base, scaling, rotary_dim


def _evened(base: float, scaling: Mapping[str, Any] | None, rotary_dim: int) -> tuple[float, int]:
    """(base, number) of the next even number of features with the same frequencies as an odd one.

    transformers rounds such a number up, but keeps it in the exponents: base^(-2i / d) = (base^((d + 1) / d))^(-2i / (d + 1)).
    """
    if scaling is not None and scaling["rope_type"] in ("dynamic", "yarn"):
        raise ValueError(
            f"rope_type {scaling['rope_type']!r} needs an even number of rotated features, got {rotary_dim}"
        )
    return base ** ((rotary_dim + 1) / rotary_dim), rotary_dim + 1


def _scaling(method: str, given: Mapping[str, Any], max_positions: int) -> dict[str, Any] | None:
    if method == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": method}
    if missing := [key for key in _NEEDED[method] if given.get(key) is None]:
        raise ValueError(f"rope_type {method!r} needs {', '.join(missing)}, got {sorted(given)}")
    for key in (*_NEEDED[method], *_OPTIONAL.get(method, ())):
        if given.get(key) is not None:
            scaling[key] = [_number(key, item) for item in given[key]] if key in _LISTS else _number(key, given[key])
    if "truncate" in given and method == "yarn":
        scaling["truncate"] = bool(given["truncate"])
    if method == "dynamic":
        scaling["original_max_position_embeddings"] = max_positions
    if method in _STRETCHED:
        inside = given.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = max_positions if inside is None else inside
        check_positive("original_max_position_embeddings", scaling["original_max_position_embeddings"])
        # An explicit factor counts, not the ratio of the lengths.
        scaling.setdefault("factor", max_positions / scaling["original_max_position_embeddings"])
    return scaling


def _number(name: str, value: Any) -> Any:
    if isinstance(value, bool) and name == "truncate":
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"RoPE's {name} must be a number, got {value!r}")
    return value


def _context(max_positions: int, scaling: Mapping[str, Any] | None) -> int:
    dynamic = scaling is not None and scaling["rope_type"] == "dynamic"
    return math.ceil(max_positions * scaling["factor"]) if dynamic and scaling is not None else max_positions


def _trained(max_seqlen: int, scaling: Mapping[str, Any] | None) -> int:
    """The inverse of :func:`_context`."""
    if scaling is not None and _method(scaling) == "dynamic":
        return int(scaling["original_max_position_embeddings"])
    return max_seqlen


def _written(base: float, scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    method = _method(scaling or {})
    if method not in _NEEDED:
        raise ValueError(f"rope_scaling {method!r} has no place in this family; it has {', '.join(_NEEDED)}")
    written = {"rope_theta": base, **(scaling or {}), "rope_type": method}
    written.pop("type", None)
    if method == "dynamic":
        written.pop("original_max_position_embeddings", None)  # there it is max_position_embeddings
    return {key: list(value) if key in _LISTS else value for key, value in written.items()}


def _method(scaling: Mapping[str, Any]) -> Any:
    return scaling.get("rope_type") or scaling.get("type") or "default"


def _fraction(rotary_dim: int, head_dim: int) -> float:
    """The part of a head that ``int(head_dim * part)`` makes ``rotary_dim`` of."""
    part = rotary_dim / head_dim
    while int(head_dim * part) < rotary_dim:
        part = math.nextafter(part, 1.0)
    return part
