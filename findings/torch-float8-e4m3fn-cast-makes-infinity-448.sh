#!/usr/bin/env bash
# torch casts infinity, and whatever else overflows, to 448 in float8_e4m3fn; in the other float8 types the same numbers stay inf or NaN.
#
# Expected: e4m3fn has no infinity, but it has NaN, and the four float8 types of torch treat an overflow alike: it is seen afterwards, as it
# is with float16. That is what ml_dtypes (JAX, ONNX, Keras) does, and what torch itself did on a CPU before the conversion was changed in 2026.
# What happens: x.to(torch.float8_e4m3fn) gives 448 from 464.1 up, and 448 for infinity; only NaN stays NaN. float8_e5m2 gives inf, and both
# fnuz types NaN. torch.compile agrees with eager mode, every path of the CPU's vectors too, and torch.full(..., inf) raises an exception.
# Why it matters: an activation or gradient that overflowed to infinity in float16 or bfloat16 is a plausible number behind the cast; a check
# for inf or NaN after quantising, or of the product of the quantised tensors, finds nothing. A scale that is too large for the tensor clips
# without notice, where it made NaN before, and numbers compared with JAX's differ by NaN. With e5m2 (gradients) the check still works.
# A check has to stand in front of the cast.
# Source: fp8e4m3fn_from_fp32_value in torch/headeronly/util/Float8_e4m3fn.h, and Float8_e5m2.h, Float8_e4m3fnuz.h beside it.
# Versions: torch 2.13.0, ml_dtypes 0.6.0, numpy 2.3.5, CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 ml_dtypes==0.6.0 numpy==2.3.5
cat > "$folder/casts.py" <<'PYTHON'
import math
import sys

import ml_dtypes
import numpy as np
import torch

INF, NAN = math.inf, math.nan
NAMES = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
SOURCES = (torch.float32, torch.float16, torch.bfloat16)


def cast(numbers, name, source):
    # Many elements, so that the vectorised code is taken, and an odd one that is not.
    repeated = torch.tensor(numbers).repeat(65).to(source)
    found = repeated.to(getattr(torch, name)).float().reshape(65, -1)
    assert torch.equal(found.nan_to_num(nan=-1.0), found[:1].expand_as(found).nan_to_num(nan=-1.0))
    return found[0].tolist()


def same(one, other):
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(one, other, strict=True))


print("torch", torch.__version__, "ml_dtypes", ml_dtypes.__version__)
numbers = [1.0, 448.0, 480.0, 65472.0, INF, -INF, NAN]
print(f"{'':18}", numbers)
found, others = {}, {}
for name in NAMES:
    rows = [cast(numbers, name, source) for source in SOURCES]
    assert all(same(row, rows[0]) for row in rows), rows
    found[name] = rows[0]
    others[name] = np.array(numbers, np.float32).astype(getattr(ml_dtypes, name)).astype(np.float32).tolist()
    print(f"torch     {name:16}", found[name])
    print(f"ml_dtypes {name:16}", others[name])
activations = torch.tensor([[1.0, 60000.0], [2.0, 3.0]], dtype=torch.float16) * 2
quantised = activations.to(torch.float8_e4m3fn).float()
product = quantised @ torch.ones(2, 2)
print("float16", activations.tolist(), "as e4m3fn", quantised.tolist(), "product finite:", bool(product.isfinite().all()))

if not same(found["float8_e4m3fn"], [1.0, 448.0, 448.0, 448.0, 448.0, -448.0, NAN]):
    sys.exit("float8_e4m3fn has changed")
if not same(others["float8_e4m3fn"], [1.0, 448.0, NAN, NAN, NAN, NAN, NAN]):
    sys.exit("float8_e4m3fn of ml_dtypes has changed")
if not same(found["float8_e5m2"][-4:], [INF, INF, -INF, NAN]) or not all(map(math.isnan, found["float8_e4m3fnuz"][-3:])):
    sys.exit("the other types have changed")
if not (activations[0, 1].isinf() and product.isfinite().all()):
    sys.exit("the infinity is seen again")
PYTHON
"$folder/venv/bin/python" "$folder/casts.py"
