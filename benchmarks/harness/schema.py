"""Whether a result file says what a result file must say (schema.json beside this file)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("schema.json")


@functools.cache
def _validator() -> Any:
    import jsonschema

    schema = json.loads(PATH.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def problems(content: object) -> list[str]:
    """What is wrong with a record, a sentence each; nothing if it is valid.

    Raises:
        ModuleNotFoundError: jsonschema is not installed (it comes with the extra "dev").
    """
    found = sorted(_validator().iter_errors(content), key=lambda error: list(map(str, error.absolute_path)))
    return [f"{'/'.join(map(str, error.absolute_path)) or 'the file'}: {error.message}"[:400] for error in found]


def validate(content: object) -> None:
    """Raises ValueError naming the first problems of a record that is not valid; ModuleNotFoundError without jsonschema."""
    found = problems(content)
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise ValueError(f"not a valid result: {'; '.join(found[:3])}{more}")
