"""Which tests of compiled code have passed before, and with what: `make gate-changed` need not compile the same again.

A test marked ``compiles`` finds the same as long as four things are the same: the compiler, the limits, its own module, and what that
module's ``decided_by()`` says of the rest (the keys of what it compiles, each with the kernel's source and all that it calls, types,
constants and options: :attr:`tests.support.launch_recorder.Launch.key`). Their digest is committed with the names of the tests that have
passed with it; `make gate-figures` writes it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support import gate_figures

FILE = gate_figures.FOLDER / "passed.json"


@functools.cache
def digest(module: ModuleType) -> str:
    """Of all that decides whether the module's tests pass, a hash."""
    assert module.__file__ is not None
    texts = [gate_figures.compiler("triton"), gate_figures.rules(), Path(module.__file__).read_text()]
    return hashlib.sha256("\0".join([*texts, *module.decided_by()]).encode()).hexdigest()[:16]


def _committed() -> dict[str, dict[str, Any]]:
    return json.loads(FILE.read_text()) if FILE.is_file() else {}


def is_known(item: pytest.Function) -> bool:
    """Whether a test has passed with what it would find now; not if that cannot even be said, as then it has something to report."""
    kept = _committed().get(item.module.__name__)
    if kept is None or item.name not in kept["passed"]:
        return False
    try:
        return bool(kept["digest"] == digest(item.module))
    except Exception:
        return False


def write(tests: Collection[pytest.Function]) -> None:
    """Commits to these tests having passed, beside those that passed before with the same."""
    committed = _committed()
    by_module: Mapping[ModuleType, set[str]] = defaultdict(set)
    for item in tests:
        by_module[item.module].add(item.name)
    for module, names in by_module.items():
        kept = committed.get(module.__name__, {})
        before = kept["passed"] if kept.get("digest") == digest(module) else ()
        committed[module.__name__] = {"digest": digest(module), "passed": sorted({*names, *before})}
    FILE.write_text(json.dumps(dict(sorted(committed.items())), indent=1) + "\n")
