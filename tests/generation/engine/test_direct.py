"""A bound step on a CPU: what the ops give, and taken where it may be."""

from __future__ import annotations

import pytest
import torch

from pytransformer import TransformerConfig
from pytransformer.generation import Engine, Request
from pytransformer.generation.engine import direct
from pytransformer.generation.engine.cache import EngineCache
from pytransformer.generation.engine.pages import RowPages
from pytransformer.ops.backend import use_backend
from pytransformer.verification import SEEDS, Contract
from tests.generation.engine.support import MIXED, SIZES, TINY, VOCABULARY, run, tiny_model

OPTIONS = {"softmax_scale": 0.3, "softcap": 0.0, "alibi_slopes": None, "bias": None, "sinks": None}
LENGTHS, MOST = [7, 0, 3, 7, 12], 16


def cache_of(config: TransformerConfig, dtype: torch.dtype) -> EngineCache:
    """Rows of several lengths, whose pages are mixed; behind their ends lies NaN."""
    cache = EngineCache(config, len(LENGTHS), MOST, dtype=dtype, page_size=2, longest_step=4, poison=True)
    pages = RowPages(cache.groups, 4)
    for token in range(max(LENGTHS)):
        for row in (row for row, length in enumerate(LENGTHS) if token < length):
            pages.extend(row, token, token + 1)
            for group in cache.groups:
                for tensor in group.pool.part.tensors():
                    place = tensor[:, group.pages[row][token // 2], token % 2]
                    place.copy_(torch.randn(place.shape))
                group.trim(row, token + 1)
    return cache


def results_of(
    config: TransformerConfig,
    counts: list[int],
    seed: int,
    *,
    is_direct: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """What every layer gives for so many new tokens of each row, and what is in the pages afterwards."""
    torch.manual_seed(seed)
    cache = cache_of(config, dtype)
    pages = RowPages(cache.groups, 4)
    rows = [row for row, count in enumerate(counts) if count]
    for row in rows:
        pages.extend(row, LENGTHS[row], LENGTHS[row] + counts[row])
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    tensors = [torch.randn(sum(counts), 1, number, config.head_dim).to(dtype) for number in heads]
    cache.choose_path(is_direct)
    cache.begin(rows, [LENGTHS[row] for row in rows], [[1] * counts[row] for row in rows], [])
    results = []
    for index in range(config.num_layers):
        layer = cache.layer(index)
        q = layer.append(*tensors, rotary=None, positions=None, q_norm=None, k_norm=None)
        results.append(layer.attend(q, window=config.window(index), **OPTIONS))
    return results + [tensor.clone() for group in cache.groups for tensor in group.pool.part.tensors()]


@pytest.mark.parametrize("most", [2**20, 40], ids=["together", "in parts"])
@pytest.mark.parametrize("config", [TINY, MIXED], ids=["grouped heads", "windows"])
@torch.no_grad()
def test_a_direct_step_of_single_tokens_has_the_bits_of_the_ops(config, most, monkeypatch):
    monkeypatch.setattr(direct, "_MOST_GATHERED", most)
    expected, found = (results_of(config, [1] * 5, 0, is_direct=is_direct) for is_direct in (False, True))
    for wanted, got in zip(expected, found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    assert not any(tensor.isnan().any() for tensor in found[: config.num_layers])


@pytest.mark.parametrize("config", [TINY, MIXED], ids=["grouped heads", "windows"])
@torch.no_grad()
def test_pieces_of_prompts_beside_single_tokens(config):
    contract, counts = Contract(torch.float32), [1, 4, 0, 1, 3]
    for seed in range(SEEDS):
        found = results_of(config, counts, seed, is_direct=True)
        with use_backend("reference"):
            plain, golden = (results_of(config, counts, seed, dtype=dtype) for dtype in (torch.float32, torch.float64))
        for index in range(config.num_layers):
            contract.add(f"layer {index}", actual=found[index], plain=plain[index], golden=golden[index])
        for wanted, got in zip(plain[config.num_layers :], found[config.num_layers :], strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    contract.check()


ALIBI = TransformerConfig.llama(**SIZES, intermediate_size=16, positions="alibi")


@pytest.mark.parametrize(
    ("config", "cache", "writes", "reads"),
    [(TINY, "paged", True, True), (ALIBI, "paged", True, False), (TINY, "paged-int8", False, False)],
    ids=["plain", "terms of the scores", "codes"],
)
def test_steps_of_an_engine_are_direct_where_they_may_be(config, cache, writes, reads, monkeypatch):
    calls = set()
    for name in ("write", "attend"):
        real = getattr(direct.DirectStep, name)
        monkeypatch.setattr(
            direct.DirectStep, name, lambda *given, name=name, real=real: calls.add(name) or real(*given)
        )
    engine = Engine(tiny_model(config), max_batch=2, page_size=2, prefill_chunk=4, cache=cache)
    run(engine, [Request([1, 5, 2, 9, 4, VOCABULARY - 1], 3), Request([3, 1], 6)])
    assert calls == {name for name, wanted in (("write", writes), ("attend", reads)) if wanted}
