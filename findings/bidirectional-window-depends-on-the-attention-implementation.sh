#!/usr/bin/env bash
# transformers: with is_causal false a sliding window W reaches W tokens to each side in eager mode and SDPA, W - 1 with flash attention.
#
# Expected: sliding_window W of a decoder means what it means causally, W tokens with the query's own, so that distances below W are seen,
# and is_causal=False (in the configuration, or as an argument, which is how a decoder becomes a text encoder) mirrors that; in any case
# all implementations of attention compute the same. What happens: the bidirectional mask takes distances up to W, W included, so the left
# half grows by one token the moment the model is made bidirectional; and what goes to the kernels of flash attention is (W - 1, W - 1) in
# both cases, whose bounds are inclusive. A comment there asks that encoders pass W + 1, and those made as encoders do (ModernBERT);
# Mistral, Qwen2 and Phi-3 pass W.
# Why it matters: a model trained with one implementation is another model with the other, by two keys of each query and layer, and no
# message says so; the difference is small enough to be taken for rounding in bfloat16.
# pytransformer reads such a configuration by the mask, that of eager mode, and its own windows count the token itself in both directions.
# Source: masking_utils.sliding_window_bidirectional_overlay, modeling_flash_attention_utils._process_flash_attention_kwargs. The kernel
# itself needs a GPU: shown here is what a model hands over, by a registered attention function that calls the library's own translation.
# Versions: transformers 5.23.0, tokenizers 0.23.3, torch 2.13.0, numpy 2.3.5, CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install \
  torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 numpy==2.3.5
cat > "$folder/window.py" <<'PYTHON'
import collections
import sys

import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_flash_attention_utils import _process_flash_attention_kwargs

WINDOW, LENGTH, QUERY = 3, 12, 6
small = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "sliding_window": WINDOW, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
families = {"Mistral": {}, "Qwen2": {"use_sliding_window": True, "max_window_layers": 0}, "Phi3": {}}
handed_over = []


def capturing(module, query, key, value, attention_mask, sliding_window=None, is_causal=None, **kwargs):
    causal = module.is_causal if is_causal is None else is_causal
    found = _process_flash_attention_kwargs(
        query_length=query.shape[2], key_length=key.shape[2], is_causal=causal, sliding_window=sliding_window,
        supports_mapping=collections.defaultdict(bool, window_size=True),
    )
    handed_over.append((found["causal"], found["window_size"]))
    return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **kwargs)


transformers.AttentionInterface.register("capturing", capturing)
transformers.AttentionMaskInterface.register("capturing", sdpa_mask)


def reach(family, implementation, causal, argument=None):
    """(left, right): how far from itself the query's output depends on the input."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**small, **families[family], is_causal=causal)
    model = transformers.AutoModel.from_config(config, attn_implementation=implementation).eval()
    embedded = torch.randn(1, LENGTH, 16, requires_grad=True)
    output = model(inputs_embeds=embedded, **argument or {}).last_hidden_state[0, QUERY]
    (gradient,) = torch.autograd.grad((output * torch.randn(16)).sum(), embedded)
    seen = [j for j in range(LENGTH) if gradient[0, j].abs().max() > 0]
    return QUERY - seen[0], seen[-1] - QUERY


def flash_reach(family, causal):
    """The same of the window that is handed to the kernels of flash attention, whose bounds are inclusive."""
    handed_over.clear()
    reach(family, "capturing", causal)
    ((is_causal, (left, right)),) = handed_over
    return left, 0 if is_causal else right


print("transformers", transformers.__version__, f"sliding_window {WINDOW}; tokens seen (to the left, to the right)")
found = {}
for family in families:
    for causal in (True, False):
        eager, sdpa = (reach(family, implementation, causal) for implementation in ("eager", "sdpa"))
        found[family, causal] = eager, sdpa, flash_reach(family, causal)
        print(f"{family:8} is_causal={causal!s:5}  eager {eager}, sdpa {sdpa}, to flash attention {found[family, causal][2]}")
argued = [reach(family, "eager", True, {"is_causal": False}) for family in families]
print("is_causal=False as an argument of the call, eager:", argued)
as_seen = {True: ((WINDOW - 1, 0),) * 3, False: ((WINDOW, WINDOW), (WINDOW, WINDOW), (WINDOW - 1, WINDOW - 1))}
if any(reaches != as_seen[causal] for (_, causal), reaches in found.items()) or argued != [(WINDOW, WINDOW)] * len(families):
    sys.exit("the windows have changed")
PYTHON
"$folder/venv/bin/python" "$folder/window.py"
