"""A model in a folder: ``config.json`` and ``model.safetensors``. Never pickle.

Writing never leaves a folder that looks complete but is not. Each file is written beside its place, flushed to the disk and moved there in
one step. Where the weights alone change (a training run that saves again), a reader sees either the old or the new ones. Where the
configuration changes too, the old ``config.json`` is removed first and the new one comes last, so that weights never stand beside a
configuration that is not theirs.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import TransformerConfig
from .transformer import Transformer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class CheckpointError(ValueError):
    """A folder that does not hold a model that can be loaded; the message lists everything that does not fit."""


def save(model: Transformer, folder: str | os.PathLike[str]) -> None:
    """Writes the model's weights and configuration into ``folder``, which is made if needed; other files in it are left alone.

    Weights keep their dtype. Tied weights are written once. After a crash or a kill at any moment the folder holds the model it held
    before, the new one, or (only where an earlier model of another configuration was being replaced) visibly none.

    Raises:
        TypeError: not a :class:`Transformer`.
        ValueError: a parameter has no values (it is on the meta device).
        OSError: the folder cannot be written.
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"save writes a Transformer, got {type(model).__name__}")
    stored = _stored(model)
    meta = [name for name, tensor in stored.items() if tensor.is_meta]
    if meta:
        raise ValueError(f"parameters on the meta device have no values to save: {', '.join(meta)}")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()}
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    config_path, text = place / CONFIG_FILE, model.config.to_json()
    if config_path.exists() and config_path.read_text(encoding="utf-8") != text:
        config_path.unlink()
        _flush(place)

    def write_weights(path: Path) -> None:
        from safetensors.torch import save_file  # the ops and modules work without safetensors

        save_file(tensors, path, metadata={"format": "pt"})

    write_atomically(place / WEIGHTS_FILE, write_weights)
    write_atomically(config_path, lambda path: path.write_text(text, encoding="utf-8"))


def load(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Transformer:
    """The model that :func:`save` wrote, in evaluation mode.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``.
        device: where to put it; by default torch's default device.
        dtype: floating dtype of the parameters; by default as stored.

    Raises:
        FileNotFoundError: the folder or one of the two files is missing.
        CheckpointError: a file is truncated or not what its name says, or names, shapes or dtypes do not fit the configuration, or it is
            a model of Hugging Face transformers; nothing is loaded then.
    """
    place = Path(folder)
    if foreign := describe_foreign(place):
        raise CheckpointError(foreign)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (place / name).is_file():
            raise FileNotFoundError(f"{place} does not hold a complete model: there is no {name}")
    config = read_config(place / CONFIG_FILE)
    device = torch.get_default_device() if device is None else torch.device(device)
    model = Transformer(config, device="meta")
    stored = _read_weights(place / WEIGHTS_FILE, _stored(model), device)
    if dtype is not None:
        stored = {name: tensor.to(dtype) for name, tensor in stored.items()}
    model.to_empty(device=device)  # makes the tables of positions; the parameters are replaced next
    stored |= {name: stored[first] for name, first in model.tied_names().items()}
    model.load_state_dict(stored, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` make a file beside ``path``, flushes it to the disk, and moves it to ``path`` in one step.

    On an error the file beside is removed and ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove_leftovers(path)
    try:
        temporary.touch()
        permissions = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(permissions)  # safetensors makes files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def _remove_leftovers(path: Path) -> None:
    """Files that a killed process was writing; another living one may be writing too, so only those untouched for an hour."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink()


def _flush(folder: Path) -> None:
    """Makes the folder's entries survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _stored(model: Transformer) -> dict[str, Tensor]:
    """Name -> tensor as in the file: the state_dict without second names."""
    second_names = model.tied_names()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in second_names}


def describe_foreign(folder: Path) -> str | None:
    """Where the folder is a model of Hugging Face transformers: what it is, and how it is run with this package."""
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or not ({"model_type", "architectures", "transformers_version"} & set(values)):
        return None
    return (
        f"{folder} holds a model of Hugging Face transformers (model_type {values.get('model_type')!r}), not one that this package wrote. "
        f"It runs on these kernels inside transformers: import pytransformer.interop.huggingface, then "
        f'AutoModelForCausalLM.from_pretrained({str(folder)!r}, attn_implementation="pytransformer"); see docs/huggingface.md'
    )


def read_config(path: Path) -> TransformerConfig:
    """The configuration that a model's ``config.json`` holds; :class:`CheckpointError` if it holds none."""
    try:
        return TransformerConfig.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{path}: {error}") from error


def _read_weights(path: Path, expected: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Every expected tensor, after the whole file has been found to fit."""
    with _opened(path, device) as file:
        names = set(file.keys())
        faults = [f"missing: {name}" for name in sorted(set(expected) - names)]
        faults += [f"unexpected: {name}" for name in sorted(names - set(expected))]
        for name in sorted(names & set(expected)):
            part = file.get_slice(name)
            shape, stored_dtype = tuple(part.get_shape()), part.get_dtype()
            if shape != tuple(expected[name].shape):
                faults.append(f"{name}: shape {shape}, expected {tuple(expected[name].shape)}")
            if stored_dtype not in ("F64", "F32", "F16", "BF16"):
                faults.append(f"{name}: dtype {stored_dtype}, expected F64, F32, F16 or BF16")
        if faults:
            raise CheckpointError(f"{path} does not fit its {CONFIG_FILE}: " + "; ".join(faults))
        return {name: file.get_tensor(name) for name in expected}


@contextlib.contextmanager
def _opened(path: Path, device: torch.device) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
