"""window_size in every function that has one: any pair of integers, of which flash_attn only looks up two elements."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pytransformer.interop import flash_attn

PAIRS = {
    "list": lambda device: [3, 1],
    "tensor": lambda device: torch.tensor([3, 1]),
    "tensor on the device": lambda device: torch.tensor([3, 1], dtype=torch.int32, device=device),
    "tensors": lambda device: (torch.tensor(3), torch.tensor(1, device=device)),
    "numpy": lambda device: np.array([3, 1]),
    "numbers of numpy": lambda device: (np.int64(3), np.int32(1)),
    "torch.Size": lambda device: torch.Size([3, 1]),
}


def calls(device):
    """Each function with arguments for it, but the window."""
    q, k, v = torch.randn(3, 2, 9, 2, 8, device=device)
    starts = torch.tensor([0, 4, 18], dtype=torch.int32, device=device)
    packed = [tensor.flatten(0, 1) for tensor in (q, k, v)]
    pages = torch.arange(4, device=device, dtype=torch.int32).view(2, 2)
    caches = [tensor.unflatten(1, (3, 3)).flatten(0, 1) for tensor in (k, v)]
    rows = torch.arange(6, device=device, dtype=torch.int32).view(2, 3)
    lengths = torch.tensor([9, 7], dtype=torch.int32, device=device)
    return {
        "flash_attn_func": ((q, k, v), {}),
        "flash_attn_kvpacked_func": ((q, torch.stack((k, v), 2)), {}),
        "flash_attn_qkvpacked_func": ((torch.stack((q, k, v), 2),), {}),
        "flash_attn_varlen_func": ((*packed, starts, starts, 14, 14), {}),
        "flash_attn_varlen_func, paged": (
            (packed[0], *caches, starts, torch.tensor([0, 4, 10], dtype=torch.int32, device=device), 14, 6),
            {"block_table": pages},
        ),
        "flash_attn_varlen_kvpacked_func": ((packed[0], torch.stack(packed[1:], 1), starts, starts, 14, 14), {}),
        "flash_attn_varlen_qkvpacked_func": ((torch.stack(packed, 1), starts, 14), {}),
        "flash_attn_with_kvcache": ((q, *caches), {"cache_seqlens": lengths, "block_table": rows}),
    }  # fmt: skip


NAMES = sorted(calls("cpu"))


@pytest.mark.parametrize("name", NAMES)
def test_window_size_as_any_pair(name, device):
    args, options = calls(device)[name]
    function = getattr(flash_attn, name.split(",")[0])
    expected = function(*args, window_size=(3, 1), **options)
    assert not torch.equal(expected, function(*args, **options))
    for kind, pair in PAIRS.items():
        assert torch.equal(function(*args, window_size=pair(device), **options), expected), kind


@pytest.mark.parametrize(
    "wrong", [torch.tensor(3), torch.tensor([3, 1, 0]), torch.tensor([[3, 1]]), torch.tensor([3.0, 1.0]), (3,), "31"]
)
def test_window_size_that_is_no_pair_of_integers_is_refused(wrong, device):
    q, k, v = torch.randn(3, 1, 4, 2, 8, device=device)
    with pytest.raises(RuntimeError, match="window_size"):
        flash_attn.flash_attn_func(q, k, v, window_size=wrong)


def test_the_names_are_all_of_them():
    """A function that takes a window stands in the list above."""
    having = {name for name in flash_attn.__all__ if "window_size" in getattr(flash_attn, name).__code__.co_varnames}
    assert having == {name.split(",")[0] for name in NAMES}


def test_a_window_that_differs_from_call_to_call_compiles_with_fullgraph(device):
    q, k, v = torch.randn(3, 1, 9, 2, 8, device=device)
    torch._dynamo.reset()
    attend = torch.compile(
        lambda left: flash_attn.flash_attn_func(q, k, v, window_size=(left, 0)), fullgraph=True, backend="aot_eager"
    )
    for left in (2, 3, 5, 7):
        expected = flash_attn.flash_attn_func(q, k, v, window_size=(left, 0))
        torch.testing.assert_close(attend(left), expected)
    torch._dynamo.reset()
