"""Fault injection: a copy of a kernel file with a fault put into its text, imported as a module of its own."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
_numbers = itertools.count()


def load_broken(folder: Path, name: str, *substitutions: tuple[str, str]) -> ModuleType:
    """Imports kernels/``name``.py ("rope", "norm/forward") with each ``(good, bad)`` pair substituted; without pairs a faithful copy.

    Args:
        folder: where the copy is written (a test's ``tmp_path``): Triton reads the source of its kernels from a file.

    Raises:
        ValueError: the good text doesn't occur exactly once, so the test no longer breaks what it means to.
    """
    text = (KERNELS / f"{name}.py").read_text()
    for good, bad in substitutions:
        if text.count(good) != 1:
            raise ValueError(f"{good!r} occurs {text.count(good)} times in kernels/{name}.py; once is needed")
        text = text.replace(good, bad)
    # Named as a member of the package, so that its relative imports find the other kernel files.
    package, _, stem = f"pytransformer/kernels/{name}".replace("/", ".").rpartition(".")
    module_name = f"{package}.broken_{stem}_{next(_numbers)}"
    path = folder / f"{module_name.rsplit('.', 1)[1]}.py"
    path.write_text(text)
    specification = importlib.util.spec_from_file_location(module_name, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        specification.loader.exec_module(module)
    finally:
        del sys.modules[module_name]
    return module
