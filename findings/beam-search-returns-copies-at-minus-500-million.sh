#!/usr/bin/env bash
# transformers: where fewer continuations are allowed than there are beams, beam search returns the same text several times, at -5e8.
#
# Expected: num_return_sequences different texts, fewer, or an error; scores are log-probabilities divided by a length. What happens: beams
# that have nothing left to do go on as copies of others with a log-probability of -1e9, end, and are returned: texts come twice, with
# scores such as -500000000.0 that no model gave. With early_stopping=True they also count as finished, and end the search.
# Why it matters: constrained choices (a label out of three, a date, a database's names) have few continuations, and beams are how one ranks
# them. A softmax over the scores survives it, a mean, a threshold on the difference or a set of candidates does not.
# pytransformer leaves such places empty, and raises where fewer texts exist than are asked for.
# Source: GenerationMixin._beam_search, whose first scores of all beams but one are -1e9.
# Versions: transformers 5.23.0, tokenizers 0.23.3, torch 2.13.0, numpy 2.3.5, CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install \
  torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 numpy==2.3.5
cat > "$folder/copies.py" <<'PYTHON'
import sys

import torch
import transformers

torch.manual_seed(0)
config = transformers.GPT2Config(
    vocab_size=20, n_positions=32, n_embd=16, n_layer=1, n_head=1, bos_token_id=3, eos_token_id=1
)
model = transformers.GPT2LMHeadModel(config).eval()
prompt = torch.tensor([[5, 6, 7]])


def allowed(row, ids):
    """Two continuations: token 8 or 9, then the end."""
    return [8, 9] if len(ids) == 3 else [1]


print("transformers", transformers.__version__)
changed = False
for early_stopping in (True, False):
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), num_beams=4, num_return_sequences=4, max_new_tokens=6, do_sample=False,
        prefix_allowed_tokens_fn=allowed, early_stopping=early_stopping, pad_token_id=2, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    texts, scores = [ids[3:].tolist() for ids in found.sequences], found.sequences_scores.tolist()
    print(f"early_stopping={early_stopping}:", *(f"{text} {score:.4g}" for text, score in zip(texts, scores)))
    changed |= len({tuple(text) for text in texts}) != 2 or not all(score < -1e8 for score in scores[2:])
sys.exit("the behaviour has changed" if changed else 0)
PYTHON
"$folder/venv/bin/python" "$folder/copies.py"
