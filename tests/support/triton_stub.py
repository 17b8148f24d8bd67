"""Triton's real way to a launch on a machine without a GPU: only the CUDA driver below it is a stub.

    with stubbed_driver(arch=90): ...

A libcuda.so.1 whose functions succeed and do nothing is built with the C compiler (that Triton wants anyway), and Triton's own driver is
made on top of it: its C module, which takes a launch's arguments apart, is compiled and called as on a GPU, and kernels are compiled for
the architecture asked for. :data:`STUBBED` says what is not as on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from pytransformer.kernels import launch, prepared
from pytransformer.ops import backend, checks
from pytransformer.ops.op import forget_launches

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build/triton_stub"
WARP_SIZE = 32

STUBBED = (
    "the functions of libcuda.so.1, which return at once (cuLaunchKernelEx, cuCtxGetCurrent, cuModuleLoadData ...)",
    "torch's current device and stream, which a torch without CUDA does not have: C functions that return -1 and 0",
    "tensors are the CPU's, with device index -1, and the ops are told that Triton serves these and that their values may not be read",
)

# Everything that Triton's C modules call, found by the names they use; each takes what it is given and says that all is well.
_STUB = """
#include <cuda.h>
#include <string.h>
#define STUB __attribute__((visibility("default"))) CUresult
static int launches = 0, encodings = 0;
__attribute__((visibility("default"))) int stub_launches(void) { return launches; }
__attribute__((visibility("default"))) int stub_encodings(void) { return encodings; }
STUB cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **e) { launches++; return CUDA_SUCCESS; }
STUB cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
STUB cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
STUB cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
STUB cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
STUB cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
STUB cuDeviceGet(CUdevice *device, int ordinal) { *device = 0; return CUDA_SUCCESS; }
STUB cuDeviceGetAttribute(int *value, CUdevice_attribute a, CUdevice d) { *value = 227 << 10; return CUDA_SUCCESS; }
STUB cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return CUDA_SUCCESS; }
STUB cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
STUB cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
STUB cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
STUB cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
STUB cuGetErrorString(CUresult error, const char **text) { *text = "stub"; return CUDA_SUCCESS; }
STUB cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  static long functions = 0;
  *function = (CUfunction)++functions;
  return CUDA_SUCCESS;
}
STUB cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)1; return CUDA_SUCCESS; }
STUB cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
STUB cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  memcpy(data, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}
STUB cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *sizes,
                            const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps, CUtensorMapInterleave interleave,
                            CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  unsigned long long *words = (unsigned long long *)map;
  memset(map, 0, sizeof *map);
  words[0] = (unsigned long long)address;
  words[2] = type | (unsigned long long)rank << 8 | (unsigned long long)swizzle << 16 | (unsigned long long)fill << 24;
  for (unsigned i = 0; i < rank; i++) words[3 + i] = sizes[i] | (unsigned long long)box[i] << 48;
  for (unsigned i = 0; i + 1 < rank; i++) words[8 + i] = strides[i];
  encodings++;
  return CUDA_SUCCESS;
}
STUB cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
"""


@functools.cache
def _library() -> ctypes.CDLL:
    """The stub, built if need be, and loaded under the driver's name, so that whoever asks for that gets it."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("Triton's launch needs a C compiler (gcc or clang)")
    FOLDER.mkdir(parents=True, exist_ok=True)
    source, library = FOLDER / "stub.c", FOLDER / "libcuda.so.1"
    if not library.exists() or not source.exists() or source.read_text() != _STUB:
        source.write_text(_STUB)
        include = Path(triton.__file__).parent / "backends/nvidia/include"
        built = library.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}", str(source)]
        subprocess.run([*command, "-o", str(built)], check=True)
        built.replace(library)  # whole or not at all, whoever else builds it
    return ctypes.CDLL(str(library))


@functools.cache
def _driver(arch: int) -> Any:
    _library()
    with _environment(TRITON_LIBCUDA_PATH=str(FOLDER)):
        from triton.backends.nvidia.driver import CudaDriver, CudaUtils

        utils = CudaUtils()

    class StubDriver(CudaDriver):  # type: ignore[misc]
        """Triton's driver, but for the questions to torch."""

        def __init__(self) -> None:
            self.utils, self.launcher_cls = utils, _launcher()
            self.get_current_device = CURRENT_DEVICE
            self.get_current_stream = CURRENT_STREAM
            self.get_device_capability = lambda device: divmod(arch, 10)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, WARP_SIZE)

    return StubDriver()


def _launcher() -> Any:
    from triton.backends.nvidia.driver import CudaLauncher

    @functools.wraps(CudaLauncher, updated=())
    class Launcher(CudaLauncher):  # type: ignore[misc]
        def __init__(self, source: Any, metadata: Any) -> None:
            with _environment(TRITON_LIBCUDA_PATH=str(FOLDER)):  # Triton 3.6 compiles one for each kernel
                super().__init__(source, metadata)

    return Launcher


# C functions, as torch's are.
CURRENT_DEVICE: Callable[[], int] = (-1).__int__
CURRENT_STREAM: Callable[[int], int] = (0).__mul__


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def count_launches() -> int:
    """How many kernels this process has launched on the stub."""
    count: int = _library().stub_launches()
    return count


def count_encodings() -> int:
    """How many tensor maps this process has had encoded by the stub."""
    count: int = _library().stub_encodings()
    return count


class StubTensorMap(NamedTuple):
    """What the stub wrote into a tensor map: what it was asked for. Sizes, strides in bytes and box are innermost first."""

    address: int
    rank: int
    swizzle: int
    fill: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


def read_tensor_map(tensor_map: Any) -> StubTensorMap:
    """Of what Triton's launcher is given: a Python object with the map's 128 bytes at its end."""
    start = id(tensor_map) + type(tensor_map).__basicsize__ - 128
    words = struct.unpack("16Q", ctypes.string_at(start, 128))
    rank = words[2] >> 8 & 255
    sizes = words[3 : 3 + rank]
    return StubTensorMap(
        words[0],
        rank,
        words[2] >> 16 & 255,
        words[2] >> 24 & 255,
        tuple(size & 2**48 - 1 for size in sizes),
        words[8 : 7 + rank],
        tuple(size >> 48 for size in sizes),
    )


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Inside, the current stream is captured into a CUDA graph, as far as our launches can tell."""
    with mock.patch.object(prepared, "is_capturing", lambda device: True):
        yield


@contextlib.contextmanager
def visible_gpu() -> Iterator[None]:
    """Inside the stubbed driver: torch says that there is a GPU, of the architecture that was asked for."""
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(launch, "assume_current_gpu", lambda: launch.assume_arch(max(_archs))),
    ):
        yield


_archs: set[int] = set()


@contextlib.contextmanager
def stubbed_driver(arch: int) -> Iterator[None]:
    """Inside, kernels called with tensors of the CPU are compiled for ``arch`` and launched on nothing, by the ops too."""
    if launch.interpreting():
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET")
    _archs.add(arch)
    if len(_archs) > 1:
        raise RuntimeError(
            "what was compiled for one architecture is kept for all tensors of the CPU: one of them per process"
        )
    active = driver._active
    driver.set_active(_driver(arch))
    unavailable = backend.unavailable

    def serves(name: str, device_type: str) -> str | None:
        return None if (name, device_type) == ("triton", "cpu") else unavailable(name, device_type)

    forget_launches()
    try:
        with (
            launch.assume_arch(arch),
            mock.patch.object(prepared, "_current_device", CURRENT_DEVICE),
            mock.patch.object(prepared, "current_stream", CURRENT_STREAM),
            mock.patch.object(backend, "unavailable", serves),
            mock.patch.object(checks, "readable", lambda tensor: False),
        ):
            yield
    finally:
        driver._active = active
        forget_launches()
