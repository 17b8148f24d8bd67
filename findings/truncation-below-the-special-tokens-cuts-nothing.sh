#!/usr/bin/env bash
# tokenizers: truncation to fewer tokens than there are special ones cuts nothing and says nothing.
#
# Expected: with truncation=True and max_length=n at most n tokens come back, or an error. What happens: a tokenizer that adds [CLS] and
# [SEP] returns 4, 3 and 2 tokens for max_length 4, 3 and 2 (the last are the special ones alone), and for 1 or 0 the whole text, however
# long. For a pair with its three special tokens it is the same below 3, although "only_first" raises an exception as long as there is room
# for the special tokens but not for the second text. Neither tokenizers nor transformers warns, not even where the result is longer than
# the tokenizer's model_max_length.
# Why it matters: max_length is often what is left of a budget (context minus prompt minus answer). Where the budget is all but spent the
# whole document comes instead of nothing, and what was to be short is longer than the model's context.
# pytransformer hands max_length to the same library, but refuses one that is smaller than the number of special tokens.
# Source: tokenizers, TokenizerImpl::post_process, which truncates only if max_length is above what the post-processor adds.
# Versions: tokenizers 0.23.3, transformers 5.23.0, numpy 2.3.5.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install tokenizers==0.23.3 transformers==5.23.0 numpy==2.3.5
cat > "$folder/cut.py" <<'PYTHON'
import logging
import sys
import warnings

import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, processors

words = ["[CLS]", "[SEP]", "[UNK]", *(f"word{i}" for i in range(50))]
backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
backend.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
)
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=16
)
text, second = " ".join(words[3:]), "word0 word1 word2"
told = []
handler = logging.Handler()
handler.emit = lambda record: told.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)


def lengths(call, sizes):
    found = {}
    for size in sizes:
        try:
            found[size] = call(size)
        except Exception as error:  # the library raises bare Exception
            found[size] = str(error).splitlines()[0]
    return found


def directly(size):
    backend.enable_truncation(size)
    return len(backend.encode(text).ids)


print("tokenizers", tokenizers.__version__, "transformers", transformers.__version__, f"a text of {len(text.split())} tokens")
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    one = lengths(lambda size: len(tokenizer(text, truncation=True, max_length=size).input_ids), range(4, -1, -1))
    pair = lengths(lambda size: len(tokenizer(second, text, truncation="only_first", max_length=size).input_ids), range(4, -1, -1))
    plain = lengths(directly, range(4, -1, -1))
print("transformers, one text, tokens by max_length:", one)
print("transformers, a pair, only_first:            ", pair)
print("tokenizers, one text:                        ", plain)
print("warnings:", [str(warning.message) for warning in warned] + told)
whole = len(text.split()) + 2
both = len(second.split()) + len(text.split()) + 3
as_seen = {4: 4, 3: 3, 2: 2, 1: whole, 0: whole}
if one != as_seen or plain != as_seen or "too short" not in str(pair[4]) or [pair[2], pair[1], pair[0]] != [both] * 3 or warned or told:
    sys.exit("truncation below the special tokens has changed")
PYTHON
"$folder/venv/bin/python" "$folder/cut.py"
