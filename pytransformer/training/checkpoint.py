"""Checkpoints that are complete or not there.

A checkpoint is a folder::

    step-00000200/model.safetensors, config.json    the model, as ``pytransformer.save`` writes it
                  tokenizer.json                    so that the folder is all that generation needs
                  optimizer.safetensors             optimizer state and random-number states
                  training.json                     step, configuration, hash of the data, where it ran
                  checkpoint.json                   size and SHA-256 of each of these files

It is written under another name, brought to the disk and then renamed; ``latest.json`` names the newest complete one and is replaced last.
Whenever the writer is killed, ``latest.json`` names a complete checkpoint (or isn't there yet). Nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pytransformer.training.files import read_json, sync, write_json

LATEST = "latest.json"
MANIFEST = "checkpoint.json"
TRAINING_STATE = "training.json"
OPTIMIZER = "optimizer.safetensors"
_RNG_PREFIX = "rng/"


def _pass(stage: str) -> None:
    """What ``stages`` does outside of tests."""


stages: Callable[[str], None] = _pass
"""Called with the name of each stage of a save as it is reached. Tests replace it, to be slow or to kill the process there."""


class CheckpointStore:
    """The checkpoints of one run, in ``folder``.

    Args:
        folder: where they are; made when the first is saved.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self._keep = keep

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Saves what ``write(folder)`` writes as the checkpoint of ``step``, and removes the oldest beyond ``keep``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".writing-{final.name}"
        temporary.mkdir()
        write(temporary)
        files = {path.name: _describe(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / MANIFEST, {"step": step, "files": files})
        stages("files written")
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        # A folder of this name was never pointed to, or points to the same step of the same run: a resumed run came here again.
        shutil.rmtree(final, ignore_errors=True)
        stages("before rename")
        os.replace(temporary, final)
        sync(self.folder)
        stages("renamed")
        write_json(self.folder / LATEST, {"checkpoint": final.name, "step": step})
        stages("pointed to")
        for old in self._complete()[: -self._keep]:
            if old != final:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None if there is none yet.

        It is the one that ``latest.json`` names. Where someone has removed that (as the errors advise), the newest that is there.

        Raises:
            ValueError: a file of it is damaged (cut, changed or missing), which no kill can cause; the message says how to go on.
        """
        complete = self._complete()
        pointer = self.folder / LATEST
        if not pointer.is_file():
            # A kill during the first save leaves one without a pointer.
            checkpoint = complete[-1] if len(complete) > 1 else None
        else:
            checkpoint = self.folder / self._name_in(pointer)
            if checkpoint.match("step-*") and not checkpoint.exists() and complete:
                checkpoint = complete[-1]
        if checkpoint is not None:
            try:
                verify(checkpoint)
            except ValueError as error:
                raise ValueError(f"{error}. {self._way_out(checkpoint)}") from error
        return checkpoint

    def _name_in(self, pointer: Path) -> str:
        try:
            content = read_json(pointer)
            if isinstance(content, dict) and isinstance(content.get("checkpoint"), str):
                return Path(content["checkpoint"]).name
            problem = f"{pointer} names no checkpoint"
        except ValueError as error:
            problem = str(error)
        whole = self._newest_whole()
        advice = (
            "No checkpoint is whole"
            if whole is None
            else f'To go on with {whole}, which is whole, let it hold {{"checkpoint": "{whole.name}"}}'
        )
        raise ValueError(f"{problem}. {advice}")

    def _newest_whole(self) -> Path | None:
        for checkpoint in reversed(self._complete()):
            with contextlib.suppress(ValueError):
                verify(checkpoint)
                return checkpoint
        return None

    def _way_out(self, damaged: Path) -> str:
        whole = self._newest_whole()
        if whole is None:
            return "There is no other that is whole: start anew with --overwrite, or in another folder with --out"
        return f"The older {whole} is whole: remove the folder {damaged.name} to go on from there"

    def _complete(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if (path / MANIFEST).is_file())

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(".writing-*"):
            shutil.rmtree(path, ignore_errors=True)


def _describe(path: Path) -> dict[str, object]:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(checkpoint: Path) -> None:
    """Raises ValueError listing every file of the checkpoint that isn't what was saved."""
    manifest_path = checkpoint / MANIFEST
    if not manifest_path.is_file():
        raise ValueError(f"the checkpoint {checkpoint} is incomplete: it has no {MANIFEST}")
    manifest = read_json(manifest_path)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise ValueError(f"{manifest_path} lists no files")
    problems = []
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != expected.get("size"):
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {expected['size']}")
        elif _sha256(path) != expected.get("sha256"):
            problems.append(f"{name} has changed")
    if problems:
        raise ValueError(f"the checkpoint {checkpoint} is damaged: {'; '.join(problems)}")


def write_training_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict[str, Any]
) -> None:
    """Writes all that an exact resume needs beside the model itself: optimizer and random-number states, and ``facts``."""
    tensors = optimizer_tensors(model, optimizer)
    tensors |= {_RNG_PREFIX + name: state for name, state in _rng_states().items()}
    save_file(tensors, folder / OPTIMIZER)
    write_json(folder / TRAINING_STATE, facts)


def read_training_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts optimizer and random-number states back.

    Raises:
        ValueError: the file doesn't fit this model and optimizer; the message lists what.
    """
    path = folder / OPTIMIZER
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    rng = {name.removeprefix(_RNG_PREFIX): tensors.pop(name) for name in list(tensors) if name.startswith(_RNG_PREFIX)}
    load_optimizer_tensors(model, optimizer, tensors, path)
    torch.set_rng_state(rng["cpu"])
    for index in range(torch.cuda.device_count()):
        if (state := rng.get(f"cuda{index}")) is not None:
            torch.cuda.set_rng_state(state, index)


def _rng_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name, e.g. ``"exp_avg/model.norm.weight"``."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{key}/{name}"] = value.detach().contiguous()
    return tensors


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], path: Path
) -> None:
    """The inverse of :func:`optimizer_tensors`. Raises ValueError with the list of what doesn't fit, and then changes nothing."""
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, torch.Tensor]] = {}
    problems = []
    for full_name, value in tensors.items():
        key, _, name = full_name.partition("/")
        parameter = parameters.get(name)
        if parameter is None:
            problems.append(f"there is no parameter for {full_name}")
        elif value.ndim and value.shape != parameter.shape:
            problems.append(f"{full_name} has shape {tuple(value.shape)} instead of {tuple(parameter.shape)}")
        else:
            states.setdefault(name, {})[key] = value.clone()  # the file's memory is nobody's to write to
    if states:
        problems += [f"there is no state for {name}" for name in parameters if name not in states]
    if problems:
        raise ValueError(f"{path} doesn't fit the model: {'; '.join(problems)}")
    in_order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in parameters.items()}
    by_index = {index: states[names[id(parameter)]] for index, parameter in enumerate(in_order)} if states else {}
    # load_state_dict moves each value to its parameter's device, and knows which optimizers keep "step" on the host.
    optimizer.load_state_dict({"state": by_index, "param_groups": optimizer.state_dict()["param_groups"]})
