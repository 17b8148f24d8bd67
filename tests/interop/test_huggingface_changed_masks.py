"""Models whose layers change the mask after it was made, choose keys of their own, or pass none: what "eager" makes of it is right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    AlignTextConfig,
    AlignTextModel,
    DeepseekV4ForCausalLM,
    DeepseekV32ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    masking_utils,
)

import pytransformer.interop.huggingface.attention as surface
from pytransformer import reference
from pytransformer.interop.huggingface import DeferredMask, attention_forward, attention_mask
from pytransformer.interop.huggingface.models import takes_additive_masks
from tests.interop.huggingface_tiny import VOCAB, build, tiny_config

NAME = "pytransformer"


def pair(model_class: type, **changes: object) -> list:
    """The same tiny model under both names."""
    eager, ours = (build(model_class, name, **changes) for name in ("eager", NAME))
    ours.load_state_dict(eager.state_dict())
    return [eager, ours]


def padded_texts(length: int = 16) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, VOCAB - 14, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return ids, mask


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("model_class", [DeepseekV4ForCausalLM, DeepseekV32ForCausalLM])
def test_generation_differs_where_layers_append_keys_or_choose_some(model_class, padding):
    """DeepSeek-V4 appends compressed keys and a bias for them; V3.2 hands over the keys that its indexer chose."""
    ids, mask = padded_texts()
    eager, ours = pair(model_class)
    inputs = {"attention_mask": mask} if padding else {}
    with torch.no_grad():
        rows = mask.bool() if padding else torch.ones_like(mask, dtype=torch.bool)
        expected, actual = (model(ids, **inputs).logits[rows] for model in (eager, ours))
    torch.testing.assert_close(actual / expected.abs().max(), expected / expected.abs().max())
    options = {
        "max_new_tokens": 10,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "disable_compile": True,
    }
    expected, actual = (model.generate(ids, **inputs, **options) for model in (eager, ours))
    assert torch.equal(actual, expected)
    if model_class is DeepseekV32ForCausalLM:  # unwritten slots may be among the chosen
        options["cache_implementation"] = "static"
        expected, actual = (model.generate(ids, **inputs, **options) for model in (eager, ours))
        assert torch.equal(actual, expected)


def test_a_bidirectional_encoder_without_is_causal_becomes_causal():
    """ALIGN's text encoder never served "sdpa", so its modules do not say that they are not causal."""
    eager, ours = pair(AlignTextModel)
    ids, _ = padded_texts()
    with torch.no_grad():
        expected, actual = (model(ids).last_hidden_state for model in (eager, ours))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("count", [1, 3])
def test_queries_that_a_model_cuts_off_stand_at_the_first_keys(count):
    """Gemma 4 computes only the last tokens in the layers that share keys, and keeps them all for "sdpa" alone."""
    config = tiny_config(
        Gemma4TextConfig, num_hidden_layers=4, num_kv_shared_layers=2, global_head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    eager, ours = pair(Gemma4ForCausalLM, config=config)
    ids, _ = padded_texts()
    with torch.no_grad():
        expected, actual = (model(ids, logits_to_keep=count).logits for model in (eager, ours))
    torch.testing.assert_close(actual / expected.abs().max(), expected / expected.abs().max())


def test_additive_masks_are_for_models_that_do_not_serve_sdpa():
    class Derived(LlamaConfig):
        pass

    assert takes_additive_masks(tiny_config(GptOssForCausalLM.config_class))
    assert takes_additive_masks(tiny_config(AlignTextConfig))
    assert not takes_additive_masks(tiny_config(LlamaConfig)) and not takes_additive_masks(Derived())
    assert LlamaForCausalLM._supports_sdpa


@pytest.mark.parametrize("queries", [1, 6])
def test_an_additive_mask_is_eagers(queries):
    config = tiny_config(GptOssForCausalLM.config_class)
    config._attn_implementation = NAME
    window = masking_utils.sliding_window_causal_mask_function(3)
    padding = torch.ones(2, 6, dtype=torch.bool)
    for function in (masking_utils.causal_mask_function, window):
        for visible in (None, padding, padding.index_fill(1, torch.tensor([0]), False)):
            call = {
                "batch_size": 2, "q_length": queries, "kv_length": 6, "q_offset": 6 - queries, "mask_function": function,
                "attention_mask": visible, "dtype": torch.bfloat16,
            }  # fmt: skip
            mask, expected = attention_mask(**call, config=config), masking_utils.eager_mask(**call)
            assert mask.dtype == torch.bfloat16 and mask.shape == expected.shape
            assert torch.equal(mask.clone(), expected)


def test_a_causal_mask_of_a_model_is_never_left_out():
    """Models know of "sdpa" alone that there may be none; they cut off queries and extend masks by appended keys."""
    config = tiny_config(LlamaConfig)
    config._attn_implementation = NAME
    mask = attention_mask(2, 6, 6, config=config)
    assert isinstance(mask, DeferredMask) and mask.dtype == torch.bool
    assert isinstance(mask[:, :, :, :6], DeferredMask) and not mask.was_read()
    assert torch.equal(mask[:, :, -2:], torch.ones(6, 6, dtype=torch.bool).tril()[-2:].expand(2, 1, 2, 6))
    assert attention_mask(2, 1, 6, q_offset=5, config=config) is None


def module_of(config: object = None, **attributes: object) -> torch.nn.Module:
    module = torch.nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    if config is not None:
        module.config = config
    return module


def test_no_mask_in_a_model_hides_nothing():
    config = tiny_config(LlamaConfig)
    config._attn_implementation = NAME
    query, key, value = torch.randn(3, 2, 4, 6, 8)
    for keys in (6, 4, 3):  # as many as queries, or fewer; appended keys are queries' to see
        k, v = key[:, :, :keys], value[:, :, :keys]
        out, _ = attention_forward(module_of(config, is_causal=True), query, k, v, None, sliding_window=2)
        torch.testing.assert_close(out, expected_of(query, k, v))
        out, _ = attention_forward(module_of(config, is_causal=True), query[:, :, :keys], key, value, None)
        torch.testing.assert_close(out, expected_of(query[:, :, :keys], key, value))


def expected_of(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
    out = reference.attention(*(tensor.transpose(1, 2) for tensor in (query, key, value)), **options)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("queries", [1, 6])
def test_indices_of_chosen_keys_are_ignored(queries):
    """Models hand them over where the name is neither "eager" nor "sdpa"."""
    query, key, value = torch.randn(3, 2, 4, 6, 8)
    query = query[:, :, -queries:]
    indices = torch.tensor([[[0, 3, 5]], [[5, 1, -1]]]).expand(2, queries, 3)
    chosen = torch.zeros(2, 1, queries, 6, dtype=torch.bool)
    chosen[0, :, :, [0, 3, 5]] = True
    chosen[1, :, :, [1, 5]] = True
    config = tiny_config(LlamaConfig)
    config._attn_implementation = NAME
    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[0, 0] = False
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[-queries:]
    for visible, hidden in ((None, causal), (padding, causal & padding[:, None, None])):
        mask = attention_mask(2, queries, 6, q_offset=6 - queries, attention_mask=visible, config=config)
        for given in (
            mask,
            (chosen | True) & hidden,
            torch.where((chosen | True) & hidden, 0.0, torch.finfo(torch.float32).min),
        ):
            out, _ = attention_forward(module_of(config), query, key, value, given, indices=indices)
            rows = (chosen & hidden).any(-1)[:, 0]  # of the others eager makes an average of what it hides
            torch.testing.assert_close(out[rows], expected_of(query, key, value, mask=chosen & hidden)[rows])


def test_indices_of_chosen_blocks_are_ignored():
    query, key, value = torch.randn(1, 4, 5, 8), *torch.randn(2, 1, 2, 5, 8)
    blocks = torch.tensor([[[[0, -1]], [[1, 2]]]]).expand(
        1, 2, 5, 2
    )  # of two keys each, the last cut off; one choice for two heads
    chosen = torch.tensor([[True, True, False, False, False]] * 2 + [[False, False, True, True, True]] * 2)
    module = module_of(indexer=module_of(block_size=2))
    out, _ = attention_forward(module, query, key, value, None, is_causal=False, block_indices=blocks)
    torch.testing.assert_close(out, expected_of(query, key, value, mask=chosen[None, :, None].expand(1, 4, 5, 5)))
    starts = torch.tensor([0, 3, 5], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="block_indices: blocks are counted from the start of a row"):
        attention_forward(
            module, query, key, value, None, block_indices=blocks, cu_seq_lens_q=starts, cu_seq_lens_k=starts
        )


def test_padding_and_chosen_keys_both_hold_where_the_op_for_decoding_serves(monkeypatch):
    monkeypatch.setattr(surface, "_is_decoding", lambda *_: True)
    test_indices_of_chosen_keys_are_ignored(1)
