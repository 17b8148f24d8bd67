"""What of attention is compiled in the gate: calls that together use every shipped configuration."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.kernels.attention_contract import backward, forward

# A length and a group of heads that people use: what is compiled may depend on both (offsets that need 64 bits; divisions by the group).
SEQLEN, NUM_HEADS, NUM_KV_HEADS = 8192, 32, 8


def compile_calls() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and arguments of calls that together use every shipped configuration, on CPU tensors; nothing of their values matters."""

    def call(
        head_dim: int, value_dim: int, dtype: torch.dtype, packed: bool = False, seqlen: int = SEQLEN, **options: object
    ) -> dict[str, Any]:
        shape = (seqlen,) if packed else (1, seqlen)
        if packed:
            options["cu_seqlens_q"] = options["cu_seqlens_k"] = torch.tensor([0, 100, seqlen], dtype=torch.int32)
        q, k, v = (
            torch.empty(*shape, heads, dim, dtype=dtype)
            for heads, dim in ((NUM_HEADS, head_dim), (NUM_KV_HEADS, head_dim), (NUM_KV_HEADS, value_dim))
        )
        return {"q": q, "k": k, "v": v, "softmax_scale": 0.1, "causal": True, **options}

    everything: dict[str, Any] = {
        "window": (64, 0),
        "softcap": 30.0,
        "alibi_slopes": torch.empty(NUM_HEADS),
        "bias": torch.empty(SEQLEN, SEQLEN),
        "mask": torch.empty(1, 1, SEQLEN, SEQLEN, dtype=torch.bool),
        "key_padding_mask": torch.empty(1, SEQLEN, dtype=torch.bool),
        "sinks": torch.empty(NUM_HEADS),
        "dropout_p": 0.1,
        "dropout_seed": torch.empty(2, dtype=torch.int64),
    }
    for head_dim in (64, 128, 256):
        yield f"bfloat16-d{head_dim}-causal", call(head_dim, head_dim, torch.bfloat16)
    yield "float16-d80-dv40-full", call(80, 40, torch.float16, causal=False)
    yield "bfloat16-d128-window-packed", call(128, 128, torch.bfloat16, packed=True, window=(64, 0))
    # Shorter: the gradient of 8k x 8k for each head would be 4 GB of zeros.
    bias = torch.empty(1, NUM_HEADS, 1024, 1024, dtype=torch.bfloat16)
    yield "bfloat16-d128-bias", call(128, 128, torch.bfloat16, seqlen=1024, bias=bias)
    yield "bfloat16-d64-options", call(64, 64, torch.bfloat16, **everything)
    for head_dim, block_size in ((64, 128), (128, 128), (128, 64)):
        blocks = torch.empty(1, 1, SEQLEN // block_size, SEQLEN // block_size, dtype=torch.bool)
        options = {"block_mask": blocks, "block_size": (block_size, block_size)}
        yield f"bfloat16-d{head_dim}-blocks-of-{block_size}", call(head_dim, head_dim, torch.bfloat16, **options)
    yield "float32-d256-causal", call(256, 256, torch.float32)
    yield "float32-d64-tf32", call(64, 64, torch.float32, allow_tf32=True)


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and launch, forward and backward."""
    for name, arguments in compile_calls():
        yield f"attention_forward-{name}", functools.partial(forward, **arguments)
    for name, arguments in compile_calls():
        q, v = arguments["q"], arguments["v"]
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
        lse = torch.empty(*q.shape[:-3], q.shape[-2], q.shape[-3])
        call = functools.partial(backward, dout=out, out=out, lse=lse, dlse=None, **arguments)
        yield f"attention_backward-{name}", call
    yield from _slope_gradient_cases()
    yield from _bias_gradient_cases()


def _slope_gradient_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Backward passes that give slopes their gradient; of each sequence of a packed call a kernel of its own sums them."""
    for dtype, shape in ((torch.float32, (2, 128)), (torch.bfloat16, (256,))):
        q, k, v, dout = (torch.empty(*shape, 2, 64, dtype=dtype) for _ in range(4))
        arguments: dict[str, Any] = {
            "out": torch.empty_like(dout),
            "lse": torch.empty(*shape[:-1], 2, shape[-1]),
            "dlse": None,
            "softmax_scale": 0.125,
            "causal": True,
            "alibi_slopes": torch.empty(2, 2),
            "want_dslopes": True,
        }
        if len(shape) == 1:
            arguments["cu_seqlens_q"] = arguments["cu_seqlens_k"] = torch.tensor([0, 100, 256], dtype=torch.int32)
        name = f"attention_slope_gradient-{str(dtype).removeprefix('torch.')}-d64"
        yield name, functools.partial(backward, dout, q, k, v, **arguments)


def _bias_gradient_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Backward passes whose bias is shared by the batch, which is what launches that kernel."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, dout = (torch.empty(2, 128, 2, 64, dtype=dtype) for _ in range(4))
        arguments: dict[str, Any] = {
            "out": torch.empty_like(dout),
            "lse": torch.empty(2, 2, 128),
            "dlse": None,
            "softmax_scale": 0.125,
            "causal": False,
            "bias": torch.empty(1, 2, 128, 128, dtype=dtype),
        }
        name = f"attention_bias_gradient-{str(dtype).removeprefix('torch.')}-d64"
        yield name, functools.partial(backward, dout, q, k, v, **arguments)


def wgmma_kernels(case_name: str) -> tuple[str, ...]:
    """Kernels of a case that must use the matrix instructions of sm_90 and sm_100 there."""
    if "float16" not in case_name or "bias_gradient" in case_name:
        return ()
    if case_name.startswith("attention_forward"):
        return ("attention_forward_kernel",)
    dq, dkv = "attention_backward_dq_kernel", "attention_backward_dkv_kernel"
    # See backward_config.
    return (dq,) if "d256" in case_name else (dq, dkv)
