"""The safetensors files of a folder: what they hold, read from their headers alone, and their tensors as views of the mapped files.

A file is 8 bytes with the length of a header, the header (JSON: name -> dtype, shape and place), and the tensors' bytes one after another
(https://github.com/huggingface/safetensors#format). A folder has one, ``model.safetensors``, or several with an index beside them that says
which tensor is where. Pickle is never read.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .families.family import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip
# As every pointer begins that Git LFS leaves in the place of a file.
_POINTER = b"version "
# As long as the format allows a header to be.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a header describes it.

    Attributes:
        name: its name.
        file: where it is.
        dtype: the format's name of its dtype, "BF16" say.
        shape: its sizes.
        start, stop: place of its bytes in the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return self.stop - self.start


class TensorFiles:
    """The tensors of one or several files. Making it reads headers only.

    Attributes:
        tensors: name -> what the header says.
        index: the index file of several, or ``None``.

    Raises:
        CheckpointError: a file is truncated or damaged, or several do not fit their index; the message names the file.
        FileNotFoundError: a file is not there.
    """

    def __init__(self, files: Iterable[Path], index: Path | None = None) -> None:
        self.index = index
        self.tensors: dict[str, StoredTensor] = {}
        self._mappings: dict[Path, mmap.mmap] = {}
        for file in files:
            for name, tensor in read_header(file).items():
                if name in self.tensors:
                    raise CheckpointError(f"{name} is in {self.tensors[name].file} and in {file}")
                self.tensors[name] = tensor

    @classmethod
    def of_folder(cls, folder: Path) -> TensorFiles:
        """The files of a model's folder; a single file counts before several, as in transformers.

        Raises:
            As the class; FileNotFoundError also if there are none, with what to do about a file that is not read.
        """
        if (folder / WEIGHTS_FILE).is_file():
            return cls([folder / WEIGHTS_FILE])
        if (folder / INDEX_FILE).is_file():
            return cls._of_index(folder / INDEX_FILE)
        for name in PICKLE_FILES:
            if (folder / name).is_file():
                raise CheckpointError(
                    f"{folder} has its weights in {name}, a pickle file, which can run anything when it is read and is never read here; "
                    f"convert it where you trust it: transformers' AutoModel….from_pretrained({str(folder)!r}).save_pretrained(…) "
                    f"writes {WEIGHTS_FILE}"
                )
        raise FileNotFoundError(f"{folder} does not hold a complete model: there is no {WEIGHTS_FILE}")

    @classmethod
    def _of_index(cls, index: Path) -> TensorFiles:
        places = _read_index(index)
        names = sorted(set(places.values()))
        absent = [name for name in names if not (index.parent / name).is_file()]
        if absent:
            raise FileNotFoundError(
                f"{index.parent} does not hold a complete model: there is no {', '.join(absent)}, which {INDEX_FILE} names"
            )
        files = cls([index.parent / name for name in names], index)
        lacking: dict[str, list[str]] = {}
        for name, file in places.items():
            if name not in files.tensors or files.tensors[name].file.name != file:
                lacking.setdefault(file, []).append(name)
        if lacking:
            told = "; ".join(f"{file} lacks {', '.join(names)}" for file, names in sorted(lacking.items()))
            raise CheckpointError(f"{index} does not fit its files: {told}")
        return files

    def tensor(self, name: str) -> Tensor:
        """The tensor as a view of its mapped file, in a storage of its own: memory is read when it is looked at.

        The mapping is private: what is written to the tensor stays in memory and never gets into the file.
        """
        stored = self.tensors[name]
        dtype = DTYPES[stored.dtype]
        if stored.numel == 0:
            return torch.empty(stored.shape, dtype=dtype)
        mapped = self._mapped(stored.file)
        if stored.start % dtype.itemsize:  # nothing in the format forbids it, and no kernel expects it
            raw = torch.frombuffer(mapped, dtype=torch.uint8, count=stored.nbytes, offset=stored.start)
            return raw.clone().view(dtype).view(stored.shape)
        return torch.frombuffer(mapped, dtype=dtype, count=stored.numel, offset=stored.start).view(stored.shape)

    def _mapped(self, file: Path) -> mmap.mmap:
        if file not in self._mappings:
            with open(file, "rb") as handle:
                self._mappings[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._mappings[file]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of one file, in the order of their bytes.

    Raises:
        CheckpointError: the file is truncated or damaged; the message says what is missing of it.
        OSError: it cannot be read.
    """
    size = file.stat().st_size
    with open(file, "rb") as handle:
        start = handle.read(8)
        length = int.from_bytes(start, "little")
        if start == _POINTER:
            raise _damaged(file, "it is a pointer of Git LFS, which fetches the file itself with git lfs pull")
        if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise _damaged(file, f"it has {size} bytes, and a header of {length} is announced")
        text = handle.read(length)
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repetition)
        content.pop("__metadata__", None)
        tensors = {name: _described(name, file, entry, 8 + length) for name, entry in content.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(file, f"its header cannot be understood ({type(error).__name__}: {error})") from error
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 8 + length
    for name, tensor in tensors.items():
        if tensor.start != end:
            raise _damaged(file, f"the bytes of {name} begin at {tensor.start}, those before it end at {end}")
        end = tensor.stop
    if end > size:
        cut = [name for name, tensor in tensors.items() if tensor.stop > size]
        raise _damaged(file, f"it has {size} of {end} bytes, so {len(cut)} tensors are cut off or missing: {_few(cut)}")
    if end < size:
        raise _damaged(file, f"it has {size} bytes, and its header speaks of {end}")
    return tensors


def _described(name: str, file: Path, entry: dict[str, Any], begin: int) -> StoredTensor:
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    numbers = (*shape, start, stop)
    if not all(type(number) is int and number >= 0 for number in numbers) or stop < start:
        raise ValueError(f"shape {shape}, bytes {start} to {stop}")
    tensor = StoredTensor(name, file, str(entry["dtype"]), tuple(shape), begin + start, begin + stop)
    if tensor.dtype in DTYPES and tensor.numel * DTYPES[tensor.dtype].itemsize != tensor.nbytes:
        raise ValueError(f"{tensor.dtype} of shape {shape} in {tensor.nbytes} bytes")
    return tensor


def _read_index(index: Path) -> dict[str, str]:
    """Name of a tensor -> name of a file beside the index."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)["weight_map"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of safetensors files: {type(error).__name__}: {error}") from error
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index} is no index of safetensors files: weight_map must map tensors to files")
    outside = sorted({file for file in places.values() if Path(file).name != file or file in ("", ".", "..")})
    if outside:
        raise CheckpointError(f"{index} names files that are not beside it: {', '.join(map(repr, outside))}")
    return places


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _damaged(file: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{file} is truncated or not a safetensors file: {fault}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
