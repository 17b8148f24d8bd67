"""Copies of a kernel's file with one statement of the asynchronous protocol removed or made wrong."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

_PROTOCOL = (
    r"mbarrier\.(?:wait|arrive|expect|init)\(.*\)|(?:tma\.)?(?:async_load|store_wait)\(.*\)|fence_async_shared\(\)"
)


def broken_copies(source: str, changes: Iterable[tuple[str, str, str]]) -> Iterator[tuple[str, str]]:
    """(name, source) of each: without one statement, or with one match of a pattern replaced.

    Args:
        source: of the file.
        changes: patterns, what is put in their place, and what that is in words.
    """
    for found in re.finditer(rf"^ +(?P<statement>{_PROTOCOL})$", source, re.MULTILINE):
        begin, end = found.span("statement")
        name = _name(source, "without", found.group("statement"), begin)
        yield name, f"{source[:begin]}pass{source[end:]}"
    for pattern, replacement, what in changes:
        for found in re.finditer(pattern, source):
            copy = source[: found.start()] + replacement + source[found.end() :]
            yield _name(source, what, found.group().split("\n")[0], found.start()), copy


def _name(source: str, what: str, statement: str, position: int) -> str:
    line = source.count("\n", 0, position) + 1
    return f"line {line}, {what} {statement}"


def imported(source: str, folder: Path) -> ModuleType:
    """The module ``broken`` of that source, whose functions can be asked for theirs."""
    path = folder / "broken.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("broken", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
