"""What an adapter of another package is, and where such packages are looked for."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import site
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pytransformer.benchmarks.harness.paths import ROOT
from pytransformer.benchmarks.harness.rows import Inputs, Variant

# A factory imports the package and returns the call; it runs at the first call, so that listing rows imports nothing.
Factory = Callable[[], Variant]
# What an adapter has for an op: the case → a factory, or None where the package does not serve the case.
Builder = Callable[[Any], Factory | None]

FOLDER_VARIABLE = "PYTRANSFORMER_PEERS"


def folder() -> Path:
    """Where `make peers` puts other packages: PYTRANSFORMER_PEERS, or peers/ in the checkout (without one: where it was started)."""
    beside = ROOT if (ROOT / "pyproject.toml").is_file() else Path.cwd()
    return Path(os.environ.get(FOLDER_VARIABLE) or beside / "peers")


@functools.cache
def use_folder() -> None:
    """Packages that were unpacked there can be imported from now on; those that are installed come first.

    ``addsitedir`` rather than ``sys.path``: one of the packages brings a .pth file that it needs.
    """
    packages = folder() / "site-packages"
    if packages.is_dir():
        site.addsitedir(str(packages))


def loose_file(name: str) -> Path:
    """A source file that is in no package, such as Triton's tutorials or nanoGPT's model, put there by hand."""
    return folder() / name


@dataclass(frozen=True)
class Peer:
    """One package, or one way to call it.

    Attributes:
        name: of its variants. A name must not begin with a word of `rows.OURS`.
        distribution: whose version is recorded.
        module: that must be importable.
        ops: op → builder. The call takes the inputs of the suite and returns what the public function of that op returns (see `OPS`).
        file: a loose source file it needs instead of a module.
        needs: names of further modules without which it does not run.
        least_capability: of the GPU; None = also on a CPU.
        on_gpu: False for what only stands in on a CPU.
        always: part of torch, so it is measured even where no peers are asked for.
        slow_start: takes tens of seconds to compile; left out of the quick grid.
        notes: op → a sentence beside its figures.
    """

    name: str
    distribution: str
    module: str
    ops: Mapping[str, Builder]
    file: str = ""
    needs: tuple[str, ...] = ()
    least_capability: tuple[int, int] | None = (8, 0)
    on_gpu: bool = True
    always: bool = False
    slow_start: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)

    def version(self) -> str:
        """Of the installed package; of a loose file, its path."""
        if self.file:
            return str(loose_file(self.file))
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    def why_absent(self, device: torch.device) -> str | None:
        """Why it cannot run here, or ``None``. Nothing is imported but parents of the module."""
        use_folder()
        if self.file and not loose_file(self.file).is_file():
            return f"there is no file {loose_file(self.file)}"
        for module in (self.module, *self.needs):
            if not _is_importable(module):
                return f"the module {module} is not installed"
        if not self.on_gpu and device.type == "cuda":
            return "each of its backends is measured by itself on a GPU"
        if self.least_capability is None:
            return None
        if device.type != "cuda":
            return "it needs a GPU"
        capability = torch.cuda.get_device_capability(device)
        if capability < self.least_capability:
            return f"it needs compute capability {self.least_capability[0]}.{self.least_capability[1]}"
        return None


@functools.cache
def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        # A parent package is missing, or breaks when it is imported.
        return False


def lazily(factory: Factory) -> Variant:
    """A variant that is made at its first call."""
    made: list[Variant] = []

    def call(inputs: Inputs) -> Any:
        if not made:
            made.append(factory())
        return made[0](inputs)

    return call


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for exactly the shapes it is called with, as one graph.

    What is compiled of a function is kept by its code, for all rows together; after eight shapes PyTorch would silently go on uncompiled.
    """
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    # A backward pass that is timed runs again and again over what its forward pass saved.
    functorch.donated_buffer = False
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 2**20
    return torch.compile(function, dynamic=False, fullgraph=True)


def kept(inputs: Inputs, key: str, make: Callable[[], Any]) -> Any:
    """Something a variant prepares once for each input set (a block mask, a plan, a copy it may overwrite), outside the timing."""
    store = inputs.setdefault("kept", {})
    if key not in store:
        store[key] = make()
    return store[key]
