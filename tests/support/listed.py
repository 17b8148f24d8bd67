"""Lists by hand of names that something else gives out (kernels, cases, files), and whether each entry still matches one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

from tests.support.compile_gate import KERNELS, kernels_of


def without_match(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The patterns that are found in none of the names."""
    names = list(names)
    return [pattern for pattern in patterns if not any(re.search(pattern, name) for name in names)]


def all_kernels_of(op: str) -> set[str]:
    """Names of the kernels that an op defines: those that it launches by name, and what is called a kernel, as a function may be given
    which one it launches."""
    paths = [KERNELS / f"{op}.py"] if (KERNELS / f"{op}.py").is_file() else list((KERNELS / op).rglob("*.py"))
    functions = [
        node for path in paths for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    return kernels_of(op) | {node.name for node in functions if node.decorator_list and node.name.endswith("_kernel")}
