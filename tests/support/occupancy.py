"""How many blocks of a kernel an SM holds at a time, by its registers, shared memory and threads (CUDA programming guide, compute
capabilities; the occupancy calculator's granularities)."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from pytransformer.kernels.launch import assume_arch
from tests.support.emulator import ROOT, builder

WARP_SIZE = 32
# Of an SM, the same for sm_80, sm_90 and sm_100; shared memory by architecture, and what the runtime takes of it for each block.
REGISTERS, MAX_WARPS, MAX_BLOCKS = 65536, 64, 32
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
RESERVED_SHARED_MEMORY = 1024
# Registers are given to a warp in units of this many.
REGISTER_UNIT = 256


def blocks_per_sm(arch: int, registers: int, num_warps: int, shared_memory: int) -> int:
    """Blocks that are on an SM at the same time; 0 if not even one fits.

    Args:
        arch: compute capability, 80, 90 or 100.
        registers: per thread.
        num_warps: per block.
        shared_memory: static and dynamic, bytes per block.
    """
    registers_per_warp = -(-registers * WARP_SIZE // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // max(registers_per_warp, 1) // num_warps
    by_shared = SHARED_MEMORY[arch] // (shared_memory + RESERVED_SHARED_MEMORY)
    return min(by_registers, by_shared, MAX_WARPS // num_warps, MAX_BLOCKS)


def cuda_blocks(architectures: tuple[int, ...]) -> dict[tuple[str, str, int], tuple[int, int]]:
    """(warps, bytes of dynamic shared memory) of a block of each CUDA kernel whose block is fixed at compile time, by (kernel, template
    arguments that decide, arch): said by the kernels' own headers, which cuda_blocks.cpp asks. Of the others (norms, rope, kv_append) the
    call decides.

    Raises:
        BuildError: there is no C++ compiler.
    """
    plan = builder().emulated_plan(builder().find_torch(), "emulated", ())
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "cuda_blocks"
        source = Path(__file__).with_name("cuda_blocks.cpp")
        flags = [*plan.kernel_flags, f"-I{ROOT}/csrc", "-O0"]
        subprocess.run([plan.kernel_compiler, *flags, str(source), "-o", str(program)], check=True)
        found = {}
        for arch in architectures:
            with assume_arch(arch) as limits:
                output = subprocess.run(
                    [program, str(limits.shared_memory)], capture_output=True, text=True, check=True
                )
            for line in output.stdout.splitlines():
                kernel, arguments, warps, shared = line.split("\t")
                found[kernel, arguments, arch] = int(warps), int(shared)
    return found
