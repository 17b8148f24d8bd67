"""Runs what a guide shows: the ```python blocks of a markdown file, in order, in one namespace, as a reader would type them."""

from __future__ import annotations

import textwrap
import traceback
from pathlib import Path
from typing import NamedTuple


class Snippet(NamedTuple):
    line: int  # of the first line of code, counted from 1
    code: str


def python_blocks(text: str) -> list[Snippet]:
    """The blocks fenced by ```python and ```, at any indentation; other languages are left out. ValueError if one is never closed."""
    blocks = []
    opened: int | None = None
    fenced = is_python = False
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.lstrip().startswith("```"):
            continue
        if not fenced:
            opened, fenced, is_python = number, True, line.strip() == "```python"
        else:
            assert opened is not None
            if is_python:
                blocks.append(Snippet(opened + 1, textwrap.dedent("\n".join(lines[opened : number - 1]))))
            fenced = False
    if fenced:
        raise ValueError(f"line {opened}: a block is opened and never closed")
    return blocks


def run_snippets(path: Path) -> int:
    """Executes the file's python blocks; their number. AssertionError "file:line: what went wrong" at the first that fails."""
    namespace: dict[str, object] = {"__name__": "__snippets__"}
    blocks = python_blocks(path.read_text(encoding="utf-8"))
    for block in blocks:
        # Blank lines before the code, so that Python counts lines as the file does.
        source = "\n" * (block.line - 1) + block.code
        try:
            exec(compile(source, str(path), "exec"), namespace)
        except Exception as error:
            raise AssertionError(f"{path}:{_line_of(error, path, block)}: {type(error).__name__}: {error}") from error
    return len(blocks)


def _line_of(error: Exception, path: Path, block: Snippet) -> int:
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return error.lineno
    frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return next((line for line in reversed(frames) if line is not None), block.line)
