#!/usr/bin/env bash
# torch.compile's loop over 8-bit weights takes several times as long as over float32 ones where vectors are AVX2's: it converts number by number.
#
# Expected: (codes.to(float32) * x).sum(-1), the product of a weight-only quantised layer with one row, reads a quarter of the bytes that float32
# weights have; fused by torch.compile it is as fast as theirs or faster.
# What happens: the generated loop looks vectorised (vectors of int8 are loaded, and converted by at::vec::convert), but with vectors of 256 bits
# that conversion is the general one, element by element through memory. It takes four to six times as long as the loop over float32 weights.
# uint8, int16 and int32 are as slow; bfloat16 and float16 are converted by instructions and are faster than float32.
# Why it matters: most desktop CPUs and AMD's servers up to Zen 3 have AVX2 alone. Weight-only int8 written in plain torch and compiled, as
# tutorials do it, makes decoding there slower than no quantisation; nothing in the generated code shows it.
# Source: the specialisations of VecConvert in torch's header ATen/cpu/vec/vec256/vec256_convert.h, and the general one in vec_convert.h.
# Versions: torch 2.13.0, CPU, inductor told to use vectors of 256 bits, g++ 12.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 setuptools==80.9.0 numpy==2.3.5
cat > "$folder/codes.py" <<'PYTHON'
import sys
import time

import torch
import torch._inductor.config
from torch._inductor.utils import run_and_get_code

torch._inductor.config.cpp.simdlen = 256
torch.set_grad_enabled(False)
torch.set_num_threads(1)
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())


def product(x, weight):
    return (weight.to(torch.float32) * x).sum(-1)


def milliseconds(function):
    function()
    best = 1e9
    for _ in range(15):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


x, codes = torch.randn(1, 768), torch.randint(-127, 128, (3072, 768), dtype=torch.int8)
found = {}
for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.int32):
    weight = codes.to(dtype)
    compiled = torch.compile(product, dynamic=False)
    y, code = run_and_get_code(compiled, x, weight)
    assert torch.allclose(y, product(x, weight), rtol=1e-3, atol=1e-1)
    found[dtype] = milliseconds(lambda: compiled(x, weight))
    print(f"{dtype}: {weight.nbytes} bytes, compiled {found[dtype]:.2f} ms; at::vec in the code: {'at::vec::Vectorized' in code[0]}")
eager = milliseconds(lambda: product(x, codes))
print(f"torch.int8, eager with its float32 copy: {eager:.2f} ms")

if found[torch.int8] < 2 * found[torch.float32]:
    sys.exit("8-bit weights are no longer so slow")
if found[torch.bfloat16] > found[torch.float32] * 1.5:
    sys.exit("bfloat16 is slow too")
PYTHON
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/codes.py"
