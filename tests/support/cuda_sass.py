"""What nvcc made of the CUDA kernels: the extension is compiled for a few architectures, and its machine code read, without a GPU."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from pathlib import Path

import triton

from tests.support.emulator import ROOT, builder
from tests.support.hot_loop import hot_loops
from tests.support.occupancy import cuda_blocks
from tests.support.sass import Statistics, count_instructions

# What makes and reads statistics of nvcc's objects, beside the rules of all kernels.
_READERS = ("cuda_sass.py", "cuda_blocks.cpp", "gate_figures.py", "listed.py")


def sources() -> str:
    """Of all that nvcc compiles, a hash."""
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp", ".py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def decided_by() -> list[str]:
    """What decides, beside the rules, what is found: the sources with the flags (build.py is one), nvcc, its flags out of the environment,
    the architectures, and who reads the objects."""
    nvcc = builder().find_nvcc()
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    appended = [os.environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
    readers = [(ROOT / "tests/support" / name).read_text() for name in _READERS]
    return [sources(), release, *appended, *ARCHITECTURES, *readers]


# PYTRANSFORMER_COMPILE_ARCHS=90 narrows them down, as it does for the Triton kernels.
ARCHITECTURES = tuple(os.environ.get("PYTRANSFORMER_COMPILE_ARCHS", "80,90,100").split(","))

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_FUNCTION = re.compile(r"^\s*Function\s*:?\s*(\S+?):?$", re.MULTILINE)
_ARCHITECTURE = re.compile(r"^arch = sm_(\d+)[af]?$", re.MULTILINE)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# nvcc names an anonymous namespace after a hash of the file's path.
_ANONYMOUS = re.compile(r"_GLOBAL__N__[0-9a-f]+_\d+_\w+?_cu_[0-9a-f]+::|\(anonymous namespace\)::")


def compile_all() -> Path:
    """The folder with the objects of the extension, compiled for :data:`ARCHITECTURES`.

    Raises:
        BuildError: nvcc is missing, or warns: warnings are errors in this build.
    """
    folder = ROOT / "build/gate"
    builder().build("cuda", folder=folder, output=folder / "_cuda.so", archs=" ".join(ARCHITECTURES), quiet=True)
    return folder


def statistics(folder: Path) -> dict[str, Statistics]:
    """Of every kernel in the objects of a folder, by "file kernel<...> sm_90". Where the block is compiled in, its warps and dynamic shared
    memory are there too; else ``num_warps`` is 0, and ``shared_memory`` what is static.

    Raises:
        LookupError: cuda_blocks.cpp knows a block of a kernel that is not there.
    """
    found = {}
    blocks = cuda_blocks(tuple(map(int, ARCHITECTURES)))
    unmatched = set(blocks)
    # Not all that lies there: a source that was renamed has left its object behind.
    for name in re.findall(r"^build (\S+\.cu\.o):", (folder / "build.ninja").read_text(), re.MULTILINE):
        path, file = folder / name, unit(name)
        usage = dict(_sections(_run("cuobjdump", "-res-usage", str(path))))
        for key, text in _sections(_run("cuobjdump", "-sass", str(path))):
            registers, stack, shared, _ = map(int, _USAGE.search(usage[key]).groups())  # type: ignore[union-attr]
            arch, function = key
            kernel = readable(function)
            block = (*_deciding(kernel), int(arch))
            unmatched.discard(block)
            warps, dynamic = blocks.get(block, (0, 0))
            found[f"{file} {kernel} sm_{arch}"] = Statistics(
                registers=registers,
                stack_bytes=stack,
                shared_memory=shared + dynamic,
                num_warps=warps,
                instructions=count_instructions(text),
                loops=tuple(hot_loops(text)),
            )
    if unmatched:
        raise LookupError(f"cuda_blocks.cpp says what a block takes of kernels that are not there: {sorted(unmatched)}")
    return found


def _deciding(kernel: str) -> tuple[str, str]:
    """The name of a kernel and those of its template arguments that decide how large its block is, as cuda_blocks.cpp prints them."""
    name, _, rest = kernel.split("::")[-1].partition("<")
    arguments = rest.rstrip(">").split(", ")
    width = next((argument for argument in arguments if argument.isdigit()), "")
    if name != "decode_kernel":
        return name, width
    return name, f"{'plain' if arguments[0] == arguments[1] else 'widened'} {width}"


def unit(name: str) -> str:
    """E.g. "attention_forward_float16_64" for the name of its object."""
    return name.removeprefix("csrc_").removesuffix(".cu.o")


def _sections(listing: str) -> list[tuple[tuple[str, str], str]]:
    """((architecture, mangled name), text) for every function of a listing."""
    sections = []
    architectures = list(_ARCHITECTURE.finditer(listing))
    for index, arch in enumerate(architectures):
        end = architectures[index + 1].start() if index + 1 < len(architectures) else len(listing)
        functions = list(_FUNCTION.finditer(listing, arch.end(), end))
        for number, function in enumerate(functions):
            stop = functions[number + 1].start() if number + 1 < len(functions) else end
            sections.append(((arch.group(1), function.group(1)), listing[function.end() : stop]))
    return sections


def readable(mangled: str) -> str:
    """E.g. "rms_row_kernel<__nv_bfloat16>" for a kernel's mangled name: without its namespaces and parameters."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = _ANONYMOUS.sub("", name).removeprefix("void ").replace("pytransformer::", "")
    depth, end = 0, len(name)
    for index, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0 and index:
            end = index
            break
    return name[:end]


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout
