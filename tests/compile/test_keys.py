"""New batch sizes, sequence lengths and cache lengths need no new compilation: Triton's key of each launch is the same.

Triton compiles anew for an integer that is 1, or becomes a multiple of 16, unless told not to. Nothing is compiled here.
"""

from __future__ import annotations

import pytest

from tests.compile.key_calls import CASES, attention_long, attention_masked, keys_by_kernel


@pytest.mark.parametrize("name", CASES)
def test_new_lengths_and_batches_need_no_new_kernel(name: str) -> None:
    call, most, reason = CASES[name]
    counts = {kernel: len(keys) for kernel, keys in keys_by_kernel(call).items()}
    assert max(counts.values()) == most, f"{counts}; expected {most}" + (f": {reason}" if reason else "")


def test_new_lengths_of_masks_and_biases_need_few_new_kernels() -> None:
    """Their rows begin at multiples of 16 elements, so that loads are wide, or they do not."""
    counts = {kernel: len(keys) for kernel, keys in keys_by_kernel(attention_masked, (2, 7, 16, 33, 128)).items()}
    assert set(counts.values()) == {2}, counts


def test_long_sequences_need_no_new_kernel() -> None:
    """1k, 8k and 64k tokens: what lies between tiles, heads and sequences needs no wider offsets inside a tile."""
    counts = {kernel: len(keys) for kernel, keys in keys_by_kernel(attention_long, (1, 2, 3)).items()}
    assert len(counts) == 3 and set(counts.values()) == {1}, counts
