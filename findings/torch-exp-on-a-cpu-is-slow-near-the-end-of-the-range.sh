#!/usr/bin/env bash
# On a CPU torch.exp of float32 takes many times as long where its results underflow or are 0, torch.exp2 does not.
#
# Expected: an elementwise function of contiguous numbers takes the same time whatever the numbers, and exp(-inf), which every masked softmax
# computes, is the cheapest of all. What happens: torch hands contiguous float32 to the vector functions of Intel's MKL, which leave their
# fast path for arguments whose result is denormal or 0. A tensor of which half is -inf takes around ten times as long as one of ordinary
# numbers, one of denormal results longer still. torch.exp2 (Sleef) has no such path: it keeps its speed for -inf and for results that are 0.
# Why it matters: whoever writes softmax or attention by hand, with -inf for hidden keys or with the log-sum-exp of the row subtracted first,
# waits mostly for exp. exp2(x · log2 e) is the same to the last bits and several times as fast.
# Source: measured; ATen calls vmsExp for contiguous float32 where torch is built with MKL. Versions: torch 2.13.0, numpy 2.3.5, x86-64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy==2.3.5
cat > "$folder/time.py" <<'PYTHON'
import math
import sys
import timeit

import torch

torch.set_num_threads(1)
ordinary = torch.linspace(-5, 0, 2**18)
half_hidden = ordinary.clone()
half_hidden[::2] = -math.inf
inputs = {"from -5 to 0": ordinary, "half of them -inf": half_hidden, "results of 0": ordinary - 200, "denormal results": ordinary - 92}
out = torch.empty_like(ordinary)
nanoseconds = {
    (name, function.__name__): min(timeit.repeat(lambda: function(x, out=out), number=3, repeat=15)) / 3 / x.numel() * 1e9
    for name, x in inputs.items()
    for function in (torch.exp, torch.exp2)
}
print("torch", torch.__version__, "MKL", torch.backends.mkl.is_available())
for name in inputs:
    print(f"{name:20} exp {nanoseconds[name, 'exp']:6.2f} ns, exp2 {nanoseconds[name, 'exp2']:6.2f} ns a number")
slow = {name: nanoseconds[name, "exp"] / nanoseconds["from -5 to 0", "exp"] for name in inputs}
steady = nanoseconds["half of them -inf", "exp2"] / nanoseconds["from -5 to 0", "exp2"]
print(f"exp: {slow['half of them -inf']:.1f} times as long with -inf, {slow['denormal results']:.1f} with denormals; exp2: {steady:.1f} with -inf")
if not (slow["half of them -inf"] > 3 and slow["denormal results"] > 3 and steady < 2):
    sys.exit("torch.exp has changed: its time no longer depends on the numbers")
PYTHON
"$folder/venv/bin/python" "$folder/time.py"
