"""What of decode attention is compiled in the gate that needs no GPU: every row class, dtype and width once, every option once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pytransformer.kernels.decode_attention.launcher import decode_attention_forward
from tests.kernels.decode_contract import call_of


@dataclass(frozen=True)
class _Case:
    dtype: torch.dtype
    seqlen_q: int
    head_dim: int
    value_dim: int
    page_size: int = 0
    cache_dtype: torch.dtype | None = None
    packed: bool = False
    every_option: bool = False

    def launch(self) -> object:
        batch, num_heads, num_kv_heads, capacity = 2, 8, 2, 9216
        leading = (capacity // self.page_size, self.page_size) if self.page_size else (batch, capacity)
        k_cache = torch.empty((*leading, num_kv_heads, self.head_dim), dtype=self.cache_dtype or self.dtype)
        v_cache = torch.empty((*leading, num_kv_heads, self.value_dim), dtype=self.cache_dtype or self.dtype)
        q = torch.empty((batch, self.seqlen_q, num_heads, self.head_dim), dtype=self.dtype)
        lengths = torch.empty(batch, dtype=torch.int32)
        options: dict[str, Any] = {"softmax_scale": 0.1}
        if self.page_size:
            options["block_table"] = torch.empty((batch, capacity // self.page_size), dtype=torch.int32)
        if self.packed:
            q = q.flatten(0, 1)
            options["cu_seqlens_q"] = torch.empty(batch + 1, dtype=torch.int32)
        if self.cache_dtype is not None:
            scale = torch.empty(num_kv_heads if self.page_size else k_cache.shape[:-1])
            options |= {"k_scale": scale, "v_scale": scale}
        if self.every_option:
            options["alibi_slopes"] = options["sinks"] = torch.empty(num_heads)
            options["mask"] = torch.empty(1, dtype=torch.bool).expand(batch, num_heads, self.seqlen_q, capacity)
            options["bias"] = torch.empty(1, dtype=self.dtype).expand(batch, num_heads, self.seqlen_q, capacity)
            options |= {"cache_leftpad": lengths, "window": (100, 0), "softcap": 30.0}
        return decode_attention_forward(call_of(q, k_cache, v_cache, lengths, **options))


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and launch of what ships: each row class by dtype and width, the paged variants, and every option at once."""

    def case(*arguments: Any, **options: Any) -> Callable[[], object]:
        return _Case(*arguments, **options).launch

    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    for dtype, head_dim, seqlen_q in itertools.chain(
        itertools.product((bf16,), (64, 128, 256), (1, 8, 40)),
        [(f16, 128, 1), (f32, 64, 1), (f32, 128, 8), (f32, 256, 1), (f32, 256, 40)],
    ):
        yield f"decode_attention-{dtype}-d{head_dim}-q{seqlen_q}", case(dtype, seqlen_q, head_dim, head_dim)
    yield "decode_attention-bfloat16-d192-dv128-q1", case(bf16, 1, 192, 128)
    yield "decode_attention-bfloat16-d80-q1", case(bf16, 1, 80, 80)
    for page_size in (1, 16, 256):
        yield f"decode_attention-bfloat16-d128-q1-page{page_size}", case(bf16, 1, 128, 128, page_size)
    yield "decode_attention-bfloat16-d128-packed", case(bf16, 40, 128, 128, packed=True)
    for seqlen_q in (1, 40):
        yield f"decode_attention-bfloat16-d128-q{seqlen_q}-options", case(bf16, seqlen_q, 128, 128, every_option=True)
    for cache_dtype, page_size in itertools.product((torch.int8, torch.float8_e4m3fn), (0, 16)):
        yield (
            f"decode_attention-bfloat16-d128-{cache_dtype}-page{page_size}",
            case(bf16, 1, 128, 128, page_size, cache_dtype),
        )
