"""Files of a model's folder, written so that the folder never looks complete but is not.

Every file is written beside its place and flushed to the disk before the first one is moved there. Where one file of weights is all that
changes, the move is one step, and a reader sees the old model or the new one. Else the old ``config.json``, without which a folder holds no
model, goes before the first move, and the new one comes last.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .tensor_files import DTYPES, INDEX_FILE, WEIGHTS_FILE

CONFIG_FILE = "config.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SHARDS = "model-?????-of-?????.safetensors"


@dataclass(frozen=True)
class Piece:
    """A tensor to be written.

    Attributes:
        name: in the file.
        shape, dtype: as it is written.
        get: gives its values, in any dtype and on any device; called once.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    get: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return self.numel * self.dtype.itemsize


def write_model(
    folder: Path,
    pieces: Sequence[Piece],
    texts: dict[str, str],
    max_shard_bytes: int,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Writes weights and texts into ``folder``, which is made if needed; other files in it are left alone.

    Args:
        pieces: the weights, in the order in which they fill the files.
        texts: name -> content of the other files, ``config.json`` among them.
        max_shard_bytes: weights beyond so many bytes go into several files, with an index.
        progress: called with the number of bytes that were written since the last call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(pieces, max_shard_bytes)
    weights = _file_names(len(shards))
    if len(shards) > 1:
        texts = {**texts, INDEX_FILE: _index(shards, weights)}
    stale = {path for pattern in (WEIGHTS_FILE, _SHARDS, INDEX_FILE) for path in folder.glob(pattern)}
    stale -= {folder / name for name in (*weights, *texts)}
    changed = [name for name, text in texts.items() if not _holds(folder / name, text)]
    with contextlib.ExitStack() as written:
        moves = []
        for name, shard in zip(weights, shards):
            beside = written.enter_context(_beside(folder / name))
            with open(beside, "wb") as file:
                for count in _write_tensors(file.write, shard):
                    if progress is not None:
                        progress(count)
            moves.append((beside, folder / name))
        for name in sorted(changed, key=lambda name: name == CONFIG_FILE):
            beside = written.enter_context(_beside(folder / name))
            beside.write_text(texts[name], encoding="utf-8")
            moves.append((beside, folder / name))
        for beside, _ in moves:
            _flush_file(beside)
        if len(moves) > 1 or stale:  # more than one step: the folder holds no model until the last
            with contextlib.suppress(FileNotFoundError):
                (folder / CONFIG_FILE).unlink()
            if CONFIG_FILE not in changed:
                beside = written.enter_context(_beside(folder / CONFIG_FILE))
                beside.write_text(texts[CONFIG_FILE], encoding="utf-8")
                _flush_file(beside)
                moves.append((beside, folder / CONFIG_FILE))
            _flush(folder)
        for path in stale:
            path.unlink()
        for beside, place in moves:
            os.replace(beside, place)
    _flush(folder)


def write_tensor_file(path: Path, pieces: Sequence[Piece]) -> None:
    """One file of tensors, in one step: a reader sees the old file or the new one."""
    with _beside(path) as beside:
        with open(beside, "wb") as file:
            for _ in _write_tensors(file.write, pieces):
                pass
        _flush_file(beside)
        os.replace(beside, path)
    _flush(path.parent)


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        return False


def _shards(pieces: Sequence[Piece], max_bytes: int) -> list[list[Piece]]:
    """Filled one after another; a tensor larger than a file may be has one of its own."""
    shards: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if shards[-1] and filled + piece.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += piece.nbytes
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _index(shards: Sequence[Sequence[Piece]], names: Sequence[str]) -> str:
    pieces = [piece for shard in shards for piece in shard]
    places = {piece.name: name for shard, name in zip(shards, names) for piece in shard}
    facts = {
        "total_parameters": sum(piece.numel for piece in pieces),
        "total_size": sum(piece.nbytes for piece in pieces),
    }
    return json.dumps({"metadata": facts, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"


def _write_tensors(write: Callable[[bytes | memoryview], object], pieces: Sequence[Piece]) -> Iterator[int]:
    """One file, tensor after tensor; yields the bytes of each."""
    # Wide dtypes first: each tensor then begins at a multiple of its elements' size.
    pieces = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        place = [end, end := end + piece.nbytes]
        header[piece.name] = {"dtype": _NAMES[piece.dtype], "shape": list(piece.shape), "data_offsets": place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write(len(text).to_bytes(8, "little") + text)
    for piece in pieces:
        tensor = piece.get().detach().to(device="cpu", dtype=piece.dtype)
        if tuple(tensor.shape) != piece.shape:
            raise ValueError(f"{piece.name} was to have shape {piece.shape} and has {tuple(tensor.shape)}")
        if tensor.numel():
            write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        yield piece.nbytes


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` to write to; it is gone afterwards, unless it was moved."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove_leftovers(path)
    try:
        temporary.touch()
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Files that a killed process was writing; another living one may be writing too, so only those untouched for an hour."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink()


def _flush_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Makes the folder's entries survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
