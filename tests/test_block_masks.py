"""Patterns of block masks, by counting positions."""

from __future__ import annotations

import pytest
import torch

from pytransformer import attention
from pytransformer.block_masks import local_global_blocks, strided_blocks


def own(lengths, block_size, query_block):
    """Blocks of keys at the positions of a block of queries, counted one by one."""
    (seqlen_q, seqlen_k), (rows, cols) = lengths, block_size
    queries = range(query_block * rows, min(seqlen_q, (query_block + 1) * rows))
    return {(query + seqlen_k - seqlen_q) // cols for query in queries}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(100, 100), (40, 130), (130, 40), (16, 16)], ids=str)
@pytest.mark.parametrize("block_size", [(16, 16), (32, 16), (16, 48)], ids=str)
def test_patterns_by_counting(lengths, block_size, causal):
    local, count, stride = 1, 2, 3
    found = local_global_blocks(*lengths, block_size, local=local, global_=count, causal=causal)
    strided = strided_blocks(*lengths, block_size, local=local, stride=stride, causal=causal)
    assert found.shape == strided.shape == (1, 1, -(-lengths[0] // block_size[0]), -(-lengths[1] // block_size[1]))
    for query_block, (row, strided_row) in enumerate(zip(found[0, 0].tolist(), strided[0, 0].tolist())):
        at = own(lengths, block_size, query_block)
        for key_block, listed in enumerate(row):
            near = min(at) - local <= key_block <= max(at) + local
            past = not causal or key_block <= max(at)
            assert listed == (past and (near or key_block < count or query_block < count))
            assert strided_row[key_block] == (past and (near or (max(at) - key_block) % stride == 0))


def test_a_local_pattern_is_the_window_of_whole_blocks():
    """Enough of it for a window of as many tokens; nothing listed in vain but what the blocks round up."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 80, 2, 16) for _ in range(3))
    blocks = local_global_blocks(80, 80, 16, local=2, causal=True)
    windowed = attention(q, k, v, causal=True, window=(32, 0))
    torch.testing.assert_close(
        attention(q, k, v, causal=True, window=(32, 0), block_mask=blocks, block_size=16), windowed
    )
    assert blocks.sum(-1).flatten().tolist() == [1, 2, 3, 3, 3]


def test_an_empty_pattern():
    assert local_global_blocks(0, 40, 16, local=1).shape == (1, 1, 0, 3)
    assert strided_blocks(40, 0, 16, local=1, stride=2).shape == (1, 1, 3, 0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"local": -1}, ValueError, "local must be at least 0, got -1"),
        ({"global_": 1.5}, TypeError, "global_ must be an int, got 1.5"),
        ({"block_size": 20}, ValueError, "block_size must be a multiple of 16, got 20"),
        ({"seqlen_k": -1}, ValueError, "seqlen_k must be at least 0, got -1"),
        ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
    ],
)
def test_bad_numbers(changes, error, message):
    with pytest.raises(error, match=message):
        local_global_blocks(**{"seqlen_q": 40, "seqlen_k": 40, "block_size": 16, "local": 1, **changes})
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        strided_blocks(40, 40, local=1, stride=0)
