#!/usr/bin/env bash
# transformers: the load-balancing loss of Mixtral sees no imbalance where two layers lean to opposite experts, and its gradient is zero.
#
# Expected: each layer has experts of its own, so that the loss (Switch Transformer, equations 4 to 6, which the docstring names) is that
# of a layer, then summed or averaged over layers: a model in which every layer sends all its tokens to the same two of four experts has
# the largest loss there is. What happens: the counts and the probabilities are summed over all layers first. If the first layer sends
# everything to experts 0 and 1 and the second everything to 2 and 3, the loss is top_k, as of uniform routing, though each layer alone is
# at twice that; and as the counts are then equal, the loss is a constant of the routers' weights: its gradient is rounding noise, and
# training has nothing to mend it with.
# Why it matters: the collapse that the loss is there to prevent goes unseen, in training and in the logged aux_loss, and about thirty
# families have a copy of the function (Qwen MoE, OLMoE, GPT-OSS, PhiMoE, ...). It was reported for this model in 2024 and closed.
# pytransformer takes the loss of each layer and then the mean, which is the same with one layer.
# Source: transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func; github.com/huggingface/transformers issues 28255 and
# 31464.
# Versions: transformers 5.23.0, tokenizers 0.23.3, torch 2.13.0, numpy 2.3.5, CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install \
  torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 numpy==2.3.5
cat > "$folder/balance.py" <<'PYTHON'
import sys

import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

EXPERTS, TOP_K = 4, 2
torch.manual_seed(0)
config = transformers.MixtralConfig(
    vocab_size=37, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    num_local_experts=EXPERTS, num_experts_per_tok=TOP_K, output_router_logits=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
model = transformers.MixtralForCausalLM(config)
gates = [layer.mlp.gate.weight for layer in model.model.layers]
ids = torch.randint(3, 37, (4, 32))


def lean(*favourites):
    """Every token's first feature is large, and the router of each layer scores its favourites with it."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        for gate, experts in zip(gates, favourites):
            gate.zero_()
            gate[list(experts), 0] = 1.0


def losses():
    """(aux_loss of the model, of each layer alone, largest gradient by the routers of the first and of the mean of the others)."""
    output = model(ids)
    alone = [load_balancing_loss_func((logits,), EXPERTS, TOP_K) for logits in output.router_logits]
    gradients = [
        max(gradient.abs().max().item() for gradient in torch.autograd.grad(loss, gates, retain_graph=True))
        for loss in (output.aux_loss, torch.stack(alone).mean())
    ]
    return output.aux_loss.item(), [loss.item() for loss in alone], *gradients


print("transformers", transformers.__version__)
found = {}
for name, favourites in {"same experts": ((0, 1), (0, 1)), "opposite experts": ((0, 1), (2, 3))}.items():
    lean(*favourites)
    found[name] = together, alone, gradient, of_mean = losses()
    print(
        f"{name:17} aux_loss {together:.4f} (uniform routing: {TOP_K}), of each layer alone {', '.join(f'{loss:.4f}' for loss in alone)};"
        f" largest gradient by the routers {gradient:.1e}, of the layers' mean {of_mean:.1e}"
    )
together, alone, gradient, of_mean = found["opposite experts"]
same = found["same experts"]
unbalanced = min(*alone, same[0], *same[1]) > 1.9 * TOP_K
if not (unbalanced and abs(together - TOP_K) < 1e-4 and gradient < 1e-4 * of_mean and same[2] > 0.5 * same[3]):
    sys.exit("the balancing loss has changed")
PYTHON
"$folder/venv/bin/python" "$folder/balance.py"
