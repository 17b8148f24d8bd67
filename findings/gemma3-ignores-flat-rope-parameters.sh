#!/usr/bin/env bash
# transformers: Gemma 3 ignores rope_parameters that are not given for each type of layer, and says nothing.
#
# Expected: rope_parameters = {"rope_type": ..., "factor": ..., "rope_theta": ...}, the spelling of Llama, Qwen3, Gemma 2 and most others,
# holds for all layers, or is refused, as by ModernBERT, whose layers have two kinds of RoPE too. What happens: Gemma 3 (and Gemma 3n, Olmo
# 3) keeps the three entries in the mapping, where print(config) shows them, adds "full_attention" and "sliding_attention" with their
# defaults beside them, and reads those alone: base, method and factor have no effect. The older rope_scaling, as flat, does have one.
# Why it matters: whoever stretches the context by the spelling that is documented for other families, or changes the base for a run,
# trains and evaluates the unchanged model, and the saved configuration says otherwise.
# pytransformer refuses such a mapping for this family and says that it must be given for each type of layer.
# Source: Gemma3TextConfig.convert_rope_params_to_dict.
# Versions: transformers 5.23.0, tokenizers 0.23.3, torch 2.13.0, numpy 2.3.5, CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install \
  torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 numpy==2.3.5
cat > "$folder/rope.py" <<'PYTHON'
import logging
import sys
import warnings

import torch
import transformers

small = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
layered = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
families = {"Llama": {}, "Qwen3": {}, "Gemma2": layered, "Gemma3Text": layered, "Olmo3": layered}
FLAT = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
told = []
handler = logging.Handler()
handler.emit = lambda record: told.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
ids = torch.arange(3, 27)[None]


def logits(family, extra, **rope):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**small, **extra, **rope)
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_config(config).eval()(ids).logits


print("transformers", transformers.__version__, "rope_parameters", FLAT)
changes = {}
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    for family, extra in families.items():
        usual = logits(family, extra)
        given = [logits(family, extra, **{name: dict(FLAT)}) for name in ("rope_parameters", "rope_scaling")]
        changes[family] = [not torch.equal(changed, usual) for changed in given]
        print(f"{family:11} other logits: by rope_parameters {changes[family][0]}, by rope_scaling {changes[family][1]}")
    kept = transformers.Gemma3TextConfig(rope_parameters=dict(FLAT)).rope_parameters
    of_3n = transformers.Gemma3nTextConfig(rope_parameters=dict(FLAT)).rope_parameters
print("Gemma3Text's rope_parameters afterwards:", kept)
try:
    refused = transformers.ModernBertConfig(rope_parameters=dict(FLAT)) is None
except Exception as error:  # of huggingface_hub's, about the field's type
    refused = True
    print("ModernBERT:", type(error).__name__)
print("warnings:", [str(warning.message) for warning in warned] + told)
silent = {"Gemma3Text": False, "Olmo3": False}
if any(changed[0] != silent.get(family, True) for family, changed in changes.items()) or not changes["Gemma3Text"][1]:
    sys.exit("the reading of rope_parameters has changed")
unchanged = all(rope["full_attention"] == {"rope_type": "default", "rope_theta": 1e6} for rope in (kept, of_3n))
if not (refused and unchanged and not warned and not told):
    sys.exit("the configuration or its messages have changed")
PYTHON
"$folder/venv/bin/python" "$folder/rope.py"
