#!/usr/bin/env bash
# A bfloat16 matrix product of a slice gives NaN because of what lies behind the slice, on CPUs with AMX.
#
# Expected: torch.mm(buffer[:, :103], weight) depends on the 103 columns alone. What happens: where the CPU has AMX, oneDNN's kernel loads
# more columns than there are and multiplies what lies behind them by zero; a NaN (or infinity) there makes elements of the result NaN, how
# many depends on rows and threads. It needs a left operand with a row stride and an inner size that is no multiple of 4; a contiguous copy,
# float32, and the same machine limited to AVX-512 (ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16) are right.
# Why it matters: rows padded for alignment, uninitialised, are usual (the logits of a vocabulary that is no multiple of 128); the result is
# right or NaN by what the allocator left there, and by the CPU. A contiguous left operand helps.
# Versions: torch 2.13.0 (oneDNN as bundled), numpy 2.3.5, a Xeon with amx_bf16; on a CPU without AMX there is nothing to see.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy==2.3.5
cat > "$folder/product.py" <<'PYTHON'
import sys

import torch

print("torch", torch.__version__)
if not torch.cpu._is_amx_tile_supported():
    print("this CPU has no AMX: nothing to see here")
    sys.exit(0)
counts = {}
for rows, columns in ((48, 103), (48, 104)):
    buffer = torch.full((rows, 128), float("nan"), dtype=torch.bfloat16)
    buffer[:, :columns] = 1.0
    weight = torch.ones(columns, 32, dtype=torch.bfloat16)
    counts[rows, columns] = int(torch.mm(buffer[:, :columns], weight).isnan().sum())
    copied = int(torch.mm(buffer[:, :columns].contiguous(), weight).isnan().sum())
    print(f"{rows} x {columns} of 128 columns: {counts[rows, columns]} NaN, of a contiguous copy {copied}")
sys.exit(not (counts[48, 103] > 0 and counts[48, 104] == 0))
PYTHON
"$folder/venv/bin/python" "$folder/product.py"
