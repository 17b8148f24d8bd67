#!/usr/bin/env bash
# ptxas moves the wait for an asynchronous product (wgmma.wait_group) in front of exponentials that stand before it.
#
# Expected: wgmma is asynchronous so that other work can lie beside it. A loop as in FlashAttention-3 issues two products, waits for the first,
# takes exponentials of it while the second runs, and then waits for the second; in the PTX all 32 exponentials of a thread stand between
# the two waits. What happens: in the machine code 10 of them do, and 22 come after the second wait, when nothing runs beside them any more.
# PTX's wait names no registers, and ptxas schedules it like a load whose latency is to be hidden: as early as it can within a basic block.
# It crosses no branch: a wait for an mbarrier that stands between them, and is there anyway, can hold it back.
# Why it matters: the overlap that a kernel was written for is gone, its numbers are right and its instruction count is the same. Only the order
# of instructions in the machine code shows it (or a profile).
# Source: the PTX and nvdisasm of what Triton's own ptxas makes of it. Versions: triton 3.9.0 (ptxas 12.9), sm_90a; no GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install triton==3.9.0
cat > "$folder/overlap.py" <<'PYTHON'
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

SCORES = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


@gluon.jit
def exponentials_beside_a_product(q_ptr, out_ptr, steps):
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, SCORES))
    places = rows[:, None] * 64 + columns[None, :]
    tile = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED)
    tile.store(gl.load(q_ptr + places))
    fence_async_shared()
    zeros = gl.zeros([64, 64], gl.float32, SCORES)
    out = zeros
    weights = gl.convert_layout(gl.load(q_ptr + places), gl.DotOperandLayout(0, SCORES, 2))
    for _ in range(steps):
        scores = warpgroup_mma(tile, tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
        out = warpgroup_mma(weights, tile, out, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        p = gl.exp2(scores)
        out = warpgroup_mma_wait(0, deps=[out])
        weights = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, SCORES, 2))
    gl.store(out_ptr + places, out)


def between_and_after(operations, exponential):
    """(exponentials between the two waits, after the second)."""
    first, second = (place for place, name in enumerate(operations) if not name.startswith(exponential))
    return second - first - 1, len(operations) - second - 1


source = GluonASTSource(exponentials_beside_a_product, {"q_ptr": "*bf16", "out_ptr": "*fp32", "steps": "i32"})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
tool = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/nvdisasm"))
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(compiled.asm["cubin"])
    file.flush()
    machine_code = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
written = between_and_after(re.findall(r"ex2\.approx|wgmma\.wait_group", compiled.asm["ptx"]), "ex2")
made = between_and_after(re.findall(r"MUFU\.EX2|WARPGROUP\.DEPBAR", machine_code), "MUFU")
print("triton", triton.__version__)
print(f"PTX: {written[0]} exponentials between the waits, {written[1]} after the second")
print(f"machine code: {made[0]} exponentials between the waits, {made[1]} after the second")
if written != (32, 0) or made[1] <= 16:
    sys.exit("the behaviour has changed")
PYTHON
TRITON_DEFAULT_FP_FUSION=1 TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/overlap.py"
