"""What the reference says it never reads may be garbage, and what it says it drops is dropped."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pytransformer import decode_attention, kv_append, reference

INT32 = torch.int32
BACKENDS = ("reference", "torch", "triton")
PAGE_SIZE = 3


def _contiguous(lengths: list[int], capacity: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    caches = (torch.randn(len(lengths), capacity, 2, 8, generator=generator).to(device) for _ in range(2))
    return tuple(caches)  # type: ignore[return-value]


def _poisoned(cache: Tensor, seen: list[range], garbage: int) -> tuple[Tensor, Tensor]:
    """Pages that hold the seen tokens amid NaN, and the table, which points nowhere where no seen token lies."""
    per_row = -(-cache.shape[1] // PAGE_SIZE)
    pages = torch.full((len(seen) * per_row, PAGE_SIZE, *cache.shape[2:]), math.nan, device=cache.device)
    table = torch.full((len(seen), per_row), garbage, dtype=INT32, device=cache.device)
    for row, tokens in enumerate(seen):
        for token in tokens:
            page = row * per_row + (token // PAGE_SIZE + row) % per_row
            pages[page, token % PAGE_SIZE] = cache[row, token]
            table[row, token // PAGE_SIZE] = page
    return pages, table


@pytest.mark.parametrize("garbage", [-1, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_entries_before_the_window_and_behind_the_end_point_nowhere(
    packed: bool, backend: str, garbage: int, device: torch.device
) -> None:
    lengths, left, queries = [13, 2, 7], 4, [2, 2, 2] if not packed else [3, 0, 1]
    k_cache, v_cache = _contiguous(lengths, 15, device)
    # The oldest query of a sequence sees `left` keys back from its own.
    seen = [range(max(0, n - m - left) if m else n, n) for n, m in zip(lengths, queries)]
    (k_pages, table), (v_pages, _) = _poisoned(k_cache, seen, garbage), _poisoned(v_cache, seen, garbage)
    q = torch.randn(sum(queries), 4, 8, device=device)
    options: dict[str, object] = {"window": (left, 0)}
    if packed:
        options["cu_seqlens_q"] = torch.tensor([0, *queries], device=device).cumsum(0).to(INT32)
    else:
        q = q.view(3, 2, 4, 8)
    cache_seqlens = torch.tensor(lengths, dtype=INT32, device=device)
    expected = reference.decode_attention(q, k_cache, v_cache, cache_seqlens, **options)
    found = decode_attention(q, k_pages, v_pages, cache_seqlens, block_table=table, backend=backend, **options)
    torch.testing.assert_close(found, expected)
    alone = reference.decode_attention(q, k_pages, v_pages, cache_seqlens, block_table=table, **options)
    assert torch.equal(alone, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_the_cache_that_no_query_sees_hold_nan(backend: str, device: torch.device) -> None:
    k_cache, v_cache = _contiguous([6, 1], 12, device)
    lengths, leftpad = (torch.tensor(n, dtype=INT32, device=device) for n in ([6, 1], [3, 5]))
    q = torch.randn(2, 2, 4, 8, device=device)
    expected = reference.decode_attention(q, k_cache, v_cache, lengths, cache_leftpad=leftpad, window=(1, 0))
    for cache in (k_cache, v_cache):
        for row, seen in enumerate((range(6, 9), range(5, 6))):
            cache[row, [slot for slot in range(12) if slot not in seen]] = math.nan
    found = decode_attention(q, k_cache, v_cache, lengths, cache_leftpad=leftpad, window=(1, 0), backend=backend)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("place", "match"),
    [
        ({"block_table": [[0, -1]]}, "page or row must be from 0 to 3, got -1"),
        ({"block_table": [[0, 4]]}, "page or row must be from 0 to 3, got 4"),
        ({"cache_batch_idx": [-1]}, "page or row must be from 0 to 3, got -1"),
        ({"cache_leftpad": [-1], "cache_batch_idx": [0]}, "slot must be from 0 to 2, got -1"),
    ],
)
def test_a_place_before_the_cache_is_not_counted_from_its_end(place: dict[str, list], match: str) -> None:
    cache = torch.randn(4, 3, 2, 8)
    length = 4 if "block_table" in place else 2
    options = {name: torch.tensor(value, dtype=INT32) for name, value in place.items()}
    with pytest.raises(IndexError, match=match):
        reference.decode_attention(
            torch.randn(1, 1, 2, 8), cache, cache, torch.tensor([length], dtype=INT32), **options
        )


@pytest.mark.parametrize("shape", [(4, 0, 2, 8), (0, 3, 2, 8)])
@pytest.mark.parametrize("where", ["slots", "table"])
def test_tokens_for_a_cache_without_room_are_dropped(where: str, shape: tuple[int, ...]) -> None:
    k, cache = torch.ones(1, 2, 2, 8), torch.zeros(shape)
    places = {
        "slots": {"slot_mapping": torch.tensor([0, 5])},
        "table": {"cache_seqlens": torch.tensor([1], dtype=INT32), "block_table": torch.zeros(1, 2, dtype=INT32)},
    }
    assert reference.kv_append(k, k, cache, cache.clone(), **places[where]) is None


def test_tokens_of_a_table_without_pages_are_dropped() -> None:
    k, cache = torch.ones(1, 2, 2, 8), torch.zeros(4, 3, 2, 8)
    table, lengths = torch.zeros(1, 0, dtype=INT32), torch.tensor([1], dtype=INT32)
    reference.kv_append(k, k, cache, cache, cache_seqlens=lengths, block_table=table)
    assert not cache.any()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_flat_positions_turn_as_those_in_rows(backend: str, device: torch.device) -> None:
    cos, sin = reference.rope_tables(8, 9, device=device)
    positions = torch.tensor([[0, 7], [3, 1]], device=device)
    found = []
    for given in (positions, positions.flatten()):
        for append in (kv_append, reference.kv_append):
            torch.manual_seed(0)
            k, cache = torch.randn(2, 2, 1, 8, device=device), torch.zeros(2, 4, 1, 8, device=device)
            lengths = torch.zeros(2, dtype=INT32, device=device)
            options = {"cache_seqlens": lengths, "positions": given, "cos": cos, "sin": sin}
            append(
                k, k, cache, torch.zeros_like(cache), **options, **({"backend": backend} if append is kv_append else {})
            )
            found.append(cache)
    for cache in found[1:]:
        torch.testing.assert_close(cache, found[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_positions_of_any_integer_type_are_indices(dtype: torch.dtype) -> None:
    cos, sin = reference.rope_tables(8, 9)
    q, positions = torch.randn(1, 4, 2, 8), torch.tensor([0, 1, 1, 8])
    expected = reference.rope(q, None, cos, sin, positions=positions)[0]
    assert torch.equal(reference.rope(q, None, cos, sin, positions=positions.to(dtype))[0], expected)


@pytest.mark.parametrize("seqlen", [0, 1])
def test_states_of_linear_attention_are_float32(seqlen: int) -> None:
    q = torch.randn(1, seqlen, 2, 8, dtype=torch.bfloat16)
    state = torch.ones(1, 2, 8, 8, dtype=torch.bfloat16), torch.ones(1, 2, 8, dtype=torch.bfloat16)
    _, states = reference.linear_attention(q, q, q, initial_state=state, return_state=True)
    assert all(tensor.dtype == torch.float32 for tensor in states)
