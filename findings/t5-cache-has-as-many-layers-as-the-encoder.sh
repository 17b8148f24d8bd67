#!/usr/bin/env bash
# transformers: a T5 whose decoder is deeper than its encoder cannot generate, as its cache has as many layers as the encoder.
#
# Expected: num_layers and num_decoder_layers of a T5 may differ, as its configuration says, and generate(), which keeps a cache unless
# told otherwise, makes one for the decoder, as it does for BART. What happens: the cache is made from num_hidden_layers, which for the T5
# family is another name of num_layers, the encoder's. With a deeper decoder the first step ends in "IndexError: list index out of range"
# inside the cache; the same call with use_cache=False runs, and so does a plain forward pass of the model, whose decoder makes its own
# cache. A decoder shallower than the encoder works, with layers of the cache that stay empty, so that only one half of such models shows
# it.
# Why it matters: nothing in the message names the cache's length or the configuration, and a model that trains and evaluates well (teacher
# forcing never asks for that cache) fails at the first generated token. use_cache=False helps, and costs the square of the length.
# pytransformer makes one layer of cache for each layer of the decoder, and generates with such a model.
# Source: T5Config.attribute_map, and DynamicCache(config=...), which reads num_hidden_layers.
# Versions: transformers 5.23.0, tokenizers 0.23.3, torch 2.13.0, numpy 2.3.5, CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install \
  torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 numpy==2.3.5
cat > "$folder/generate.py" <<'PYTHON'
import sys

import torch
import transformers

small = {"vocab_size": 37, "d_model": 16, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
t5 = {"d_kv": 8, "d_ff": 32, "num_heads": 2}
bart = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "bos_token_id": 0}


def model(family, encoder, decoder):
    if family == "BART":
        depth = {"encoder_layers": encoder, "decoder_layers": decoder, "forced_eos_token_id": None}
        config = transformers.BartConfig(**small, **bart, **depth)
        return transformers.BartForConditionalGeneration(config).eval()
    depth = {"num_layers": encoder, "num_decoder_layers": decoder}
    config = getattr(transformers, f"{family}Config")(**small, **t5, **depth)
    return getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()


def outcome(call):
    try:
        call()
    except IndexError as error:
        return f"IndexError: {error}"
    return "runs"


source, start = torch.tensor([[5, 6, 7]]), torch.tensor([[0]])
print("transformers", transformers.__version__)
outcomes = {}
for family, encoder, decoder in (("T5", 1, 3), ("MT5", 1, 3), ("T5", 3, 1), ("BART", 1, 3)):
    torch.manual_seed(0)
    made = model(family, encoder, decoder)
    found = {
        "generate": outcome(lambda: made.generate(source, max_new_tokens=3)),
        "without cache": outcome(lambda: made.generate(source, max_new_tokens=3, use_cache=False)),
        "forward": outcome(lambda: made(input_ids=source, decoder_input_ids=start, use_cache=True)),
    }
    layers = transformers.DynamicCache(config=made.config.get_text_config(decoder=True)).layers
    print(f"{family:4} encoder {encoder}, decoder {decoder}: cache of {len(layers)} layers; {found}")
    outcomes[family, decoder] = [text.split(":")[0] for text in found.values()]
expected = {key: ["runs"] * 3 for key in outcomes} | {(family, 3): ["IndexError", "runs", "runs"] for family in ("T5", "MT5")}
if outcomes != expected:
    sys.exit("the cache of a T5 has changed")
PYTHON
"$folder/venv/bin/python" "$folder/generate.py"
