"""A model in a folder: our own layout, or that of a public family (Hugging Face). safetensors and JSON, never pickle.

Both are ``config.json`` beside ``model.safetensors``, or beside several files with an index; they differ in the names of the tensors and of
the configuration's fields. Which a folder has is seen from the fields.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pytransformer.nn import RowBlocks

from .config import TransformerConfig
from .families import FAMILIES, CheckpointError, Family, find_family, mapping, write_config
from .families import read_config as read_family_config
from .families.family import within_vocabulary
from .families.weights import Weight
from .filling import OWN, fill, fit, likeness, own_family, without_collector
from .quantized import names_of_codes
from .tensor_files import WEIGHTS_FILE, TensorFiles
from .transformer import Transformer
from .writing import CONFIG_FILE, Piece, write_model

__all__ = ["CONFIG_FILE", "OWN", "WEIGHTS_FILE", "CheckpointError", "load", "read_config", "read_folder", "save"]

GENERATION_FILE = "generation_config.json"
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# The share of a file's tensors whose names must be a family's, for it to be worth a word.
_ALIKE = 0.5
# Fields that no configuration of ours has and every one of a public family has.
_PUBLIC_FIELDS = {"model_type", "architectures", "transformers_version"}


def save(
    model: Transformer,
    folder: str | os.PathLike[str],
    *,
    family: str | None = None,
    max_shard_bytes: int = 50 * 10**9,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Writes the model's weights and configuration into ``folder``, which is made if needed; other files in it are left alone.

    Tied weights are written once. After a crash or a kill at any moment the folder holds the model it held before, the new one, or (only
    where more than one file of weights had to be replaced) visibly none. A public family's folder loads in transformers.

    Args:
        family: the public family to save as ("llama", …), or "pytransformer" for our own layout; by default what the model was loaded from.
        max_shard_bytes: weights beyond so many bytes go into several files.
        dtype: floating dtype to write; by default that of each weight.
        progress: called with the number of bytes that were written since the last call.

    Raises:
        TypeError: not a :class:`Transformer`.
        ValueError: a parameter has no values (it is on the meta device), there is no such family, or it cannot express this model.
        OSError: the folder cannot be written.
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"save writes a Transformer, got {type(model).__name__}")
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be a positive int, got {max_shard_bytes!r}")
    values = _values(model)
    meta = [name for name, value in values.items() if (value if isinstance(value, Tensor) else value[0]).is_meta]
    if meta:
        raise ValueError(f"parameters on the meta device have no values to save: {', '.join(meta)}")
    outline = {name: _outline(value) for name, value in values.items()}
    if model.config.quantization is not None:
        if family not in (None, OWN):
            raise ValueError(
                "a quantised model is saved in our own layout, as no other tool reads its codes: family must be "
                f"{OWN!r} or None, got {family!r}"
            )
        family = OWN
    target = _target(model.config.family if family is None else family)
    written = None if target is None else write_config(target, model.config)
    codes = names_of_codes(model)
    weights = mapping.to_write(target or own_family(outline), model.config, outline)
    pieces = [
        piece
        for weight in weights
        for piece in _Taken(weight, model.config, values, None if weight.ours in codes else dtype).pieces()
    ]
    texts = {CONFIG_FILE: _config_text(model.config, written, pieces)}
    if model.generation_config is not None:
        texts[GENERATION_FILE] = json.dumps(model.generation_config, indent=2) + "\n"
    write_model(Path(folder), pieces, texts, max_shard_bytes, progress)


def load(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    mmap: bool | None = None,
) -> Transformer:
    """The model that a folder holds, in our own layout or a public family's, in evaluation mode.

    Args:
        folder: holds ``config.json`` and safetensors files; ``generation_config.json`` is read where there is one, its special tokens into
            the configuration, all of it into ``model.generation_config``.
        device: where to put it; by default torch's default device.
        dtype: floating dtype of the parameters; by default as stored.
        mmap: whether weights on a CPU stay in the mapped files where the dtype is the stored one, which takes no time and no memory until
            they are used; what is written to them stays in memory. ``None`` = where it can be; ``False`` = copies, which do not depend on
            the files any more.

    Raises:
        FileNotFoundError: the folder or one of the files is missing.
        CheckpointError: a file is truncated or not what its name says; names, shapes or dtypes do not fit the configuration, all of which
            are listed; or the configuration asks for what is not served. Nothing is loaded then.
        ValueError: ``mmap=True`` for another device than the CPU.
    """
    place = Path(folder)
    device = torch.get_default_device() if device is None else torch.device(device)
    if mmap and device.type != "cpu":
        raise ValueError(f"mmap=True is for weights on a CPU, got device={str(device)!r}")
    with without_collector():
        config, family = read_folder(place)
        files = TensorFiles.of_folder(place)
        model, found = fit(place, config, family, files)
        model.make_tables(device)  # the parameters come next
        fill(model, found, files, device, dtype, mapped=device.type == "cpu" and mmap is not False)
        model.generation_config = read_generation(place)
        return model.eval()


def read_config(path: Path) -> TransformerConfig:
    """The configuration that a ``config.json`` of either layout holds; :class:`CheckpointError` if it holds none."""
    return _parsed(path)[0]


def read_folder(folder: Path) -> tuple[TransformerConfig, Family | None]:
    """The configuration of a model's folder, with the special tokens of ``generation_config.json``, and its family (``None``: our own).

    Raises:
        FileNotFoundError: there is no ``config.json``.
        CheckpointError: a file is damaged, or the configuration is not served.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} does not hold a complete model: there is no {CONFIG_FILE}")
    config, family = _parsed(path)
    generation = read_generation(folder)
    if family is not None and generation is not None:
        tokens = {name: generation[name] for name in _SPECIAL_TOKENS if generation.get(name) is not None}
        try:
            known = within_vocabulary({**tokens, "vocab_size": config.vocab_size})
            config = dataclasses.replace(config, **known)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{folder / GENERATION_FILE}: {error}") from error
    return config, family


def read_generation(folder: Path) -> dict[str, Any] | None:
    """What ``generation_config.json`` holds, or ``None`` where there is none."""
    path = folder / GENERATION_FILE
    return _read_json(path) if path.is_file() else None


def describe_public(folder: Path) -> str | None:
    """Where the folder is a model in the layout of a public family: a sentence that says so."""
    try:
        values = _read_json(folder / CONFIG_FILE)
    except (OSError, CheckpointError):
        return None
    if not _PUBLIC_FIELDS & set(values):
        return None
    return f"{folder} holds a model of Hugging Face transformers (model_type {values.get('model_type')!r})"


def _parsed(path: Path) -> tuple[TransformerConfig, Family | None]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        if not isinstance(values, dict) or not _PUBLIC_FIELDS & set(values):
            return TransformerConfig.from_json(text), None
        try:
            family = find_family(values.get("model_type"))
        except CheckpointError as error:
            raise CheckpointError(f"{error}{_seeming(path.parent)}") from error
        return read_family_config(family, values), family
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: a configuration must be JSON: {error}") from error
    except (ValueError, TypeError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{path}: {error}") from error


def _seeming(folder: Path) -> str:
    """What family the tensors of a folder seem to be of, whose configuration names none that is known."""
    with contextlib.suppress(OSError, CheckpointError):
        share, alike = likeness(TensorFiles.of_folder(folder))
        if share > _ALIKE:
            return f"; by their names {share:.0%} of its tensors could be of {' or '.join(alike[:4])}"
    return ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold an object, got {type(values).__name__}")
    return values


def _target(name: str | None) -> Family | None:
    if name is None or name == OWN:
        return None
    if name not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join((OWN, *sorted(FAMILIES)))}, got {name!r}")
    return FAMILIES[name]


def _config_text(config: TransformerConfig, written: dict[str, Any] | None, pieces: list[Piece]) -> str:
    """Our own configuration, or a family's with the dtype of the weights."""
    if written is None:
        return dataclasses.replace(config, family=None, family_fields=None).to_json()
    values = {name: value for name, value in written.items() if name != "torch_dtype"}  # the older name
    sizes: dict[torch.dtype, int] = {}
    for piece in pieces:
        sizes[piece.dtype] = sizes.get(piece.dtype, 0) + piece.numel
    # transformers loads in this dtype, whatever the files hold.
    values["dtype"] = str(max(sizes, key=sizes.__getitem__)).removeprefix("torch.")
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _values(model: Transformer) -> dict[str, Tensor | Sequence[nn.Parameter]]:
    """Name in the state_dict -> tensor, or the row blocks that it is a pile of: a state_dict would put those together in memory."""
    values: dict[str, Tensor | Sequence[nn.Parameter]] = {}
    for place, module in model.named_modules(remove_duplicate=False):
        prefix = f"{place}." if place else ""
        if isinstance(module, RowBlocks):
            values[f"{prefix}weight"] = module.blocks
        for kind, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not isinstance(module, RowBlocks) or kind == "bias":
                values[prefix + kind] = parameter.detach()
    return values


def _outline(value: Tensor | Sequence[nn.Parameter]) -> Tensor:
    if isinstance(value, Tensor):
        return value
    rows = sum(block.shape[0] for block in value)
    return torch.empty(rows, *value[0].shape[1:], dtype=value[0].dtype, device="meta")


class _Taken:
    """One of our tensors, taken apart when its first part is written and let go with the last."""

    def __init__(
        self,
        weight: Weight,
        config: TransformerConfig,
        values: Mapping[str, Tensor | Sequence[nn.Parameter]],
        dtype: torch.dtype | None,
    ) -> None:
        self._weight, self._config, self._value, self._dtype = weight, config, values[weight.ours], dtype
        self._parts: dict[int, Tensor] = {}

    def pieces(self) -> Iterator[Piece]:
        """What is to be written, in the order of the names in the file."""
        outline = mapping.split(self._weight, self._config, _outline(self._value).to("meta"))
        for index, (name, part) in enumerate(zip(self._weight.theirs, outline)):
            dtype = self._dtype if self._dtype is not None and part.is_floating_point() else part.dtype
            yield Piece(name, tuple(part.shape), dtype, lambda index=index: self._part(index))  # type: ignore[misc]

    @torch.no_grad()
    def _part(self, index: int) -> Tensor:
        if not self._parts:
            self._parts = dict(enumerate(mapping.split(self._weight, self._config, self._value)))
        return self._parts.pop(index)
