"""What of linear attention is compiled in the gate: dtypes, widths, options, both passes, and the recurrence of decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.support.launchers import linear_backward, linear_forward


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and launches of the shipped configurations, for the compile gate."""

    def launch(
        dims: tuple[int, int],
        dtype: torch.dtype,
        *,
        seqlen: int = 1024,
        decay: bool = False,
        has_state: bool = False,
        backward: bool = True,
        tf32: bool = False,
        **options: Any,
    ) -> None:
        heads, kv_heads = 8, 2
        q = torch.empty(2, seqlen, heads, dims[0], dtype=dtype)
        k, v = (torch.empty(2, seqlen, kv_heads, dim, dtype=dtype) for dim in dims)
        state = {"S": torch.empty(2, kv_heads, *dims), "z": torch.empty(2, kv_heads, dims[0])} if has_state else {}
        factors = torch.empty(kv_heads) if decay else None
        call, results = linear_forward(q, k, v, factors, **state, allow_tf32=tf32, **options)
        if backward:
            linear_backward(call, results, torch.empty_like(results[0]), allow_tf32=tf32)

    # A kernel costs CI seconds, so that each variant is met once: without decay, with it, of given features, in float32; widths beyond
    # one tile differ in how many there are, and float16 in how the same products are scaled.
    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    yield "linear_attention-bfloat16-d64", functools.partial(launch, (64, 64), bfloat16)
    yield "linear_attention-bfloat16-d128-decay", functools.partial(launch, (128, 128), bfloat16, decay=True)
    given = {"feature_map": None, "normalize": False}
    yield "linear_attention-bfloat16-d80-given", functools.partial(launch, (80, 40), bfloat16, decay=True, **given)
    yield "linear_attention-float32-d256", functools.partial(launch, (256, 256), float32, decay=True)
    forward = functools.partial(launch, (128, 128), backward=False)
    yield "linear_attention-float16-d128-decay-forward", functools.partial(forward, float16, decay=True)
    decode = functools.partial(launch, seqlen=1, decay=True, has_state=True, backward=False)
    yield "linear_attention-bfloat16-d128-decoding", functools.partial(decode, (128, 128), bfloat16)


def wgmma_kernels(case_name: str) -> tuple[str, ...]:
    """Kernels of a case that must use the matrix instructions of sm_90 and sm_100 there; those take at least 64 rows."""
    if "float16" not in case_name or "decoding" in case_name:
        return ()
    return ("linear_attention_chunk_kernel", "linear_attention_rows_kernel")
