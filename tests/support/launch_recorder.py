"""What a launcher would launch on a GPU of some architecture, found out on a machine without one.

Triton decides in ``JITFunction.run`` what to compile: the types of the arguments, which of them are constants, which pointers and integers
are multiples of 16. None of that needs a GPU, only a driver that says which architecture it drives. So a driver that says so is put in
place, Triton's own ``run`` does its work on tensors of the CPU, and where it would compile, the request is noted instead.

This must not run in a process that interprets kernels (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from pytransformer.kernels.launch import assume_arch

WARP_SIZE = 32


@dataclass(frozen=True)
class Launch:
    """One request to compile.

    Attributes:
        kernel: the ``@triton.jit`` or ``@gluon.jit`` function.
        arch: compute capability as major * 10 + minor.
        signature: types by parameter name, e.g. ``{"x_ptr": "*bf16", "num_cols": "i32", "BLOCK": "constexpr"}``.
        constexprs: values of the constants by path, e.g. ``{(2,): 128}``.
        attrs: what is known of the others, e.g. ``{(0,): [["tt.divisibility", 16]]}``.
        options: the backend's options (``num_warps``, ``num_stages``, ``enable_fp_fusion`` ...), complete.
    """

    kernel: Any
    arch: int
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: Any

    @property
    def name(self) -> str:
        """Name of the kernel."""
        return str(self.kernel.__name__)

    @property
    def target(self) -> GPUTarget:
        """What Triton compiles for."""
        return GPUTarget("cuda", self.arch, WARP_SIZE)

    def source(self) -> ASTSource:
        """What Triton compiles, of a kernel of its own language or of Gluon."""
        kind = GluonASTSource if isinstance(self.kernel, GluonJITFunction) else ASTSource
        return kind(self.kernel, self.signature, self.constexprs, self.attrs)

    @property
    def key(self) -> str:
        """Equal for requests that give the same machine code, with this Triton and this source."""
        parts = (triton.__version__, self.source().hash(), make_backend(self.target).hash(), self.options.hash())
        return hashlib.sha256("-".join(parts).encode()).hexdigest()


def request(
    kernel: Any, arch: int, signature: dict[str, Any], constexprs: dict[Any, Any], attrs: Any = None, **options: Any
) -> Launch:
    """What compiling a kernel directly asks for, not by a launch: constants by name, ``options`` beside the backend's own."""
    complete = make_backend(GPUTarget("cuda", arch, WARP_SIZE)).parse_options(options)
    return Launch(kernel, arch, signature, constexprs, attrs or {}, complete)


class _RecordingDriver:
    """As much of a driver as ``JITFunction.run`` asks before it compiles."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, WARP_SIZE)

    def get_current_device(self) -> int:
        # Triton keeps what it knows of a kernel by device, so each architecture is a device of its own.
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0


def _refuse_interpreter() -> None:
    if triton.knobs.runtime.interpret:
        raise RuntimeError("launches cannot be recorded while kernels are interpreted: unset TRITON_INTERPRET")


@contextlib.contextmanager
def record_launches(arch: int) -> Iterator[list[Launch]]:
    """Inside, kernels are not launched (outputs stay as they were allocated) but noted in the list, as for a GPU of ``arch``."""
    _refuse_interpreter()
    launches: list[Launch] = []
    do_compile, active = JITFunction._do_compile, driver._active

    def record(
        kernel: Any, key: Any, signature: Any, device: int, constexprs: Any, options: Any, attrs: Any, warmup: bool
    ) -> None:
        launches.append(Launch(kernel, arch, signature, constexprs, attrs, options))

    JITFunction._do_compile = record
    driver.set_active(_RecordingDriver(arch))
    try:
        with assume_arch(arch):
            yield launches
    finally:
        JITFunction._do_compile = do_compile
        driver._active = active


def record(case: Callable[[], object], arch: int) -> list[Launch]:
    """The different requests that one call makes, in order."""
    with record_launches(arch) as launches:
        case()
    return list({launch.key: launch for launch in launches}.values())
