#!/usr/bin/env bash
# transformers: beam search fills up sequences that ended early with the end token if the padding token's id is 0.
#
# Expected: pad_token_id fills up what ended early, as it does without beams. What happens: with beams an id of 0 counts as none given, and
# the end token is written instead; any other id is obeyed. Nothing is said.
# Why it matters: 0 is the padding id of T5, mT5, ALBERT, BERT's vocabularies and many Llama-like tokenizers, and T5 and its kind are decoded
# with beams as a rule. Masks made by `ids != pad_token_id`, counts of generated tokens, and log-probabilities summed over a mask of padding
# take the repeated end tokens for generated ones, and the same code is right as soon as num_beams is 1.
# Source: GenerationMixin._beam_search, the value that its sequences are filled with.
# Versions: transformers 5.23.0, tokenizers 0.23.3, torch 2.13.0, numpy 2.3.5, CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install \
  torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 numpy==2.3.5
cat > "$folder/padding.py" <<'PYTHON'
import sys

import torch
import transformers

torch.manual_seed(0)
config = transformers.GPT2Config(
    vocab_size=20, n_positions=32, n_embd=16, n_layer=1, n_head=1, bos_token_id=3, eos_token_id=1
)
model = transformers.GPT2LMHeadModel(config).eval()
prompts = torch.tensor([[5, 6, 7], [5, 6, 8]])
WORDS = (2, 5)  # new tokens of each sequence before its end


def allowed(row, ids):
    return [1] if len(ids) - 3 >= WORDS[row] else [8, 9, 10]


print("transformers", transformers.__version__)
tails = {}
for pad in (0, 2):
    for beams in (1, 2):
        ids = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), num_beams=beams, max_new_tokens=8, do_sample=False,
            prefix_allowed_tokens_fn=allowed, pad_token_id=pad,
        )  # fmt: skip
        tails[pad, beams] = ids[0, 3 + WORDS[0] + 1 :].tolist()
        print(f"pad_token_id={pad}, eos_token_id=1, num_beams={beams}: behind the end of the shorter sequence {tails[pad, beams]}")
expected = {(0, 1): [0, 0, 0], (0, 2): [1, 1, 1], (2, 1): [2, 2, 2], (2, 2): [2, 2, 2]}
sys.exit(0 if tails == expected else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/padding.py"
