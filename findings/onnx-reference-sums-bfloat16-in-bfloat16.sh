#!/usr/bin/env bash
# ONNX's reference evaluator sums bfloat16 in bfloat16: its attention to 4096 equal values is twice the value, its norms are off by 40 %.
#
# Expected: onnx.reference, which documents the operators and is what runtimes and converters are compared with, is exact to a rounding or
# two; RMSNormalization and LayerNormalization have stash_type=1 by default, "casts all input variables to 32-bit float", and the evaluator
# refuses every other value. What happens: it checks stash_type and then computes in the input's type. numpy adds ml_dtypes' bfloat16 one
# after another in bfloat16, where a sum stands still at 256 times the summand: the mean of 4096 ones is 0.0625. So RMSNormalization of
# ordinary numbers is too large, LayerNormalization too, the probabilities of Softmax add up to 2.5, and Attention gives a "weighted mean" of
# ones that is above 2, by default; with softmax_precision=1 it is right. In float16, which numpy sums in float32, it is the squares of
# the norms that overflow: a row with an entry above 256 becomes 0 throughout. MatMul is right in both.
# Why it matters: at the sizes of unit tests (64) nothing shows. At a model's the golden result is the wrong one, and hidden states above 256
# are usual in large language models. The evaluator is also what folds constants in torch's exporter to ONNX.
# Source: onnx/reference/ops/op_rms_normalization.py, op_layer_normalization.py, op_softmax.py, op_reduce_mean.py, op_attention.py.
# Versions: onnx 1.23.2, ml_dtypes 0.6.0, numpy 2.3.5.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install onnx==1.23.2 ml_dtypes==0.6.0 numpy==2.3.5
cat > "$folder/reference.py" <<'PYTHON'
import sys
import warnings

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

warnings.simplefilter("ignore")
BFLOAT16 = ml_dtypes.bfloat16
TYPES = {BFLOAT16: TensorProto.BFLOAT16, np.float16: TensorProto.FLOAT16}


def evaluate(operator, opset, *inputs, **attributes):
    inputs = {f"x{index}": array for index, array in enumerate(inputs)}
    dtype = TYPES[inputs["x0"].dtype.type]
    values = [helper.make_tensor_value_info(name, dtype, array.shape) for name, array in inputs.items()]
    node = helper.make_node(operator, list(inputs), ["y"], **attributes)
    graph = helper.make_graph([node], "graph", values, [helper.make_tensor_value_info("y", dtype, [None] * inputs["x0"].ndim)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    onnx.checker.check_model(model)
    return ReferenceEvaluator(model).run(None, inputs)[0].astype(np.float64)


def row(values):
    return [float(f"{value:.3f}") for value in values]


print("onnx", onnx.__version__, "ml_dtypes", ml_dtypes.__version__, "numpy", np.__version__)
found = {}
numbers = np.random.default_rng(0)
for size in (64, 1024, 4096):
    x = numbers.normal(size=(1, size)).astype(BFLOAT16)
    ones = np.ones(size, BFLOAT16)
    query, key = (numbers.normal(size=(1, 1, length, 64)).astype(BFLOAT16) for length in (1, size))
    value = np.ones((1, 1, size, 4), BFLOAT16)
    # Each of these is 1 in exact arithmetic, up to a rounding.
    found[size] = [
        np.sqrt((evaluate("RMSNormalization", 23, x, ones) ** 2).mean()),
        np.sqrt((evaluate("LayerNormalization", 17, x, ones) ** 2).mean()),
        evaluate("ReduceMean", 18, ones[None]).item(),
        evaluate("Softmax", 13, x).sum(),
        evaluate("Attention", 23, query, key, value).flat[0],
        evaluate("Attention", 23, query, key, value, softmax_precision=1).flat[0],
        evaluate("MatMul", 13, ones[None], ones[:, None]).item() / size,
    ]
    print(f"{size:5}: all should be 1: RMS of RMSNorm and LayerNorm, mean, sum of Softmax, Attention (default, float32), MatMul {row(found[size])}")
outlier = np.array([[300.0, 1.0, 2.0, 3.0]], np.float16)
normed = evaluate("RMSNormalization", 23, outlier, np.ones(4, np.float16))[0]
exact = outlier[0].astype(np.float64) / np.sqrt((outlier.astype(np.float64) ** 2).mean())
print("float16, RMSNormalization of", outlier[0].tolist(), "is", row(normed), "not", row(exact))

wrong, right = np.array(found[4096][:5]), np.array(found[4096][5:])
if (np.abs(np.array(found[64]) - 1) > 0.02).any() or (np.abs(wrong - 1) < 0.3).any() or (np.abs(right - 1) > 0.01).any() or normed.any():
    sys.exit("the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/reference.py"
