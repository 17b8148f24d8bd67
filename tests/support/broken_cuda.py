"""Faults put into a CUDA kernel on purpose: one source is changed, compiled anew, linked with the sound rest of the library."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.emulator import ROOT, builder, environment, prefix


def build_broken(
    folder: Path,
    source: str,
    changes: Sequence[tuple[str, str]],
    *,
    flavor: str = "address",
    recompile: Sequence[str] = (),
    others: Mapping[str, Sequence[tuple[str, str]]] | None = None,
) -> Path:
    """The emulated library with ``changes`` (good, bad) made to ``source``, each of whose good texts must stand there exactly once.

    Args:
        folder: where to build.
        source: path below csrc/, e.g. "norm/forward.cu".
        changes: texts and what replaces them.
        flavor: "emulated", "address" or "thread".
        recompile: the units below csrc/ that need it when ``source`` is a header; by default ``source`` itself. A unit is a .cu file, or
            one compilation of it: "attention/forward_bfloat16_64.cu" of attention/forward_instances.cu (:func:`build.units`).
        others: further sources, with the changes to each.
    """
    build = builder()
    build.build(flavor, quiet=True)
    changed = {
        name: _change(name, (build.CSRC / name).read_text(), list(pairs))
        for name, pairs in {source: changes, **(others or {})}.items()
    }
    mirror = folder / "csrc"
    for path in build.CSRC.rglob("*"):
        copy = mirror / path.relative_to(build.CSRC)
        if path.suffix in (".cu", ".cuh", ".h"):
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path)
    for name, text in changed.items():
        (mirror / name).unlink()
        (mirror / name).write_text(text)
    plan = build.emulated_plan(build.find_torch(), flavor, ())
    # Not all that lies there: a source that was renamed has left its object behind.
    built = ROOT / "build" / flavor
    objects = {
        name: built / name
        for name in re.findall(r"^build (\S+\.o):", (built / "build.ninja").read_text(), re.MULTILINE)
    }
    units = {name: (path, macros) for path in build.source_files(".cu") for name, macros in build.units(path).items()}
    for unit in recompile or [source]:
        name = "csrc_" + unit.replace("/", "_") + ".o"
        if name not in units:
            raise ValueError(f"{unit} is not compiled on its own: name the units that include it (recompile=…)")
        path, macros = units[name]
        objects[name] = folder / name
        _run(
            [
                plan.kernel_compiler,
                f"-I{mirror}/common",
                *plan.kernel_flags,
                *macros,
                "-c",
                str(mirror / path.relative_to(build.CSRC)),
                "-o",
                str(folder / name),
            ]
        )
    library = folder / "_cuda.so"
    _run([plan.cxx, "-shared", "-o", str(library), *map(str, objects.values()), *plan.link_flags])
    return library


def _change(source: str, text: str, changes: Sequence[tuple[str, str]]) -> str:
    for good, bad in changes:
        if text.count(good) != 1:
            raise ValueError(f"{source}: {good!r} stands there {text.count(good)} times, not once")
        text = text.replace(good, bad)
    return text


def run_broken(
    folder: Path,
    source: str,
    changes: Sequence[tuple[str, str]],
    script: str,
    *,
    flavor: str = "address",
    recompile: Sequence[str] = (),
    others: Mapping[str, Sequence[tuple[str, str]]] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Builds as :func:`build_broken` and runs a Python script in a process that has the broken library; its output is to be judged."""
    library = build_broken(folder, source, changes, flavor=flavor, recompile=recompile, others=others)
    return run_with(library, script, flavor=flavor)


def run_with(
    library: Path, script: str, *, flavor: str = "address", variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a Python script in a process that has the library, with these variables in its environment."""
    return subprocess.run(
        [*prefix(flavor), sys.executable, "-c", script],
        env=os.environ | environment(flavor, library) | dict(variables or {}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} …: {result.stderr[-3000:]}")
