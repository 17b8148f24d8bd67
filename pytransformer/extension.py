"""Finds and loads the CUDA extension, or says in one sentence why there is none.

The library is ``_cuda.so`` in this package (built by ``pip install`` where nvcc is, or by ``make cuda`` in a checkout), or whatever
PYTRANSFORMER_CUDA_LIBRARY names: the tests name one that was built for the host emulator, whose ops serve CPU tensors.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pytransformer._version import __version__

LIBRARY = Path(__file__).parent / "_cuda.so"
ABSENT = LIBRARY.with_name("_cuda_absent.txt")  # left by an installation that could not build it: why
OLDEST_TORCH = (2, 10)
OLDEST_ARCHITECTURE = (8, 0)
HOW_TO_GET_IT = "to get it, install where nvcc is with PYTRANSFORMER_CUDA=1, or run `make cuda` in a checkout"


@dataclass(frozen=True)
class Extension:
    """A loaded library.

    Attributes:
        path: where it was loaded from.
        version, source_id: of the sources it was built from.
        architectures: what it has code for, e.g. "sm_80 sm_90a compute_80".
        cuda_version: of the toolkit that built it.
        emulated: its kernels run on the CPU, in the host emulator.
    """

    path: Path
    version: str
    source_id: str
    architectures: str
    cuda_version: str
    emulated: bool

    @property
    def device_type(self) -> str:
        """Device type of the tensors that its ops serve."""
        return "cpu" if self.emulated else "cuda"


_fakes: dict[str, Callable[..., Any]] = {}
_fakes_are_registered: list[bool] = []


def register_fake(name: str, function: Callable[..., Any]) -> None:
    """Tells torch what op ``name`` of the extension returns for fake tensors, as soon as the library is loaded."""
    _fakes[name] = function
    if _fakes_are_registered:
        torch.library.register_fake(f"pytransformer_cuda::{name}", function)


@functools.cache
def _load() -> Extension | str:
    """The extension, or why there is none."""
    named = os.environ.get("PYTRANSFORMER_CUDA_LIBRARY")
    path = Path(named) if named else LIBRARY
    if not path.is_file():
        if named:
            return f"PYTRANSFORMER_CUDA_LIBRARY names {named}, which is not there"
        reason = f" ({ABSENT.read_text().strip()})" if ABSENT.is_file() else ""
        return f"the CUDA extension was not built{reason}; {HOW_TO_GET_IT}"
    if _torch_version() < OLDEST_TORCH:
        return f"the CUDA extension needs torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}, and this is torch {torch.__version__}"
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        facts = torch.ops.pytransformer_cuda.build_info().split(";")
    except (OSError, RuntimeError, AttributeError) as error:
        cause = error.__cause__ or error
        return f"the CUDA extension {path} does not load: {cause}"
    version, source_id, architectures, cuda_version, kind = facts
    extension = Extension(path, version, source_id, architectures, cuda_version, kind == "emulated")
    mismatch = _mismatch(extension)
    if mismatch is not None:
        return mismatch
    for name, function in _fakes.items():
        torch.library.register_fake(f"pytransformer_cuda::{name}", function)
    _fakes_are_registered.append(True)
    return extension


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _mismatch(extension: Extension) -> str | None:
    """Why a loaded library does not belong to the Python code beside it, or ``None``."""
    if extension.version != __version__:
        return (
            f"the CUDA extension was built for version {extension.version} and this is {__version__}: {HOW_TO_GET_IT}"
        )
    builder = _builder()
    if builder is not None and builder.source_id() != extension.source_id:
        return "the CUDA extension was built from other sources than those in csrc/: run `make cuda` again"
    return None


def _builder() -> ModuleType | None:
    """csrc/build.py of the checkout this package is imported from; ``None`` for an installed package."""
    path = Path(__file__).resolve().parent.parent / "csrc/build.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("_pytransformer_cuda_build", path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def extension() -> Extension | None:
    """The loaded extension, or ``None``; the first call loads it."""
    found = _load()
    return found if isinstance(found, Extension) else None


def why_not(device_type: str) -> str | None:
    """Why the extension serves nothing on this kind of device ("cuda", "cpu", …) here, or ``None``."""
    found = _load()
    if isinstance(found, str):
        return found
    if device_type != found.device_type:
        where = "the CPU, in the host emulator" if found.emulated else "a GPU"
        return f"the CUDA extension runs on {where}, and the tensors are on device type {device_type!r}"
    return _gpu_problem(found) if device_type == "cuda" else None


@functools.cache
def _gpu_problem(found: Extension) -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_ARCHITECTURE:
        return f"the kernels need a GPU of compute capability 8.0 or newer, and this one has {capability[0]}.{capability[1]}"
    return None if _covers(found.architectures, capability) else _leaves_out(found, capability)


def _covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a binary with code for ``architectures`` runs on a GPU: same major and no newer minor, or PTX no newer than the GPU.

    Code with a suffix ("sm_90a") runs on exactly its own architecture.
    """
    for name in architectures.split():
        kind, _, number = name.partition("_")
        plain = number.rstrip("af")
        compiled = int(plain[:-1]), int(plain[-1])
        if kind == "compute" and compiled <= capability:
            return True
        if kind == "sm" and plain != number and compiled == capability:
            return True
        if kind == "sm" and plain == number and compiled[0] == capability[0] and compiled[1] <= capability[1]:
            return True
    return False


def _leaves_out(found: Extension, capability: tuple[int, int]) -> str:
    asked = f"{capability[0]}{capability[1]}"
    return (
        f"the CUDA extension was built for {found.architectures}, which leaves out this GPU (sm_{asked}): rebuild it with "
        f"PYTRANSFORMER_CUDA_ARCHS={asked}"
    )


def op(name: str) -> Any:
    """The registered op ``torch.ops.pytransformer_cuda.<name>`` itself, cheapest to call.

    Raises:
        NotImplementedError: there is no extension; the message says why.
    """
    found = _load()
    if isinstance(found, str):
        raise NotImplementedError(found)
    return getattr(torch.ops.pytransformer_cuda, name).default
