"""Calls of attention that together use every option, for the contract (pytransformer.verification) and for comparisons between backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.ops.attention import attention
from pytransformer.verification.cases import Case

Tensors = dict[str, Tensor]


def qkv(
    batch: int = 2,
    seqlen_q: int = 7,
    seqlen_k: int = 7,
    num_heads: int = 2,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    value_dim: int | None = None,
) -> Tensors:
    """Random float32 inputs (batch, seqlen, heads, head_dim)."""
    return {
        "q": torch.randn(batch, seqlen_q, num_heads, head_dim),
        "k": torch.randn(batch, seqlen_k, num_kv_heads, head_dim),
        "v": torch.randn(batch, seqlen_k, num_kv_heads, value_dim or head_dim),
    }


def packed_qkv(lengths_q: list[int], lengths_k: list[int], num_heads: int = 2, num_kv_heads: int = 1) -> Tensors:
    """Packed random inputs with their cu_seqlens."""
    tensors = qkv(1, sum(lengths_q), sum(lengths_k), num_heads, num_kv_heads)
    packed = {name: tensor[0] for name, tensor in tensors.items()}
    return {**packed, "cu_seqlens_q": starts(lengths_q), "cu_seqlens_k": starts(lengths_k)}


def starts(lengths: list[int]) -> Tensor:
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def random_mask(*shape: int) -> Tensor:
    """Boolean; the first row of the last sequence and head sees nothing."""
    mask = torch.rand(*shape) < 0.6
    mask[-1, -1, 0] = False
    return mask


def bias_with_holes(*shape: int) -> Tensor:
    """Floating, some elements -inf, the first row of the last head hidden whole."""
    bias = torch.randn(*shape)
    bias[torch.rand(*shape) < 0.2] = -torch.inf
    bias[-1, -1, 0] = -torch.inf
    return bias


def case(
    name: str, inputs: Callable[[], Tensors], gradients: str = "qkv", return_lse: bool = False, **options: object
) -> Case:
    """A verification case of attention; every tensor is passed by its name."""

    def results(out: Tensor | tuple[Tensor, Tensor]) -> Tensors:
        return {"out": out[0], "lse": out[1]} if isinstance(out, tuple) else {"out": out}

    def actual(tensors: Mapping[str, Tensor], backend: str) -> Tensors:
        return results(attention(**tensors, return_lse=return_lse, backend=backend, **options))

    def golden(tensors: Mapping[str, Tensor]) -> Tensors:
        return results(reference.attention(**tensors, return_lse=return_lse, **options))

    names = {"q": "q", "k": "k", "v": "v", "b": "bias", "s": "sinks", "a": "alibi_slopes"}
    return Case("attention", name, lambda size: inputs(), actual, golden, tuple(names[letter] for letter in gradients))


CASES: tuple[Case, ...] = (
    case("causal, GQA", lambda: qkv(num_heads=4), causal=True),
    case("no mask at all, dv ≠ d, scale", lambda: qkv(2, 5, 9, head_dim=24, value_dim=8), softmax_scale=0.4),
    case("window, Lq < Lk", lambda: qkv(1, 9, 20), window=(3, 2)),
    case("causal, more queries than keys", lambda: qkv(1, 11, 6), causal=True),
    case("causal window, more queries than keys", lambda: qkv(1, 11, 6, 2, 1), causal=True, window=(3, 5)),
    case("mask", lambda: {**qkv(), "mask": random_mask(2, 2, 7, 7)}),
    case("mask of one row for all, causal", lambda: {**qkv(), "mask": random_mask(1, 1, 7)[0]}, causal=True),
    case("bias", lambda: {**qkv(), "bias": bias_with_holes(1, 2, 7, 7)}, "qkvb"),
    case(
        "bias for every score, causal", lambda: {**qkv(2, 5, 6), "bias": torch.randn(2, 2, 5, 6)}, "qkvb", causal=True
    ),
    case(
        "key padding, causal",
        lambda: {**qkv(), "key_padding_mask": torch.arange(7) >= torch.tensor([[2], [4]])},
        causal=True,
    ),
    case("ALiBi, window", lambda: {**qkv(1, 9, 13), "alibi_slopes": torch.tensor([0.5, 0.125])}, "qkva", window=(6, 6)),
    case(
        "ALiBi per sequence, bias, mask",
        lambda: {
            **qkv(),
            "alibi_slopes": torch.rand(2, 2),
            "bias": bias_with_holes(2, 1, 7, 7),
            "mask": random_mask(2, 2, 1, 7),
        },
        "qkvba",
    ),
    case("softcap", lambda: {name: 3 * tensor for name, tensor in qkv().items()}, softcap=2.0, causal=True),
    case("sinks, lse", lambda: {**qkv(1, 9, 5), "sinks": torch.randn(2)}, "qkvs", return_lse=True, causal=True),
    case("lse, empty rows", lambda: {**qkv(), "mask": random_mask(2, 2, 7, 7)}, return_lse=True),
    case("dropout", lambda: {**qkv(1, 9, 9), "dropout_seed": torch.tensor([7, 3])}, dropout_p=0.3, causal=True),
    case("packed, causal, GQA", lambda: packed_qkv([5, 0, 8, 1], [5, 3, 8, 0]), causal=True),
    case(
        "packed, mask, bias, key padding",
        lambda: {
            **packed_qkv([9, 6], [11, 14]),
            "mask": random_mask(2, 2, 9, 14),
            "bias": torch.randn(1, 2, 9, 14),
            "key_padding_mask": torch.arange(14) < torch.tensor([[9], [14]]),
            "alibi_slopes": torch.rand(2, 2),
        },
        "qkvba",
        window=(7, 7),
    ),
    case(
        "everything",
        lambda: {
            **packed_qkv([5, 3], [7, 6]),
            "bias": torch.randn(2, 1, 5, 7),
            "alibi_slopes": torch.rand(2),
            "sinks": torch.randn(2),
            "dropout_seed": torch.tensor([5, 1]),
        },
        "qkvbsa",
        return_lse=True,
        causal=True,
        softcap=5.0,
        dropout_p=0.2,
    ),
)
BY_NAME = {found.name: found for found in CASES}
# What scaled_dot_product_attention cannot do: torch serves it over tiles.
BY_TILES = ("softcap", "sinks, lse", "lse, empty rows", "dropout", "everything")
