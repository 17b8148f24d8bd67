#!/usr/bin/env bash
# CTranslate2: whether the result of beam search includes the prompt decides which continuation it finds, and what scores it gives.
#
# Expected: include_prompt_in_result says what is in the result. Scores are those of what was generated, divided by its length to the power
# of length_penalty. What happens: with include_prompt_in_result=True, which is the default, the prompt's tokens (all but the first) count
# in the length but bring no log-probability, so a score of the same continuation is nearer to zero the longer the prompt is; and because
# the division then hardly tells a short hypothesis from a long one, beam search prefers short ones: the text found is another, sometimes one
# token instead of sixteen. max_length counts the prompt's tokens too, again without the first.
# Why it matters: the documentation mentions what the option costs in speed. Whoever compares engines, ranks hypotheses of several prompts by
# score, or switches the option for speed gets other texts, and with long prompts hardly any length penalty at all.
# Source: generate_batch of ctranslate2.Generator; its documentation of length_penalty and include_prompt_in_result.
# Versions: ctranslate2 4.8.5, transformers 5.23.0, tokenizers 0.23.3, torch 2.13.0, numpy 2.3.5, CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install \
  ctranslate2==4.8.5 torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 numpy==2.3.5
cat > "$folder/beams.py" <<'PYTHON'
import sys

import ctranslate2
import torch
import transformers
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models, pre_tokenizers

folder, vocabulary, new_tokens = sys.argv[1], 24, 16
torch.manual_seed(0)
config = transformers.GPT2Config(
    vocab_size=vocabulary, n_positions=64, n_embd=64, n_layer=2, n_head=1, bos_token_id=0, eos_token_id=1, initializer_range=0.3
)
model = transformers.GPT2LMHeadModel(config).eval()
model.save_pretrained(f"{folder}/gpt2")
tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(vocabulary)}, unk_token="w2"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", unk_token="w2"
).save_pretrained(f"{folder}/gpt2")
TransformersConverter(f"{folder}/gpt2").convert(f"{folder}/converted")
generator = ctranslate2.Generator(f"{folder}/converted", device="cpu", compute_type="float32", intra_threads=1)


def log_probability(prompt, continuation):
    """Of the continuation and, where it is shorter than what was allowed, the end token."""
    ids = prompt + continuation + ([1] if len(continuation) < new_tokens else [])
    with torch.no_grad():
        table = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    places = range(len(prompt) - 1, len(ids) - 1)
    return sum(table[place, ids[place + 1]].item() for place in places), len(ids) - len(prompt)


print("ctranslate2", ctranslate2.__version__, "transformers", transformers.__version__)
numbers = torch.Generator().manual_seed(1)
others, ends = 0, {True: 0, False: 0}
for _ in range(100):
    length = (2, 8, 20)[int(torch.randint(3, (), generator=numbers))]
    prompt = torch.randint(3, vocabulary, (length,), generator=numbers).tolist()
    found = {}
    for included in (True, False):
        limit = new_tokens + (length - 1 if included else 0)
        result = generator.generate_batch(
            [[f"w{index}" for index in prompt]],
            beam_size=4, length_penalty=1.0, max_length=limit, include_prompt_in_result=included, return_scores=True,
        )[0]
        found[included] = result.sequences_ids[0][length:] if included else result.sequences_ids[0]
        total, count = log_probability(prompt, found[included])
        divisor = total / result.scores[0]
        # The one thing that both agree on is the sum of the log-probabilities.
        in_prompt = length - 1 if included else 0
        ended = len(found[included]) < new_tokens
        ends[included] += ended
        assert min(abs(divisor - in_prompt - size) for size in (count, count - 1)) < 1e-2, (included, divisor, count, length)
    if found[True] != found[False]:
        others += 1
        if others <= 5:
            print(f"prompt of {length:2} tokens: {len(found[True]):2} new tokens with it, {len(found[False]):2} without it in the result")
print(f"{others} of 100 prompts have another best continuation; ended early: {ends[True]} with, {ends[False]} without the prompt in the result")
sys.exit(0 if others >= 10 and ends[True] > ends[False] else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/beams.py" "$folder"
