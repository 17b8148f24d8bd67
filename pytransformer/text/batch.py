"""What calling a tokenizer gives: ids and masks of one text or many, cut and padded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

PADDINGS = (True, False, "longest", "max_length", "do_not_pad")
TRUNCATIONS = (True, False, None, "longest_first", "only_first", "only_second", "do_not_truncate")
SIDES = ("left", "right")


class Encoded(dict[str, Any]):
    """Lists or tensors by name, as keys and as attributes: ``input_ids``, ``attention_mask``, ``token_type_ids``, …

    ``model(**encoded)`` hands them on; :meth:`to` moves them.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the tokenizer gave no {name!r}, only {', '.join(self)}") from None

    def to(self, device: str | torch.device | int) -> Encoded:
        """Moves the tensors, in place, and returns itself.

        Raises:
            ValueError: they are no tensors.
        """
        if not all(isinstance(value, torch.Tensor) for value in self.values()):
            raise ValueError('what the tokenizer gave are no tensors: call it with return_tensors="pt"')
        self.update({name: value.to(device) for name, value in self.items()})
        return self


@dataclass(frozen=True)
class Shape:
    """How long sequences become.

    Attributes:
        padding: "longest", "max_length" or ``None``.
        truncation: "longest_first", "only_first", "only_second" or ``None``.
        max_length: in tokens, special ones included.
        multiple: padded lengths are multiples of it.
        side: of the padding.
    """

    padding: str | None
    truncation: str | None
    max_length: int | None
    multiple: int | None
    side: str


def find_shape(
    padding: bool | str,
    truncation: bool | str | None,
    max_length: int | None,
    model_max_length: int | None,
    multiple: int | None,
    side: str,
) -> Shape:
    """Checks the arguments and resolves them by the rules of Hugging Face transformers.

    ``max_length`` alone cuts. Without it the model's own limit counts, and where there is none nothing is cut, nor padded to it.
    """
    for name, value, allowed in (
        ("padding", padding, PADDINGS),
        ("truncation", truncation, TRUNCATIONS),
        ("padding_side", side, SIDES),
    ):
        # 0 and 1 are equal to False and True.
        if value not in allowed or (isinstance(value, int) and not isinstance(value, bool)):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    for name, size in (("max_length", max_length), ("pad_to_multiple_of", multiple)):
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"{name} must be a whole number of at least 1 or None, got {size!r}")
    if truncation is None:
        truncation = "longest_first" if max_length is not None and padding is False else False
    cut = {True: "longest_first", False: None, "do_not_truncate": None}.get(truncation, truncation)
    pad = {True: "longest", False: None, "do_not_pad": None}.get(padding, padding)
    if padding is True and max_length is not None and cut is None:
        warnings.warn(
            'max_length has no effect with padding=True and no truncation; padding="max_length" pads to it',
            stacklevel=4,
        )
    if max_length is None:
        max_length = model_max_length
        if max_length is None:
            cut = None
            pad = None if pad == "max_length" else pad
    if cut and pad and multiple and max_length is not None and max_length % multiple:
        raise ValueError(
            f"max_length {max_length}, to which texts are cut, is no multiple of pad_to_multiple_of {multiple}"
        )
    return Shape(str(pad) if pad else None, str(cut) if cut else None, max_length, multiple, side)


def pad(rows: dict[str, list[list[Any]]], shape: Shape, fillers: Mapping[str, Any]) -> None:
    """Lengthens all rows, in place, to that of the longest or to ``max_length``; ``fillers`` are the values to do so with, by name."""
    if shape.padding is None:
        return
    lengths = [len(row) for row in rows["input_ids"]]
    length = shape.max_length if shape.padding == "max_length" else max(lengths, default=0)
    assert length is not None
    if shape.multiple:
        length = -(-length // shape.multiple) * shape.multiple
    for name, values in rows.items():
        for index, row in enumerate(values):
            more = [fillers[name]] * (length - len(row))
            values[index] = [*row, *more] if shape.side == "right" else [*more, *row]


def to_tensors(rows: Mapping[str, Sequence[Any]], kind: str) -> dict[str, Any]:
    """int64 tensors ("pt") or arrays ("np"), one row for each text.

    Raises:
        ValueError: rows of unequal lengths, or another ``kind``.
    """
    if kind not in ("pt", "np"):
        raise ValueError(f'return_tensors must be "pt", "np" or None, got {kind!r}')
    lengths = sorted({len(row) for row in rows["input_ids"]})
    if len(lengths) > 1:
        raise ValueError(
            f"texts of {lengths[0]} to {lengths[-1]} tokens are no tensor: pad them with padding=True, or cut them with truncation=True"
        )
    arrays = {}
    for name, values in rows.items():
        tail = (2,) if name == "offset_mapping" else ()
        # Without any element the shape has to be said, and without a type it would be a floating one.
        shape = (len(values), *(lengths or (0,)), *tail)
        arrays[name] = np.array(values, dtype=np.int64).reshape(shape)
    return arrays if kind == "np" else {name: torch.from_numpy(array) for name, array in arrays.items()}


def id_lists(ids: Any) -> list[int] | list[list[int]]:
    """Ids of one sequence (a number, a list, a tensor or array of 0 or 1 dimensions) or of several (nested, or of 2 dimensions).

    Raises:
        TypeError: they are no whole numbers.
        ValueError: negative ids, or more than 2 dimensions.
    """
    if isinstance(ids, Mapping):
        ids = ids["input_ids"]
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if _is_number(ids):
        return _checked([ids])
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise TypeError(f"token ids must be whole numbers, got {type(ids).__name__} {ids!r}")
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in ids]
    if rows and all(isinstance(row, (list, tuple)) for row in rows):
        return [_checked([token.tolist() if hasattr(token, "tolist") else token for token in row]) for row in rows]
    return _checked(rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked(ids: list[Any]) -> list[int]:
    for token in ids:
        if isinstance(token, (list, tuple)):
            raise ValueError("token ids must have at most 2 dimensions: one sequence, or a batch of them")
        if not _is_number(token):
            raise TypeError(f"token ids must be whole numbers, got {type(token).__name__} {token!r}")
        if token < 0:
            raise ValueError(
                f"token ids must not be negative, got {token}; replace what marks no token (such as labels of -100) first"
            )
    return ids
