#!/usr/bin/env bash
# Triton compiles a cast from float8e5 to bfloat16 that turns infinity and NaN into finite numbers.
#
# Expected: float8e5 (e5m2) has infinity and NaN, bfloat16 has both, and every finite value of the one is a value of the other, so the cast
# is exact for all 256 codes, as torch's is. What happens: the compiled code moves the bits into place and multiplies by 2^112, which is right
# for numbers alone: the exponent field of all ones becomes that of 65536. Infinity is stored as 65536, the three NaNs of each sign as 81920,
# 98304 and 114688, on sm_80, sm_90 and sm_100 alike; nothing in the code asks for the special field.
# Why it matters: an overflowed activation or gradient in e5m2 is meant to be seen as infinity. In a kernel that widens it to bfloat16 it is
# a plausible number from then on, and a check for inf or NaN behind the kernel finds nothing.
# Source: the PTX, whose own arithmetic is repeated here with numbers. Versions: triton 3.9.0, ml_dtypes 0.5.4, numpy 2.3.5; no GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install triton==3.9.0 ml_dtypes==0.5.4 numpy==2.3.5
cat > "$folder/cast.py" <<'PYTHON'
import re
import sys

import ml_dtypes
import numpy as np
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def widen(source, target, count: tl.constexpr):
    i = tl.arange(0, count)
    tl.store(target + i, tl.load(source + i).to(tl.bfloat16))


def as_compiled(code):
    """What the PTX does with one code: bits into place, times 2^112, sign back."""
    bits = ((code << 8) & 0x7FFF) >> 3
    product = np.float32(np.uint32(bits << 16).view(np.float32)) * np.float32(2.0**112)
    return -float(product) if code & 0x80 else float(product)


print("triton", triton.__version__)
signature = {"source": "*fp8e5", "target": "*bf16", "count": "constexpr"}
found = set()
for capability in (80, 90, 100):
    kernel = triton.compile(ASTSource(widen, signature, {(2,): 128}), target=GPUTarget("cuda", capability, 32))
    ptx = kernel.asm["ptx"]
    scales = "0x77800000" in ptx or "0x77807780" in ptx
    asks = re.search(r"\b(setp|testp|selp)\b.*", ptx.split("shr.b32", 1)[1])
    found.add((scales, asks is None))
    print(f"sm_{capability}: multiplies by 2^112: {scales}; a comparison or selection behind it: {asks is not None}")
codes = np.array([0x7C, 0x7D, 0x7E, 0x7F, 0xFC], dtype=np.uint8)
for code, right in zip(codes, codes.view(ml_dtypes.float8_e5m2).astype(np.float32)):
    print(f"code {code:#04x}: is {right}, stored as {as_compiled(int(code)):g}")
every = np.arange(256, dtype=np.uint8)
exact = every.view(ml_dtypes.float8_e5m2).astype(np.float32)
finite = np.isfinite(exact)
model = np.array([as_compiled(int(code)) for code in every], dtype=np.float32)
assert (model[finite] == exact[finite]).all(), "the repeated arithmetic is not the PTX's"
if found != {(True, True)} or not np.isfinite(model).all():
    sys.exit("the compiled cast has changed")
PYTHON
TRITON_DEFAULT_FP_FUSION=1 "$folder/venv/bin/python" "$folder/cast.py"
