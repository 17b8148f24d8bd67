"""Beam search finds what transformers' finds, tokens in order and scores: each prompt of a batch what theirs gives it alone."""

from __future__ import annotations

import functools
import random

import pytest
import torch

from pytransformer.generation import generate
from tests.model.families.support import Case, Pair

transformers = pytest.importorskip("transformers")

VOCABULARY = 48
_DECODER = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_PAIR = {**_DECODER, "d_model": 32, "decoder_start_token_id": 2}
CASES = [
    Case("llama", "LlamaConfig", "LlamaForCausalLM", {
        **_DECODER, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 64,
    }),
    Case("gpt2", "GPT2Config", "GPT2LMHeadModel", {**_DECODER, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    Case("t5", "T5Config", "T5ForConditionalGeneration", {
        **_PAIR, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    }),
    Case("bart", "BartConfig", "BartForConditionalGeneration", {
        **_PAIR, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "forced_eos_token_id": None, "dropout": 0.0,
    }),
]  # fmt: skip


@functools.cache
def models(case):
    """Ours and theirs, in float32."""
    both = Pair(case)
    theirs = both.theirs().eval()
    theirs.generation_config = transformers.GenerationConfig()
    return both.ours().eval(), theirs


def searches(seed):
    """Prompts and options at random: (prompts, what both take, end tokens, our edits, theirs, our cache)."""
    draw = random.Random(seed)
    num_beams = draw.choice([2, 3, 4, 7])
    prompts = [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 9))] for _ in range(2)]
    ends = draw.sample(range(VOCABULARY), draw.choice([0, 1, 3, 10]))
    both = {
        "num_beams": num_beams,
        "num_return_sequences": draw.randint(1, num_beams),
        "length_penalty": draw.choice([0.0, 1.0, 2.0, -1.0, 0.7]),
        "early_stopping": draw.choice([True, False, "never"]),
    }
    ours, theirs = {}, {}
    if draw.random() < 0.5:
        both["repetition_penalty"] = draw.choice([1.3, 0.8])
    if draw.random() < 0.5:
        # So that texts end at several lengths.
        bias = {token: draw.choice([0.5, 2.0, 4.0]) for token in [*ends, 7]}
        ours["logit_bias"], theirs["sequence_bias"] = bias, {(token,): value for token, value in bias.items()}
    if draw.random() < 0.3:
        ours["constraint"] = lambda row, ids: [(ids[-1] * 7 + step * 3) % VOCABULARY for step in range(16)] + ends
        theirs["prefix_allowed_tokens_fn"] = lambda row, ids: ours["constraint"](row, ids.tolist())
    ours.update(draw.choice([{"use_cache": False}, {"cache": "paged"}, {}]))
    return prompts, draw.choice([1, 5, 9, 14]), both, ends, ours, theirs


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tokens_and_scores_are_those_of_transformers(case, seed):
    model, theirs = models(case)
    prompts, limit, options, ends, our_edits, their_edits = searches(f"{case.name} {seed}")
    result = generate(model, prompts, limit, eos_token_id=ends, pad_token_id=0, **options, **our_edits)
    start = [case.fields["decoder_start_token_id"]] if model.config.is_encoder_decoder else None
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, eos_token_id=ends or None, pad_token_id=0,
            decoder_start_token_id=start and start[0], output_scores=True, return_dict_in_generate=True, **options, **their_edits,
        )  # fmt: skip
        for row, score in zip(found.sequences.tolist(), found.sequences_scores.tolist()):
            new = row[len(start or prompt) :]
            # What follows an end token is padding.
            length = next((place + 1 for place, token in enumerate(new) if token in ends), len(new))
            expected.append((row[: len(start or prompt) + length], pytest.approx(score, rel=1e-4, abs=1e-5)))
    assert list(zip([row.tolist() for row in result.token_ids], result.scores)) == expected
