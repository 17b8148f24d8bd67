#!/usr/bin/env bash
# Triton's interpreter leaves functions of triton.language.core pointed at itself after a kernel that calls tl.sum.
#
# Expected: a launch in the interpreter (TRITON_INTERPRET=1) replaces functions of the language for its own time; the scope in which it does
# so is undone when the launch ends, also with an error. What happens: tl.sum, tl.max, tl.softmax and their like are device functions of a
# module of Triton's own, which names triton.language.core and not triton.language. A call of a device function opens a second scope for the
# modules that it names, and nobody undoes that one: about 60 functions stay replaced until the process ends. A kernel without such a call
# leaves nothing.
# Why it matters: whatever finds its operators there afterwards gets the interpreter's. A kernel that was compiled in the same process before
# the launch (for its PTX or its registers, say, beside interpreted tests) cannot be compiled after it; Gluon's tensors are taken for Triton's.
# Which test fails then depends on the order in which tests run.
# Source: triton/runtime/interpreter.py, the call of an interpreted function. Versions: triton 3.9.0, torch 2.13.0 (CPU), numpy 2.3.5.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 triton==3.9.0 numpy==2.3.5
cat > "$folder/leak.py" <<'PYTHON'
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction


@triton.jit
def double(x, out, count: tl.constexpr):
    i = tl.arange(0, count)
    tl.store(out + i, tl.load(x + i) * 2)


@triton.jit
def total(x, out, count: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, count))))


def twice(x, out, count: tl.constexpr):
    i = tl.arange(0, count)
    tl.store(out + i, tl.load(x + i) + 1)


def compiles():
    source = ASTSource(JITFunction(twice), {"x": "*fp32", "out": "*fp32", "count": "constexpr"}, {(2,): 128})
    try:
        return "add.f32" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    except Exception as error:
        return type(error).__name__


imported = dict(vars(tl.core))
print("triton", triton.__version__, "torch", torch.__version__)
x, out = torch.ones(128), torch.zeros(128)
found = [compiles()]
for kernel in (double, total):
    kernel[(1,)](x, out, 128)
    left = [name for name, value in vars(tl.core).items() if imported.get(name) is not value]
    found += [len(left) > 0, compiles()]
    print(f"after {kernel.__name__}: {len(left)} names of triton.language.core are others, for example {left[:3]}")
print("compiles at first, after double, after total:", found[0], found[2], found[4])
if found[0] is not True or found[1] or found[2] is not True or not found[3] or found[4] is True:
    sys.exit(f"the behaviour has changed: {found}")
PYTHON
TRITON_DEFAULT_FP_FUSION=1 TRITON_CACHE_DIR="$folder/cache" TRITON_ALWAYS_COMPILE=1 "$folder/venv/bin/python" "$folder/leak.py"
