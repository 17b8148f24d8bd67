#!/usr/bin/env bash
# torch.onnx.export: a query that sees no key gets 0 in torch, the mean of all values or NaN in the exported model, by mask and opset.
#
# Expected: the exported scaled_dot_product_attention computes what torch does, 0 where a mask hides every key; the exporter has a step for
# just that, NaN of the softmax replaced by 0. What happens at the default opset: a bool mask becomes the lowest finite number, not -inf, so
# that the softmax of such a row is uniform, never NaN, and the step never acts: the query gets the mean of all values, hidden ones and, with
# a causal mask, future ones. A float mask of -inf, which is the same mask to torch, has no such step: NaN, in the next attention through
# 0 · NaN in all tokens of the sequence. With opset_version=23 SDPA becomes ONNX's Attention, and all are 0 as in torch.
# Why it matters: such rows are in every batch that is padded on the left, in cross-attention to an empty document, and in what fills up a
# batch of fixed size. A model that was tested in torch is another one after the export, and which one depends on how its mask is written
# and on one number of the call; a comparison on inputs without padding shows nothing.
# Source: onnxscript/function_libs/torch_lib/ops/nn.py, _aten_scaled_dot_product_attention_bool_mask_onnx (neg_inf = query.dtype.min).
# Versions: torch 2.13.0, onnxscript 0.7.2, onnx 1.23.2, onnxruntime 1.32.0, numpy 2.3.5, CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install \
  torch==2.13.0 onnxscript==0.7.2 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.3.5
cat > "$folder/export.py" <<'PYTHON'
import logging
import sys
import warnings

import numpy as np
import onnxruntime
import torch

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
torch.manual_seed(0)
LENGTH, PADDING = 4, 1


class Attention(torch.nn.Module):
    """Two layers of attention: what the padding's rows hold after the first can reach the others in the second."""

    def forward(self, x, mask):
        first = torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return first, torch.nn.functional.scaled_dot_product_attention(first, first, first, attn_mask=mask)


def exported(x, mask, **options):
    program = torch.onnx.export(Attention().eval(), (x, mask), dynamo=True, verbose=False, **options)
    model = program.model_proto
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    outputs = session.run(None, dict(zip(names, (x.numpy(), mask.numpy()), strict=True)))
    return *map(torch.from_numpy, outputs), {entry.domain: entry.version for entry in model.opset_import}[""]


print("torch", torch.__version__, "onnxruntime", onnxruntime.__version__, "numpy", np.__version__)
x = torch.randn(1, 1, LENGTH, 4)
seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
seen[:, :PADDING] = False
masks = {"bool": seen, "float": torch.zeros(LENGTH, LENGTH).masked_fill(~seen, -torch.inf)}
mean = x.mean(2, keepdim=True)
behaviour = {}
for name, mask in masks.items():
    reference = Attention()(x, mask)
    assert all((layer[:, :, :PADDING] == 0).all() and layer.isfinite().all() for layer in reference)
    for options in ({}, {"opset_version": 23}):
        first, second, opset = exported(x, mask, **options)
        hidden, others = first[:, :, :PADDING], second[:, :, PADDING:]
        kinds = {"0": (hidden == 0).all(), "mean": (hidden - mean).abs().max() < 1e-6, "NaN": hidden.isnan().all()}
        real = "as in torch" if (others - reference[1][:, :, PADDING:]).abs().max() < 1e-5 else "NaN" if others.isnan().all() else "other"
        behaviour[name, bool(options)] = [kind for kind, true in kinds.items() if true], real
        print(f"{name:5} mask, opset {opset}: padding's row {hidden[0, 0, 0].tolist()}, real tokens one layer later {real}")
print("torch: padding's row", reference[0][0, 0, 0].tolist(), "mean of all values", mean[0, 0, 0].tolist())
expected = {
    ("bool", False): (["mean"], "as in torch"), ("bool", True): (["0"], "as in torch"),
    ("float", False): (["NaN"], "NaN"), ("float", True): (["0"], "as in torch"),
}  # fmt: skip
sys.exit(0 if behaviour == expected else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/export.py"
