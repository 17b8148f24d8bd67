#!/usr/bin/env bash
# torch.compile on a CPU takes a batched product of one row away from the library and writes a loop of its own, several times slower.
#
# Expected: a compiled torch.bmm is the library's product, as it is with two rows and as torch.mm's one-row product nearly is; compiling does not
# make a lone product slower.
# What happens: where each matrix on the left has one row (or each on the right one column), no library is called any more. The product becomes
# a multiplication and a sum in a generated loop, which over row-major matrices on the right takes two to four times as long as eager mode.
# With two rows the same code is as fast as eager mode.
# Why it matters: a decoding step of one sequence is made of such products: queries with keys, weights with values, and any weight that is laid
# out as a batch so that all threads take part (MKL multiplies a single row with a matrix on one thread on AMD's CPUs). A decoder built on them
# takes 32 ms a token eagerly and 80 compiled (GPT-2 124M, two cores), although compiling is what one tries to make it faster.
# Source: tuned_bmm in torch/_inductor/kernel/bmm.py.
# Versions: torch 2.13.0, CPU, AVX2, g++ 12.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 setuptools==80.9.0 numpy==2.3.5
cat > "$folder/bmm.py" <<'PYTHON'
import sys
import time

import torch
from torch._inductor.utils import run_and_get_code

torch.set_grad_enabled(False)
torch.set_num_threads(1)
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())


def milliseconds(function):
    function()
    best = 1e9
    for _ in range(15):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


found = {}
for rows in (1, 2):
    x, w = torch.randn(8, rows, 768), torch.randn(8, 768, 3072)
    compiled = torch.compile(torch.bmm, dynamic=False)
    y, code = run_and_get_code(compiled, x, w)
    library = "extern_kernels.bmm(" in code[0] or "aten_bmm" in code[0]
    assert torch.allclose(y, torch.bmm(x, w), atol=1e-3)
    eager, fused = milliseconds(lambda: torch.bmm(x, w)), milliseconds(lambda: compiled(x, w))
    found[rows] = library, fused / eager
    print(f"{rows} row(s): library called: {library}, eager {eager:.2f} ms, compiled {fused:.2f} ms, {fused / eager:.1f} times")

if found[1][0] or not found[2][0]:
    sys.exit("the library is called for other numbers of rows now")
if found[1][1] < 1.5:
    sys.exit("the generated loop is no slower any more")
PYTHON
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/bmm.py"
