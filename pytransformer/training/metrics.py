"""``metrics.jsonl``: one JSON object per optimizer step, and one per evaluation.

A step has ``step`` (counted from 1), ``loss`` (nats per target token), ``learning_rate``, ``grad_norm`` (before clipping) and
``tokens_per_second``; an evaluation has ``step`` and ``validation_loss``. Numbers are written so that reading gives the same bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pytransformer.training.files import sync

FILE_NAME = "metrics.jsonl"
Record = dict[str, Any]


def append(path: Path, records: Iterable[Record]) -> None:
    with path.open("a", encoding="utf-8") as output:
        output.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)


def read(path: Path) -> list[Record]:
    """All records. A last line that a kill has cut is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that isn't the last is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no metrics at {path}: has this run started?")
    lines = path.read_text(encoding="utf-8").split("\n")
    return list(_parse(path, lines))


def _parse(path: Path, lines: list[str]) -> Iterator[Record]:
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline comes nothing, or a cut line
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: line {number} is not a metrics record") from None
        yield record


def truncate(path: Path, step: int) -> None:
    """Drops what was recorded after ``step``, in one step: a resumed run records it again."""
    records = [record for record in read(path) if record["step"] <= step] if path.is_file() else []
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    append(temporary, records)
    sync(temporary)
    os.replace(temporary, path)


def series(records: Iterable[Record], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have ``name``."""
    having = [record for record in records if name in record]
    return [record["step"] for record in having], [record[name] for record in having]
