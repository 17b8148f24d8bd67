#!/usr/bin/env bash
# torch.nn.TransformerEncoder with a causal mask and left padding is right with gradients and all NaN under torch.no_grad().
#
# Expected: model.eval() and torch.no_grad() change neither numbers nor finiteness. A batch padded on the left with a causal mask leaves the
# padding's own rows without any key; scaled_dot_product_attention gives 0 for those, and the real tokens cannot see them. What happens: with
# gradients the layers go through scaled_dot_product_attention; in eval() without gradients they take torch's fused kernel
# (_transformer_encoder_layer_fwd), whose softmax of such a row is NaN. In the next layer those rows are values: hidden ones, but 0 · NaN is
# NaN, and so every token of a padded sequence is NaN from the second layer on, the real ones too. A layer alone has NaN in the padding only.
# MultiheadAttention has a third answer: NaN in such rows also with gradients, if it is asked for the weights (need_weights, its default).
# Why it matters: training is sound, losses are finite, also if the validation runs in eval() with gradients left on; the first NaN appears in
# deployment, and only in batches of unequal lengths. torch.backends.mha.set_fastpath_enabled(False) or right padding avoids it.
# Source: torch/nn/modules/transformer.py, TransformerEncoderLayer.forward (why_not_sparsity_fast_path).
# Versions: torch 2.13.0, numpy 2.3.5, CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy==2.3.5
cat > "$folder/encoder.py" <<'PYTHON'
import sys
import warnings

import torch

warnings.simplefilter("ignore")
torch.manual_seed(0)
LENGTH, PADDING = 5, 2
layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
x = torch.randn(2, LENGTH, 16)
padding = torch.zeros(2, LENGTH, dtype=torch.bool)
padding[1, :PADDING] = True
causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def run(layers, gradients, fast=True):
    model = torch.nn.TransformerEncoder(layer, layers).eval()
    torch.backends.mha.set_fastpath_enabled(fast)
    with torch.set_grad_enabled(gradients):
        output = model(x, mask=causal, src_key_padding_mask=padding).detach()
    torch.backends.mha.set_fastpath_enabled(True)
    return output


def nan_tokens(output):
    return [row.isnan().any(-1).nonzero().flatten().tolist() for row in output]


print("torch", torch.__version__)
found = {}
for layers in (1, 2):
    for gradients in (True, False):
        found[layers, gradients] = nan_tokens(run(layers, gradients))
        print(f"{layers} layer(s), gradients {gradients!s:5}: tokens that are NaN in the full and the padded sequence {found[layers, gradients]}")
alone = torch.nn.TransformerEncoder(layer, 2).eval()
with torch.no_grad():
    unpadded = alone(x[1:, PADDING:], mask=causal[PADDING:, PADDING:])
difference = (run(2, True)[1:, PADDING:] - unpadded).abs().max().item()
slow = run(2, False, fast=False)
print(f"with gradients the real tokens are those of the sequence without padding, to {difference:.0e}; without the fast path NaN: {nan_tokens(slow)}")
attention = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
hidden = torch.ones(2, LENGTH, dtype=torch.bool)
with_weights, without = (attention(x, x, x, key_padding_mask=hidden, need_weights=weights)[0].isnan().any().item() for weights in (True, False))
print(f"MultiheadAttention with gradients, all keys hidden: NaN with need_weights=True {with_weights}, with need_weights=False {without}")

everything, prefix = list(range(LENGTH)), list(range(PADDING))
expected = {(1, True): [[], []], (1, False): [[], prefix], (2, True): [[], []], (2, False): [[], everything]}
if found != expected or difference > 1e-5 or slow.isnan().any() or (with_weights, without) != (True, False):
    sys.exit("the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/encoder.py"
