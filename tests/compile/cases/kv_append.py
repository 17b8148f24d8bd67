"""What of KV append is compiled in the gate: each way to say where, each dtype, each kind of scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pytransformer.kernels.kv_append import kv_append_forward
from tests.kernels.append_contract import call_of


@dataclass(frozen=True)
class _Case:
    dtype: torch.dtype
    tokens: int
    head_dim: int = 128
    rotary_dim: int = 0
    interleaved: bool = False
    norm: bool = False
    page_size: int = 0
    slots: bool = False
    packed: bool = False
    cache_dtype: torch.dtype | None = None
    scale_per_token: bool = False
    with_q: bool = True

    def launch(self) -> object:
        num_heads, num_kv_heads, batch = 16, 4, 2
        pages = (4, self.page_size) if self.page_size else (batch, 64)
        q = torch.empty((batch, self.tokens, num_heads, self.head_dim), dtype=self.dtype)
        k = torch.empty((batch, self.tokens, num_kv_heads, self.head_dim), dtype=self.dtype)
        k_cache = torch.empty((*pages, num_kv_heads, self.head_dim), dtype=self.cache_dtype or self.dtype)
        lengths = torch.empty(batch, dtype=torch.int32)
        options: dict[str, Any] = {"q": q} if self.with_q else {}
        if self.slots:
            options["slot_mapping"] = options["positions"] = torch.empty(batch * self.tokens, dtype=torch.int64)
        else:
            options["cache_seqlens"] = lengths
            if self.page_size:
                options["block_table"] = torch.empty((batch, 4), dtype=torch.int32)
        if self.packed:
            k, options["q"], options["cu_seqlens"] = (
                k.flatten(0, 1),
                q.flatten(0, 1),
                torch.empty(batch + 1, dtype=torch.int32),
            )
        if self.rotary_dim:
            options["cos"] = options["sin"] = torch.empty((64, self.rotary_dim // 2))
        if self.norm:
            options["q_norm_weight"] = options["k_norm_weight"] = torch.empty(self.head_dim, dtype=self.dtype)
        if self.cache_dtype is not None:
            scale = torch.empty(k_cache.shape[:-1] if self.scale_per_token else num_kv_heads)
            options |= {"k_scale": scale, "v_scale": scale}
        return kv_append_forward(call_of(k, k, k_cache, k_cache, interleaved=self.interleaved, **options))


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of what ships: a decode step and a prefill by dtype, both RoPE layouts, each way to say where, each kind of scale."""
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    cases = {
        "bfloat16-decode-copy": _Case(bf16, 1),
        "bfloat16-decode-copy-no_q": _Case(bf16, 1, with_q=False),
        "bfloat16-decode-rope-norm": _Case(bf16, 1, rotary_dim=128, norm=True),
        "bfloat16-decode-rope-norm-paged": _Case(bf16, 1, rotary_dim=128, norm=True, page_size=16),
        "bfloat16-prefill-copy": _Case(bf16, 512),
        "bfloat16-prefill-rope": _Case(bf16, 512, rotary_dim=128),
        "bfloat16-prefill-interleaved": _Case(bf16, 512, rotary_dim=128, interleaved=True),
        "bfloat16-prefill-rope-norm-paged": _Case(bf16, 512, rotary_dim=128, norm=True, page_size=16),
        "bfloat16-prefill-rope-norm-slots": _Case(bf16, 512, rotary_dim=128, norm=True, page_size=16, slots=True),
        "bfloat16-prefill-rope-packed": _Case(bf16, 512, rotary_dim=128, packed=True),
        "float16-d64-prefill-rope": _Case(f16, 512, head_dim=64, rotary_dim=64),
        "float32-d64-prefill-rope-norm": _Case(f32, 512, head_dim=64, rotary_dim=64, norm=True),
        "bfloat16-d80-prefill-partial": _Case(bf16, 512, head_dim=80, rotary_dim=32),
        "bfloat16-d256-prefill-rope-norm": _Case(bf16, 512, head_dim=256, rotary_dim=256, norm=True),
        "int8-per-head": _Case(bf16, 512, rotary_dim=128, cache_dtype=torch.int8),
        "int8-per-token": _Case(bf16, 512, rotary_dim=128, cache_dtype=torch.int8, scale_per_token=True),
        "e4m3-per-head": _Case(bf16, 512, rotary_dim=128, cache_dtype=torch.float8_e4m3fn),
        "e4m3-per-token": _Case(f16, 1, rotary_dim=128, cache_dtype=torch.float8_e4m3fn, scale_per_token=True),
    }  # fmt: skip
    for name, case in cases.items():
        yield f"kv_append-{name}", case.launch
