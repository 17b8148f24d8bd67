"""Every CUDA kernel as nvcc compiles it: nothing in local memory, tensor cores and 128-bit accesses where they are meant."""

from __future__ import annotations

import re

import pytest

from tests.support import cuda_sass, gate_figures
from tests.support.emulator import builder
from tests.support.listed import without_match
from tests.support.sass import GLOBAL_128_BIT, Statistics

MAX_STACK_BYTES = 16
# What ptxas keeps on the stack in spite of everything, and is known: bytes by a pattern of the kernel's name.
KNOWN_STACKS = {
    # All 255 registers are taken; smaller tiles would read the keys twice as often on the architectures that have room.
    r"attention_backward_dq_kernel<\w+, 128, \w+> sm_100": 48,
    # Statistics of rows wider than 16384 columns; outside the loop over memory.
    r"norm_forward_wide_kernel<\w+, 8> sm_100": 24,
}
# Most accesses of local memory in a hot loop that are known, by a pattern of the kernel's name: all 255 registers are taken in each.
KNOWN_LOCAL_LOOPS = {
    # A word for each 64 keys, in about a thousand instructions. One counter less, positions read from shared memory at each step, and the
    # warp's first row computed again all made it more.
    r"attention_forward_kernel<\w+, 128, ": 4,
    r"attention_backward_dq_kernel<\w+, 128, \w+> sm_80": 9,
    r"attention_backward_dq_kernel<\w+, 128, \w+> sm_100": 9,
    r"norm_forward_parts_kernel<__nv_bfloat16, 8> sm_100": 18,
    r"norm_forward_wide_kernel<__nv_bfloat16, 8> sm_100": 18,
}
# Of these kernels the block is compiled in.
FIXED_BLOCKS = (
    "attention_forward_kernel",
    "attention_backward_dq_kernel",
    "attention_backward_dkv_kernel",
    r"\bdecode_kernel",
)
# These files hold no kernel, but choose among those of others.
DISPATCHERS = {"norm_forward", "decode_attention_launch"}
# Kernels that stream tensors through registers, in the instances for 16-byte accesses: 8 elements of 16 bits, 4 of 32.
_SIXTEEN_BYTES = "<(__half, 8|__nv_bfloat16, 8|float, 4)"
STREAMING = (
    rf"norm_forward_\w+_kernel{_SIXTEEN_BYTES}",
    rf"norm_backward_rows_kernel{_SIXTEEN_BYTES}",
    rf"rope_kernel{_SIXTEEN_BYTES}",
    r"kv_append_kernel<\w+, true",
)
# Of all attention kernels these have no products.
WITHOUT_PRODUCTS = ("attention_backward_statistics_kernel",)


def _nvcc_missing() -> str | None:
    try:
        builder().find_nvcc()
    except builder().BuildError as error:
        return str(error)
    return None


pytestmark = [pytest.mark.skipif(_nvcc_missing() is not None, reason=str(_nvcc_missing())), pytest.mark.compiles]


def decided_by() -> list[str]:
    return cuda_sass.decided_by()


@pytest.fixture(scope="session")
def kernels() -> dict[str, Statistics]:
    """Statistics of all kernels by "file kernel sm_90"."""
    return cuda_sass.statistics(cuda_sass.compile_all())


def known(allowed: dict[str, int], name: str, otherwise: int) -> int:
    """What a list allows a kernel."""
    return next((number for pattern, number in allowed.items() if re.search(pattern, name)), otherwise)


def test_every_source_has_kernels_for_every_architecture(kernels):
    sources = {cuda_sass.unit(name) for path in builder().source_files(".cu") for name in builder().units(path)}
    assert sources >= DISPATCHERS
    architectures = {f"sm_{arch}" for arch in cuda_sass.ARCHITECTURES}
    compiled = {(name.split()[0], name.split()[-1]) for name in kernels}
    assert compiled == {(source, arch) for source in sources - DISPATCHERS for arch in architectures}


def test_no_kernel_uses_local_memory(kernels):
    spilling = {}
    for name, got in kernels.items():
        if got.stack_bytes > known(KNOWN_STACKS, name, MAX_STACK_BYTES):
            spilling[name] = (got.stack_bytes, got.count(gate_figures.LOCAL_ACCESS))
    assert not spilling, "(bytes, accesses) of local memory"


def test_hot_loops_stay_out_of_local_memory(kernels):
    found = {}
    for name, got in kernels.items():
        most = max((loop.classes.get("local", 0) for loop in got.loops if loop.is_loop), default=0)
        if most > known(KNOWN_LOCAL_LOOPS, name, 0):
            found[name] = most
    assert not found, "accesses of local memory in a hot loop"


def test_blocks_that_are_compiled_in_are_known(kernels):
    """Two attention forward blocks of 4 warps share an SM of sm_90 up to a width of 128, as forward.cuh says."""
    for name, got in kernels.items():
        if any(re.search(pattern, name) for pattern in FIXED_BLOCKS):
            figures = gate_figures.figures(got, gate_figures.arch_of(name))
            assert got.num_warps > 0 and figures["blocks_per_sm"] >= 1, name
            if "attention_forward_kernel" in name and ", 256" not in name:
                assert figures["blocks_per_sm"] >= 2, name


def test_attention_uses_tensor_cores(kernels):
    counts = {
        name: got.count(gate_figures.WARP_MMA)
        for name, got in kernels.items()
        if "attention" in name.split()[0] and not any(re.search(pattern, name) for pattern in WITHOUT_PRODUCTS)
    }
    assert counts and all(counts.values()), counts


def test_streaming_kernels_have_wide_accesses(kernels):
    wide = {
        name: got.count(GLOBAL_128_BIT)
        for name, got in kernels.items()
        if any(re.search(pattern, name) for pattern in STREAMING)
    }
    assert all(wide.values()), wide


def test_every_kernel_that_is_listed_is_there(kernels):
    """A list that names what is called otherwise now judges nothing, and says so here."""
    names = [f"{name.rsplit(' ', 1)[0]} sm_{arch}" for name in kernels for arch in (80, 90, 100)]
    lists = (KNOWN_STACKS, KNOWN_LOCAL_LOOPS, FIXED_BLOCKS, STREAMING, WITHOUT_PRODUCTS)
    assert not without_match([pattern for listed in lists for pattern in listed], names)


def test_figures_are_those_committed(kernels, record_figures):
    record_figures("cuda", kernels)
