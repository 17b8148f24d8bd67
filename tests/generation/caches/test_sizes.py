"""What a cache takes is known before it is there, and what cannot be there is refused."""

from __future__ import annotations

import pytest
import torch

from pytransformer import TransformerConfig
from pytransformer.generation import KVCache, NotEnoughMemory, generate, make_cache, predict_bytes
from pytransformer.generation.caches import KINDS, make, predict, sizes
from tests.model.configs import CONFIGS, make_model, random_ids

from .support import GENERATING

OPTIONS = [{}, {"page_size": 5}, {"page_size": 4, "num_pages": 3}, {"page_size": 2, "longest_step": 3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_predicted_is_what_is_allocated(kind, dtype, options, device):
    for name in ("llama", "gemma2", "mistral-window"):
        cache = make_cache(kind, GENERATING[name], 3, 19, device, dtype, **options)
        size = predict(kind, GENERATING[name], 3, 19, dtype, **options)
        assert cache.nbytes == size.total == predict_bytes(kind, GENERATING[name], 3, 19, dtype, **options)
        assert f"{kind} KV cache, 3 × 19 tokens" in str(size) and sizes.in_words(size.total) in str(size)


def test_eight_bits_take_what_the_formula_says():
    config = CONFIGS["llama"]  # 2 layers, 2 heads of 8
    assert predict_bytes("contiguous", config, 1, 10, torch.float32) == 2 * 2 * 10 * 2 * 8 * 4
    assert predict_bytes("int8", config, 1, 10) == predict_bytes("fp8", config, 1, 10) == 2 * 2 * 10 * 2 * (8 + 4)


def test_keys_and_values_of_a_memory_are_counted(device):
    model = make_model(GENERATING["original"], 0, device)
    with torch.no_grad():
        memory_kv = model.model.keys_and_values(model.encode(random_ids(model.config.encoder, (2, 6), 0, device)))
    counted = predict("contiguous", model.config, 2, 8, memory_seqlen=6).memory
    assert counted == sum(tensor.nbytes for pair in memory_kv for tensor in pair)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_without_memory_for_the_source_nothing_is_begun(kind, monkeypatch, device):
    model = make_model(GENERATING["original"], 0, device)
    source = random_ids(model.config.encoder, (2, 6), 0, device)
    asked = []
    monkeypatch.setattr(make, "require_memory", lambda needed, *_: asked.append(needed))
    generate(model, source, 3, cache=kind, eos_token_id=())
    size = predict(
        kind, model.config, 2, 3, torch.float32, memory_seqlen=6, **({"longest_step": 1} if kind == "paged" else {})
    )
    assert asked == [size.total] and size.memory > 0


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_is_free_is_an_error_with_both_numbers(kind, monkeypatch, device):
    config = CONFIGS["llama"]
    needed = predict_bytes(kind, config, 2, 9, torch.float32)
    monkeypatch.setattr(sizes, "free_bytes", lambda device: needed)
    make_cache(kind, config, 2, 9, device)
    monkeypatch.setattr(sizes, "free_bytes", lambda device: needed - 1)
    with pytest.raises(
        NotEnoughMemory,
        match=f"{kind} KV cache needs {needed} bytes .* and {needed - 1} bytes .* are free on {device.type}",
    ):
        make_cache(kind, config, 2, 9, device)
    with pytest.raises(MemoryError):
        generate(make_model(config, 0, device), random_ids(config, (2, 6), 0, device), 16, cache=kind)


def test_what_no_machine_has_is_refused_before_it_is_tried():
    free = sizes.free_bytes(torch.device("cpu"))
    if free is None:
        pytest.skip("this system does not say how much memory is free")
    assert 0 < free < 2**50
    with pytest.raises(ValueError, match=r"needs \d+ bytes .* are free on cpu: take fewer sequences"):
        KVCache(TransformerConfig.gpt2(max_seqlen=2**40), 1, 2**40, device="cpu")


def test_the_limit_of_a_container_counts(tmp_path):
    assert sizes._of_container(str(tmp_path)) is None
    for name, text in {
        "memory.max": "1000\n",
        "memory.current": "900\n",
        "memory.stat": "anon 1\ninactive_file 50\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert sizes._of_container(str(tmp_path)) == 150
    (tmp_path / "memory.max").write_text("max\n")
    assert sizes._of_container(str(tmp_path)) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   7 kB\n")
    assert sizes._of_system(str(tmp_path / "meminfo")) == 7 * 1024
    assert sizes._of_system(str(tmp_path / "absent")) is None
