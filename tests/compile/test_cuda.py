"""Every CUDA kernel as nvcc compiles it: nothing in local memory, tensor cores and 128-bit accesses where they are meant."""

from __future__ import annotations

import re

import pytest

from tests.support import cuda_sass, gate_figures
from tests.support.emulator import builder
from tests.support.sass import GLOBAL_128_BIT, GLOBAL_ACCESS, Statistics

MAX_STACK_BYTES = 16
# Kernels that stream tensors through registers, in the instance for aligned rows.
STREAMING = re.compile(r"^(norm|rope|kv_cache)_")


@pytest.fixture(scope="session")
def kernels() -> dict[str, Statistics]:
    """Statistics of all kernels by "file kernel sm_90"."""
    try:
        builder().find_nvcc()
    except builder().BuildError as error:
        pytest.skip(str(error))
    return cuda_sass.statistics(cuda_sass.compile_all())


def test_every_source_has_kernels_for_every_architecture(kernels):
    sources = {
        path.relative_to(builder().CSRC).as_posix().replace("/", "_").removesuffix(".cu")
        for path in builder().source_files(".cu")
    }
    architectures = {f"sm_{arch.rstrip('af')}" for arch in cuda_sass.ARCHITECTURES}
    compiled = {(name.split()[0], name.split()[-1]) for name in kernels}
    assert compiled == {(source, arch) for source in sources for arch in architectures}


def test_no_kernel_uses_local_memory(kernels):
    spilling = {
        name: (got.stack_bytes, got.count(gate_figures.LOCAL_ACCESS))
        for name, got in kernels.items()
        if got.stack_bytes > MAX_STACK_BYTES
    }
    assert not spilling, "(bytes, accesses) of local memory"


def test_attention_uses_tensor_cores(kernels):
    attention = {
        name: got.count(gate_figures.WARP_MMA) for name, got in kernels.items() if "attention" in name.split()[0]
    }
    attention = {
        name: count for name, count in attention.items() if not re.search("combine|delta|reduce|preprocess", name)
    }
    assert attention and all(attention.values()), attention


def test_streaming_kernels_have_wide_accesses(kernels):
    narrow = [
        f"{name}: {got.count(GLOBAL_128_BIT)} of {got.count(GLOBAL_ACCESS)}"
        for name, got in kernels.items()
        if STREAMING.match(name) and "128bit" in name and not got.count(GLOBAL_128_BIT)
    ]
    assert not narrow


def test_figures_are_those_committed(kernels, record_figures):
    record_figures("cuda", kernels)
