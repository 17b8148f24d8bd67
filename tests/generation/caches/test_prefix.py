"""A prompt's beginning, computed once, in memory and on disk: the tokens are those without it, and another model's is refused."""

from __future__ import annotations

import json

import pytest
import torch

from pytransformer.generation import PagedCache, Prefix, generate
from pytransformer.generation.caches import KINDS
from pytransformer.model.families.family import CheckpointError
from tests.model.configs import CONFIGS, make_model, random_ids

from .support import GENERATING


def prompts_of(model, device, shared=9):
    start = random_ids(model.config, (shared,), 5, device)
    return start, [torch.cat([start, random_ids(model.config, (length,), length, device)]) for length in (1, 4, 2)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("gemma2", kind) for kind in KINDS),
        ("llama", "paged"),
        ("alibi-window-geglu", "paged-int8"),
        ("gpt2", "contiguous"),
    ],
)
def test_the_tokens_are_those_without_it(name, kind, tmp_path, small_pages, device):
    model = make_model(GENERATING[name], 0, device)
    start, prompts = prompts_of(model, device)
    Prefix.of(model, start, cache=kind).save(tmp_path)
    prefix = Prefix.load(tmp_path, model)
    assert len(prefix) == 9 and torch.equal(prefix.token_ids, start.cpu())
    fed = []
    handle = model.model.layers[0].register_forward_hook(lambda module, given, _: fed.append(given[0].shape[1]))
    logits: list[list[torch.Tensor]] = [[], []]
    actual = generate(
        model, prompts, 5, cache=kind, prefix=prefix, callback=lambda step: logits[0].append(step.logits)
    ).token_ids
    handle.remove()
    assert fed[0] == 4  # of the longest prompt what comes after the nine
    plain = generate(model, prompts, 5, cache=kind, callback=lambda step: logits[1].append(step.logits)).token_ids
    assert all(map(torch.equal, actual, plain))
    if kind in ("contiguous", "paged"):  # where codes round, a last bit can be a step
        torch.testing.assert_close(*map(torch.stack, logits))


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_what_the_prompts_do_not_have_in_common_is_computed(kind, small_pages, device):
    model = make_model(CONFIGS["llama"], 0, device)
    start, prompts = prompts_of(model, device)
    prefix = Prefix.of(model, start)
    other = torch.cat([start[:5], (start[5:6] + 1) % model.config.vocab_size, start[6:]])
    for rows, common in (
        (prompts, 9),
        ([start, *prompts], 8),
        ([prompts[0], other], 5),
        ([start[:1]], 0),
        ([other.flip(0)], 0),
    ):
        if common and not torch.equal(rows[-1][:1], start[:1]):
            common = 0
        assert prefix.common(rows) == common
        actual = generate(model, rows, 4, cache=kind, prefix=prefix).token_ids
        assert all(map(torch.equal, actual, generate(model, rows, 4).token_ids))


@torch.no_grad()
def test_sequences_share_its_pages(device):
    model = make_model(CONFIGS["llama"], 0, device)
    start, prompts = prompts_of(model, device)
    cache = PagedCache(model.config, 3, 16, device=device, page_size=4, poison=True)
    assert Prefix.of(model, start).fill(cache, model, prompts) == 9
    assert cache.groups[0].pool.used_pages == 3 and cache.lengths.tolist() == [9, 9, 9]
    assert [cache.groups[0].pool.owners(page) for page in cache.groups[0].pages[0]] == [3, 3, 3]
    again = Prefix.from_cache(model, start, cache, row=2)
    assert all(map(torch.equal, again.part.tensors(), Prefix.of(model, start).part.tensors()))
    with pytest.raises(ValueError, match="a prefix goes into an empty cache"):
        again.fill(cache, model, prompts)


@torch.no_grad()
def test_what_a_window_has_passed_cannot_be_kept(device):
    model = make_model(CONFIGS["mistral-window"], 0, device)
    start, _ = prompts_of(model, device)
    cache = PagedCache(model.config, 1, 16, device=device, page_size=2)
    model(start[None], cache=cache)
    cache.advance(9)
    with pytest.raises(ValueError, match="the first 9 tokens of sequence 0 are not all there"):
        Prefix.from_cache(model, start, cache)


def test_another_model_or_cache_is_refused(tmp_path, device):
    model = make_model(CONFIGS["llama"], 0, device)
    start, prompts = prompts_of(model, device)
    prefix = Prefix.of(model, start)
    prefix.save(tmp_path)
    others = [make_model(CONFIGS["llama"], 1, device), make_model(CONFIGS["mistral-window"], 0, device)]
    for other in others:
        with pytest.raises(ValueError, match=r"prefix was made by another model, .* its fingerprint is"):
            Prefix.load(tmp_path, other)
        with pytest.raises(ValueError, match="another model"):
            generate(other, prompts, 2, prefix=prefix)
    with pytest.raises(
        ValueError, match=r"prefix holds torch.float32, the cache torch.int8: make the prefix with the same kind"
    ):
        generate(model, prompts, 2, cache="int8", prefix=prefix)
    with pytest.raises(ValueError, match="prefix is for models without an encoder, and for use_cache=True"):
        generate(model, prompts, 2, use_cache=False, prefix=prefix)
    with pytest.raises(TypeError, match="prefix must be a Prefix or None, got str"):
        generate(model, prompts, 2, prefix=str(tmp_path))
    with pytest.raises(TypeError, match=r"pack_weights must be True, False or None .* got 'no'"):
        generate(model, prompts, 2, pack_weights="no")
    pair = make_model(GENERATING["original"], 0, device)
    with pytest.raises(ValueError, match="a prefix is of a model without an encoder"):
        Prefix.of(pair, [1, 2])


def test_making_one_leaves_each_module_in_its_mode(device):
    model = make_model(CONFIGS["llama"], 0, device).train()
    frozen = model.model.layers[0].eval()
    Prefix.of(model, [1, 2, 3])
    assert model.training and model.model.layers[1].feed_forward.training
    assert not any(module.training for module in frozen.modules())


def test_frequencies_that_depend_on_the_length(device):
    name = next(
        name for name, config in GENERATING.items() if (config.rope_scaling or {}).get("rope_type") == "longrope"
    )
    model = make_model(GENERATING[name], 0, device)  # others behind 8 tokens
    start, _ = prompts_of(model, device, shared=4)
    prefix = Prefix.of(model, start)
    rows = [torch.cat([start, start[:count]]) for count in (1, 3)]
    long = [rows[0], torch.cat([start, start, start])]  # the prefix was rotated otherwise than this one is
    for prompts, new_tokens in ((rows, 1), (rows, 9), (long, 3)):
        logits: list[list[torch.Tensor]] = [[], []]
        for found, options in zip(logits, ({"prefix": prefix}, {})):
            generate(
                model, prompts, new_tokens, callback=lambda step, found=found: found.append(step.logits), **options
            )
        torch.testing.assert_close(*map(torch.stack, logits))
    with pytest.raises(ValueError, match="token_ids must have at most 8 tokens, got 9"):
        Prefix.of(model, torch.cat([start, start, start[:1]]))


def test_damaged_folders_are_refused(tmp_path, device):
    model = make_model(CONFIGS["llama"], 0, device)
    with pytest.raises(FileNotFoundError, match=r"does not hold a prefix: there is no prefix\.json"):
        Prefix.load(tmp_path, model)
    Prefix.of(model, [1, 2, 3]).save(tmp_path)
    facts = json.loads((tmp_path / "prefix.json").read_text())
    for changes, message in (({"version": 9}, "is of version 9"), ({"tokens": 4}, "4 tokens are announced")):
        (tmp_path / "prefix.json").write_text(json.dumps({**facts, **changes}))
        with pytest.raises(CheckpointError, match=message):
            Prefix.load(tmp_path, model)
    (tmp_path / "prefix.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"prefix\.json is damaged"):
        Prefix.load(tmp_path, model)
    (tmp_path / "prefix.json").write_text(json.dumps(facts))
    content = (tmp_path / "prefix.safetensors").read_bytes()
    (tmp_path / "prefix.safetensors").write_bytes(content[:-3])
    with pytest.raises(CheckpointError, match="cut off or missing"):
        Prefix.load(tmp_path, model)
