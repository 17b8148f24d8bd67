#!/usr/bin/env bash
# transformers: a Llama cast to float64 gives logits of dtype float64 that are hardly more exact than those of float32.
#
# Expected: model.double() computes in float64, the usual way to a reference against which faster or shorter arithmetic is measured. What
# happens: RMSNorm, the angles, cosines and sines of RoPE, and in eager mode the softmax, convert to float32, as they should for bfloat16,
# whatever the input is, and back. Weights, products and logits are float64; the values are some 1e-6 off, about half the error of the
# float32 model, where float64 rounding would be 1e-14, and is if the same classes run without those conversions. Nothing in the result's
# dtype shows it.
# Why it matters: an error of 1e-6 measured against such a "golden" result may be the reference's own, and a result that is more exact than
# plain float32 cannot be told from one that is not. torch.autograd.gradcheck fails for a right model at the first norm, and passes for
# torch.nn.RMSNorm in float64.
# pytransformer has a naive reference of its own that keeps float64 throughout, as the one in this script does.
# Source: LlamaRMSNorm.forward, LlamaRotaryEmbedding.forward, eager_attention_forward; other families have copies.
# Versions: transformers 5.23.0, tokenizers 0.23.3, torch 2.13.0, numpy 2.3.5, CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install \
  torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 numpy==2.3.5
cat > "$folder/golden.py" <<'PYTHON'
import contextlib
import math
import sys
from unittest import mock

import torch
import transformers
from torch.nn.functional import silu

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)
HEADS, WIDTH = config.num_attention_heads, config.head_dim


def naive(model, ids, dtype=torch.float64):
    """Llama by the book, every operation in one dtype; float64 is the truth."""
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    exponents = torch.arange(0, WIDTH, 2, dtype=dtype) / WIDTH
    angles = torch.arange(ids.shape[1], dtype=dtype)[:, None] * 10000.0**-exponents
    turn = torch.polar(torch.ones_like(angles), angles)
    hidden = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)

    def norm(x, name):
        return weights[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def linear(x, name):
        return x @ weights[f"{name}.weight"].mT

    def rotated(x):
        product = torch.complex(x[..., : WIDTH // 2], x[..., WIDTH // 2 :]) * turn
        return torch.cat((product.real, product.imag), -1)

    x = weights["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        y = norm(x, f"{layer}.input_layernorm")
        q, k, v = (linear(y, f"{layer}.self_attn.{part}_proj").unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for part in "qkv")
        scores = (rotated(q) @ rotated(k).mT / math.sqrt(WIDTH)).masked_fill(hidden, -math.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{layer}.self_attn.o_proj")
        y = norm(x, f"{layer}.post_attention_layernorm")
        x = x + linear(silu(linear(y, f"{layer}.mlp.gate_proj")) * linear(y, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")


def gradients_agree(module):
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    return torch.autograd.gradcheck(module.double(), (x,), raise_exception=False)


model = transformers.LlamaForCausalLM(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    ids = torch.randint(1, 50, (1, 256))
    truth = naive(model, ids)
    errors = {"naive, float32": naive(model, ids, torch.float32)}
    for dtype in (torch.float32, torch.float64):
        for implementation in ("eager", "sdpa"):
            model.to(dtype).set_attn_implementation(implementation)
            errors[f"{implementation}, {str(dtype)[6:]}"] = model(ids).logits
            assert model(ids).logits.dtype == dtype
    # The same classes with float64 in the place of float32: as exact as the truth, so the conversions are all there is to it.
    with contextlib.ExitStack() as patches:
        for owner, name, value in (
            (torch, "float32", torch.float64),
            (torch, "float", torch.float64),
            (torch.Tensor, "float", torch.Tensor.double),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        twin = transformers.LlamaForCausalLM(config).double().eval()
        twin.load_state_dict(model.state_dict())
        twin.set_attn_implementation("eager")
        unconverted = twin(ids).logits
errors = {name: (logits - truth).abs().max().item() for name, logits in errors.items()}
rounding = (unconverted - truth).abs().max().item()
print("transformers", transformers.__version__, f"logits up to {truth.abs().max():.1f}; largest error against float64 throughout:")
for name, error in errors.items():
    print(f"{name:15} {error:.1e}")
print(f"eager, float64, without its conversions to float32: {rounding:.1e}")
theirs = gradients_agree(transformers.models.llama.modeling_llama.LlamaRMSNorm(8))
torchs = gradients_agree(torch.nn.RMSNorm(8))
print(f"gradcheck in float64: LlamaRMSNorm {theirs}, torch.nn.RMSNorm {torchs}")
inexact = all(errors[f"{name}, float64"] > errors[f"{name}, float32"] / 10 for name in ("eager", "sdpa"))
if not (inexact and rounding < 1e-12 and torchs and not theirs):
    sys.exit("float64 has changed")
PYTHON
"$folder/venv/bin/python" "$folder/golden.py"
