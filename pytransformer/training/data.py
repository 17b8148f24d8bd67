"""Text files as memory-mapped token shards, and the batches drawn from them.

A prepared corpus is a folder in the cache::

    <key>/tokenizer.json   the byte-level BPE
          train.bin        token ids, little-endian uint16 (uint32 for vocabularies past 65,536), one document after another,
          validation.bin   each followed by the end-of-text token
          data.json        counts, data type and the hash of both; written before the folder gets its name

The key is a hash of every source file's name and content and of the vocabulary size: the same sources are prepared once, changed sources
are prepared again, and a folder that has its name is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pytransformer.model.checkpoint import describe_public
from pytransformer.training import corpus
from pytransformer.training.config import CorpusConfig
from pytransformer.training.corpus import BadBytes, SourceFile
from pytransformer.training.files import read_json, sync, write_json
from pytransformer.training.tokenizer import TextTokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
IGNORE_INDEX = -100
_ENCODE_CHARACTERS = 4_000_000
# Whole files are held out unless that makes the validation side so many times larger or smaller than was asked.
_UNEVEN = 2.0
_EXAMPLE_TOKENS, _EXAMPLE_CHARACTERS, _EXAMPLE_WORDS = 4096, 24, 4

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Report = Callable[[str], None]


def silent(message: str) -> None:
    """A report that nobody reads."""


@dataclass(frozen=True)
class Split:
    """One side of the split: ``tokens`` is a read-only memory map."""

    tokens: Tokens
    documents: int
    sha256: str


@dataclass(frozen=True)
class PreparedData:
    """A tokenized corpus on disk."""

    folder: Path
    tokenizer: TextTokenizer
    train: Split
    validation: Split
    key: str

    @property
    def data_hash(self) -> str:
        """Changes whenever any token on either side does."""
        return hashlib.sha256((self.train.sha256 + self.validation.sha256).encode()).hexdigest()


@dataclass(frozen=True)
class _Document:
    file: SourceFile
    split: str
    sha256: str


def default_cache() -> Path:
    """``$PYTRANSFORMER_CACHE``, else ``pytransformer`` in the user's cache folder."""
    if named := os.environ.get("PYTRANSFORMER_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pytransformer"


def prepare(config: CorpusConfig, cache: Path | None = None, report: Report = silent) -> PreparedData:
    """Finds the files, trains the tokenizer and writes the token shards, unless the cache has them already.

    Raises:
        FileNotFoundError: nothing matches ``config.source``.
        ValueError: a file isn't UTF-8 (with its offset), or the corpus holds no text.
    """
    documents = _survey(config, report)
    key = _key(documents, config)
    folder = (cache or default_cache()) / "corpora" / key[:32]
    prepared = _open(folder, key)
    if prepared is None:
        report(f"preparing {len(documents)} files in {folder}")
        _build(folder, key, documents, config, report)
        prepared = _open(folder, key)
        if prepared is None:
            raise OSError(f"{folder} was written but cannot be read back: is the disk full?")
    else:
        report(f"reusing the tokens in {folder}")
    return prepared


def _survey(config: CorpusConfig, report: Report) -> list[_Document]:
    """Reads every file once: its hash, whether it is text, and its side of the split. Empty files are left out."""
    hashes: dict[str, str] = {}
    sizes: dict[str, int] = {}
    kept: list[SourceFile] = []
    if config.source is not None and (model := describe_public(Path(config.source).expanduser())):
        raise ValueError(f"--data is the text to train on, but {model}")
    for file in corpus.find_files(config.source):
        content = file.path.read_bytes()
        bad = corpus.find_bad_bytes(content, file.path)
        if bad is not None:
            _refuse_or_report(bad, config.bad_bytes, report)
        elif content:
            kept.append(file)
            hashes[file.name], sizes[file.name] = corpus.content_hash(content), len(content)
    if not kept:
        raise ValueError(
            f"no text to train on: every file of {config.source or 'the standard library'} is empty or skipped"
        )
    if len(kept) == 1:
        return [_Document(kept[0], "both", hashes[kept[0].name])]
    train, validation = corpus.split_files(kept, config.validation_fraction)
    asked, share = config.validation_fraction, sum(sizes[file.name] for file in validation) / sum(sizes.values())
    if not asked / _UNEVEN <= share <= asked * _UNEVEN:
        report(
            f"whole files would make {share:.1%} of the text the validation side, {asked:.1%} were asked for: "
            f"so the end of each of the {len(kept)} files is held out instead"
        )
        return [_Document(file, "both", hashes[file.name]) for file in kept]
    sides = {file.name: "train" for file in train} | {file.name: "validation" for file in validation}
    return [_Document(file, sides[file.name], hashes[file.name]) for file in kept]


def _refuse_or_report(bad: BadBytes, bad_bytes: str, report: Report) -> None:
    if bad_bytes == "refuse":
        raise ValueError(f"{bad}; leave such files out with --bad-bytes skip")
    report(f"skipped {bad}")


def _key(documents: Sequence[_Document], config: CorpusConfig) -> str:
    digest = hashlib.sha256(f"{FORMAT_VERSION} {config.vocab_size}\n".encode())
    if documents[0].split == "both":
        digest.update(f"{config.validation_fraction!r}\n".encode())
    for document in documents:
        name = document.file.name.encode("utf-8", "surrogateescape")
        digest.update(document.split.encode() + b" " + document.sha256.encode() + b" " + name + b"\n")
    return digest.hexdigest()


def _build(folder: Path, key: str, documents: Sequence[_Document], config: CorpusConfig, report: Report) -> None:
    """Writes everything into a temporary folder beside ``folder`` and renames it when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        sides = {side: [document.file for document in documents if document.split == side] for side in SPLITS}
        both = [document.file for document in documents if document.split == "both"]
        tokenizer = TextTokenizer.train(_texts(sides["train"] or both), config.vocab_size)
        tokenizer.save(temporary / "tokenizer.json")
        report(f"learned {tokenizer.vocab_size} tokens")
        if both:
            splits = _write_inside(temporary, tokenizer, both, config.validation_fraction)
        else:
            splits = {side: _write(temporary / f"{side}.bin", tokenizer, files) for side, files in sides.items()}
        header = {
            "version": FORMAT_VERSION,
            "key": key,
            "dtype": token_dtype(tokenizer.vocab_size).name,
            "splits": splits,
        }
        write_json(temporary / "data.json", header)
        for written in temporary.iterdir():
            sync(written)
        shutil.rmtree(folder, ignore_errors=True)  # an older, damaged one
        os.replace(temporary, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every token id."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def _texts(files: Iterable[SourceFile]) -> Iterator[str]:
    for file in files:
        yield from corpus.pieces(corpus.read_text(file))


def _encode(tokenizer: TextTokenizer, files: Iterable[SourceFile]) -> Iterator[Tokens]:
    """The tokens of each file with the end-of-text token, in order; many pieces at a time, so that all cores have work."""
    dtype = token_dtype(tokenizer.vocab_size)
    waiting: list[tuple[str, bool]] = []

    def flush() -> Iterator[Tokens]:
        for ids, (_, last) in zip(tokenizer.encode_batch([text for text, _ in waiting]), waiting):
            yield np.array([*ids, tokenizer.end_token_id] if last else ids, dtype=dtype)
        waiting.clear()

    for file in files:
        texts = list(corpus.pieces(corpus.read_text(file)))
        waiting += [(text, index == len(texts) - 1) for index, text in enumerate(texts)]
        if sum(len(text) for text, _ in waiting) >= _ENCODE_CHARACTERS:
            yield from flush()
    yield from flush()


def _write(path: Path, tokenizer: TextTokenizer, files: Sequence[SourceFile]) -> dict[str, object]:
    count, digest = 0, hashlib.sha256()
    with path.open("wb") as output:
        for tokens in _encode(tokenizer, files):
            content = tokens.tobytes()
            output.write(content)
            digest.update(content)
            count += tokens.size
    return {"tokens": count, "documents": len(files), "sha256": digest.hexdigest()}


def _write_inside(
    folder: Path, tokenizer: TextTokenizer, files: Sequence[SourceFile], validation_fraction: float
) -> dict[str, dict[str, object]]:
    """The end of each file is the validation side. Of several files what is cut off is ended by the end-of-text token too."""
    dtype = token_dtype(tokenizer.vocab_size)
    counts, documents = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    digests = {side: hashlib.sha256() for side in SPLITS}
    with (folder / "train.bin").open("wb") as train, (folder / "validation.bin").open("wb") as validation:
        due = 0.0
        for index, tokens in enumerate(_encode_files(tokenizer, files)):
            due += tokens.size * validation_fraction
            held_out = min(tokens.size, round(due))
            if index == len(files) - 1 and counts["validation"] == 0:
                held_out = max(1, held_out)
            due -= held_out
            head, tail = tokens[: tokens.size - held_out], tokens[tokens.size - held_out :]
            if head.size and tail.size and len(files) > 1:
                head = np.append(head, np.array(tokenizer.end_token_id, dtype=dtype))
            for side, part, output in zip(SPLITS, (head, tail), (train, validation)):
                content = part.tobytes()
                output.write(content)
                digests[side].update(content)
                counts[side] += part.size
                documents[side] += part.size > 0
    return {
        side: {"tokens": counts[side], "documents": documents[side], "sha256": digests[side].hexdigest()}
        for side in SPLITS
    }


def _encode_files(tokenizer: TextTokenizer, files: Sequence[SourceFile]) -> Iterator[Tokens]:
    """All tokens of each file, the end-of-text token last."""
    parts: list[Tokens] = []
    for part in _encode(tokenizer, files):
        parts.append(part)
        if part[-1] == tokenizer.end_token_id:
            yield np.concatenate(parts)
            parts = []


def example_prompt(prepared: PreparedData, max_tokens: int) -> str | None:
    """A few words from the beginning of a line of the training text, for someone who wants to see the model go on from there.

    Args:
        prepared: the text.
        max_tokens: the most it may have.

    Returns:
        Printable characters that need no escapes in a shell's single quotes, or ``None`` if the text begins with nothing of the kind.
    """
    tokenizer = prepared.tokenizer
    parts = [
        b"\n" if token == tokenizer.end_token_id else tokenizer.token_bytes[token]
        for token in prepared.train.tokens[:_EXAMPLE_TOKENS].tolist()
    ]
    lines = b"".join(parts).decode("utf-8", errors="ignore").splitlines()
    # The last one is cut off anywhere.
    for line in lines[:-1] or lines:
        words = line.split()[:_EXAMPLE_WORDS]
        while words and (len(" ".join(words)) > _EXAMPLE_CHARACTERS and len(words) > 1):
            words.pop()
        prompt = " ".join(words)[:_EXAMPLE_CHARACTERS]
        if (
            not prompt[:1].isalnum()
            or not prompt.isprintable()
            or any(character in "'\"\\\ufffd" for character in prompt)
        ):
            continue
        while prompt and len(tokenizer.encode(prompt)) > max_tokens:
            prompt = prompt[:-1].rstrip()
        if prompt:
            return prompt
    return None


def _open(folder: Path, key: str) -> PreparedData | None:
    """The prepared corpus in ``folder``, or None if it isn't there, is another one's, or its files don't have their sizes."""
    try:
        header = read_json(folder / "data.json")
        if header["key"] != key:
            return None
        tokenizer = TextTokenizer.load(folder / "tokenizer.json")
        dtype = np.dtype(header["dtype"])
        splits = {}
        for side in SPLITS:
            entry, path = header["splits"][side], folder / f"{side}.bin"
            if path.stat().st_size != entry["tokens"] * dtype.itemsize:
                return None
            tokens = np.memmap(path, dtype=dtype, mode="r") if entry["tokens"] else np.zeros(0, dtype)
            splits[side] = Split(tokens, entry["documents"], entry["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return PreparedData(folder, tokenizer, splits["train"], splits["validation"], key)


class Batches:
    """Training batches: windows of the token stream, every window once per epoch, in an order drawn anew for each.

    Batch ``step`` is a function of (seed, step) alone: the order of an epoch comes from the counter-based Philox generator
    at (seed, epoch), so a resumed run reads what the unbroken run would have read, without a state to save.

    Args:
        tokens: (num_tokens,) ids.
        batch_size: windows per batch.
        context_length: tokens per window; the target of the last is the token after the window.
        seed: at least 0.

    Raises:
        ValueError: there is not even one window.
    """

    def __init__(self, tokens: Tokens, batch_size: int, context_length: int, seed: int) -> None:
        self.num_windows = (len(tokens) - 1) // context_length
        if self.num_windows < 1:
            raise ValueError(
                f"the training text has {len(tokens)} tokens: a context length of {context_length} needs at least {context_length + 1}"
            )
        self._tokens = tokens
        self._batch_size = batch_size
        self._context_length = context_length
        self._seed = seed
        self._epoch = -1
        self._starts: npt.NDArray[np.int64] = np.zeros(0, np.int64)

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of one step, each int64 (batch_size, context_length); targets are the inputs shifted by one."""
        first = step * self._batch_size
        starts = [self._start(index) for index in range(first, first + self._batch_size)]
        return _windows(self._tokens, starts, self._context_length)

    def _start(self, index: int) -> int:
        epoch, place = divmod(index, self.num_windows)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=np.array([self._seed, epoch], dtype=np.uint64)))
            # A random phase, so that windows of different epochs are cut at different places.
            spare = len(self._tokens) - 1 - self.num_windows * self._context_length
            phase = int(generator.integers(0, spare + 1))
            self._starts = generator.permutation(self.num_windows) * self._context_length + phase
            self._epoch = epoch
        return int(self._starts[place])


def validation_windows(
    tokens: Tokens, context_length: int, max_tokens: int, batch_size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Fixed windows, evenly spaced over the validation side and not overlapping, of at most ``max_tokens`` targets.

    Raises:
        ValueError: there is not even one window.
    """
    available = (len(tokens) - 1) // context_length
    if available < 1:
        raise ValueError(
            f"the validation text has {len(tokens)} tokens: a context length of {context_length} needs at least {context_length + 1}; "
            "use a shorter context, more text or a larger validation fraction"
        )
    count = min(available, max(1, max_tokens // context_length))
    starts = [index * available // count * context_length for index in range(count)]
    return [
        _windows(tokens, starts[first : first + batch_size], context_length) for first in range(0, count, batch_size)
    ]


def _windows(tokens: Tokens, starts: Sequence[int], context_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = np.stack([tokens[start : start + context_length + 1] for start in starts]).astype(np.int64)
    windows = torch.from_numpy(rows)
    return windows[:, :-1], windows[:, 1:]
