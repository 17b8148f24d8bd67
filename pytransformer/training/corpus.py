"""The text files a model is trained on: which they are, what they say, and which side of the split they fall on."""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Not source in the sense of text that people write: installed packages, compiled files, generated tables and documentation,
# and test data (some of it in broken encodings on purpose).
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "test", "tests", "idle_test"}
)
_GLOB_CHARACTERS = "*?["
_PIECE_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus. ``name`` is its path below the corpus root with forward slashes: the same on every machine."""

    name: str
    path: Path


@dataclass(frozen=True)
class BadBytes:
    """Where a file stops being UTF-8."""

    path: Path
    offset: int
    byte: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: byte 0x{self.byte:02x} at offset {self.offset} is not UTF-8 ({self.reason})"


def standard_library_files() -> list[SourceFile]:
    """The Python standard library's own source on this machine, without tests and installed packages.

    Raises:
        FileNotFoundError: this Python has no source files (an embedded or frozen interpreter).
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        SourceFile(path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1])
    ]
    if not files:
        raise FileNotFoundError(f"no Python source below {root}: name a folder or glob of text files with --data")
    return sorted(files, key=lambda file: file.name)


def find_files(source: str | None) -> list[SourceFile]:
    """The files of a corpus, in a fixed order.

    Args:
        source: a folder (every file below it whose name and folders don't start with a dot), one file, or a glob pattern
            (``**`` = any depth); None means the Python standard library.

    Raises:
        FileNotFoundError: there is no such folder, or nothing matches.
    """
    if source is None:
        return standard_library_files()
    path = Path(source).expanduser()
    if path.is_file():
        return [SourceFile(path.name, path)]
    if path.is_dir():
        below = [(file.relative_to(path), file) for file in path.rglob("*") if file.is_file()]
        files = [SourceFile(name.as_posix(), file) for name, file in below if not _hidden(name)]
        if not files:
            raise FileNotFoundError(f"the folder {source} holds no files (names that start with a dot are left out)")
        return sorted(files, key=lambda file: file.name)
    if not any(character in source for character in _GLOB_CHARACTERS):
        raise FileNotFoundError(f"no such file or folder: {source}")
    matches = [Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]
    if not matches:
        raise FileNotFoundError(f"no file matches {source}")
    return sorted((SourceFile(match.as_posix(), match) for match in matches), key=lambda file: file.name)


def _hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def find_bad_bytes(content: bytes, path: Path) -> BadBytes | None:
    """The first place where ``content`` is not UTF-8, or None."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadBytes(path, error.start, content[error.start], error.reason)
    return None


def content_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_text(file: SourceFile) -> str:
    return file.path.read_bytes().decode("utf-8")


def split_files(files: Sequence[SourceFile], validation_fraction: float) -> tuple[list[SourceFile], list[SourceFile]]:
    """Train and validation files. A file's side depends on its name alone, so adding files moves no other.

    Only a corpus so small that a side would be empty moves one file to it: the one whose hash is nearest.

    Args:
        files: at least two.
        validation_fraction: the expected share of files, between 0 and 1.
    """
    places = {file.name: _place(file.name) for file in files}
    by_place = sorted(files, key=lambda file: places[file.name])
    count = sum(place < validation_fraction for place in places.values())
    count = min(max(count, 1), len(files) - 1)
    chosen = {file.name for file in by_place[:count]}
    train = [file for file in files if file.name not in chosen]
    return train, [file for file in files if file.name in chosen]


def _place(name: str) -> float:
    """A number in [0, 1) that looks random but depends on ``name`` alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def pieces(text: str, size: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """``text`` in pieces of a little over ``size`` characters, cut where byte-level BPE never joins the two sides.

    That is between a newline and a following character that is not white space. A text without such a place stays whole.
    """
    start = 0
    while len(text) - start > size:
        cut = text.find("\n", start + size - 1) + 1
        while 0 < cut < len(text) and text[cut].isspace():
            cut = text.find("\n", cut) + 1
        if not 0 < cut < len(text):
            break
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]
