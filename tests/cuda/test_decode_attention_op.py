"""The CUDA op of decode attention as torch meets it: it checks its arguments itself, and its schema and fake are right."""

from __future__ import annotations

import pytest
import torch

from pytransformer import extension
from tests.cuda.decode_op import raw_arguments, raw_op
from tests.kernels.decode_contract import Decode, draw

F16, BF16 = torch.float16, torch.bfloat16


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def H(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=F16)


VALID = {"q": H(2, 1, 4, 16), "k_cache": H(2, 12, 2, 16), "v_cache": H(2, 12, 2, 24), "cache_seqlens": int32(3, 12)}
CODES = {"k_cache": H(2, 12, 2, 16).char(), "v_cache": H(2, 12, 2, 24).char()}
PAGED = {"k_cache": H(9, 4, 2, 16), "v_cache": H(9, 4, 2, 24), "block_table": torch.zeros(2, 3, dtype=torch.int32)}
PACKED = {"q": H(3, 4, 16), "cu_seqlens_q": int32(0, 1, 3)}
ERRORS = [
    ({"q": H(2, 4, 16)}, r"q must have 4 dimensions, got shape \(2, 4, 16\)"),
    ({"cu_seqlens_q": int32(0, 1, 2)}, "q must have 3 dimensions"),
    ({"q": H(2, 1, 4, 16).float()}, "q must be float16 or bfloat16, got float32"),
    ({"q": H(2, 1, 4, 16).bfloat16()}, "k_cache must have the dtype of q, or be int8 or float8_e4m3fn, got float16"),
    ({"v_cache": H(2, 12, 2, 24).char()}, "v_cache must have the dtype of k_cache"),
    ({"q": H(2, 1, 4, 12), "k_cache": H(2, 12, 2, 12)}, "q must have a head_dim that is a multiple of 8 from 8 to 256, got 12"),
    ({"v_cache": H(2, 12, 2, 264)}, "v_cache must have a head_dim .* got 264"),
    ({"q": H(2, 1, 16, 4).transpose(2, 3)}, "q must be contiguous in its last dimension"),
    ({"k_cache": H(12, 2, 16)}, "k_cache must have 4 dimensions"),
    ({"q": H(2, 1, 4, 24)}, "k_cache must have the head_dim of q"),
    ({"v_cache": H(2, 11, 2, 24)}, r"v_cache must have shape \(2, 12, 2, 16\) up to its head_dim"),
    ({"q": H(2, 1, 3, 16)}, r"the heads of q \(3\) must be a multiple of those of k_cache \(2\)"),
    ({"q": H(2, 1, 0, 16)}, "the heads of q"),
    ({"cache_seqlens": int32(3)}, r"cache_seqlens must be int32, contiguous, of shape \(2\), got int32 of shape \(1\)"),
    ({"cache_seqlens": int32(3, 12).long()}, "cache_seqlens must be int32, .* got int64"),
    ({"cache_seqlens": int32(3, 0, 4, 0)[::2]}, "cache_seqlens must be int32, contiguous"),
    ({"cache_seqlens": int32(3, 0)[None]}, "cache_seqlens must have 1 dimension"),
    ({**PACKED, "cu_seqlens_q": int32(0, 3)}, r"cu_seqlens_q must be int32, contiguous, of shape \(3\)"),
    ({**PACKED, "max_seqlen_q": -1}, "max_seqlen_q is for packed queries and not negative"),
    ({"max_seqlen_q": 1}, "max_seqlen_q is for packed queries"),
    ({"cache_leftpad": int32(1)}, "cache_leftpad must be int32"),
    ({"cache_batch_idx": int32(1)}, "cache_batch_idx must be int32"),
    ({**PAGED, "cache_batch_idx": int32(0, 1)}, "cache_batch_idx is for contiguous caches, block_table for pages"),
    ({**PAGED, "block_table": torch.zeros(3, 3, dtype=torch.int32)}, r"block_table must be int32 of shape \(2, pages\)"),
    ({**PAGED, "block_table": torch.zeros(3, 2, dtype=torch.int32).t()}, "block_table must be contiguous in its last dimension"),
    ({**PAGED, "k_cache": H(9, 0, 2, 16), "v_cache": H(9, 0, 2, 24)}, "k_cache must have pages of at least 1 slot"),
    ({"k_cache": H(3, 12, 2, 16), "v_cache": H(3, 12, 2, 24)}, "k_cache must have 2 rows without block_table and cache_batch_idx"),
    ({"k_scale": torch.ones(2)}, "k_scale and v_scale are for int8 and float8_e4m3fn caches"),
    ({**CODES, "k_scale": torch.ones(2)}, "k_scale and v_scale must be given"),
    ({**CODES, "k_scale": torch.ones(3), "v_scale": torch.ones(2)}, r"k_scale must be float32, of shape \(kv_heads\)"),
    ({**CODES, "k_scale": torch.ones(2), "v_scale": torch.ones(2, 12, 3)}, "v_scale must be float32"),
    ({**CODES, "k_scale": torch.ones(2).half(), "v_scale": torch.ones(2)}, "k_scale must be float32, .* got float16"),
    ({**CODES, "k_scale": torch.ones(2), "v_scale": torch.ones(2, 12, 2)}, "must both be per head or both per token"),
    ({"mask": torch.ones(2, 4, 1, 12)}, "mask must be boolean, got float32"),
    ({"mask": torch.ones(2, 4, 2, 12, dtype=torch.bool)}, r"mask must be expanded to .* = \(2, 4, 1, …\), got shape \(2, 4, 2, 12\)"),
    ({"bias": torch.ones(2, 4, 12)}, "bias must be expanded"),
    ({"bias": torch.ones(2, 4, 1, 12).double()}, "bias must be float32, float16 or bfloat16, got float64"),
    ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes must have shape \(heads\) or \(batch, heads\), got \(3\)"),
    ({"alibi_slopes": torch.ones(8)[::2]}, "alibi_slopes must be contiguous"),
    ({"sinks": torch.ones(1, 4)}, r"sinks must have shape \(heads\) = \(4\), got \(1, 4\)"),
    ({"sinks": torch.ones(4).double()}, "sinks must be float32"),
    ({"softmax_scale": float("inf")}, "softmax_scale must be finite, got inf"),
    ({"softcap": -1.0}, "softcap must be finite and at least 0, got -1"),
    ({"left": -2}, r"window must be at least -1, got \(-2, -1\)"),
    ({"num_splits": -1}, "num_splits must be at least 0, got -1"),
    ({"q": H(1, 1, 1, 8).expand(2, 2**28, 16, 8), "k_cache": H(2, 12, 1, 8), "v_cache": H(2, 12, 1, 8)},
     r"query tokens times heads per key head must be less than 2\^30"),
    ({"q": H(1, 1, 1, 16).expand(2, 2**26, 4, 16), "k_cache": H(2, 12, 2, 16), "v_cache": H(2, 12, 2, 24), "num_splits": 0,
      "cache_seqlens": int32(0, 0), "bias": torch.zeros(1).expand(2, 4, 2**26 - 1, 12)}, "bias must be expanded"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[message[:60] for _, message in ERRORS])
def test_the_op_checks_its_arguments(changes, message, device):
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in (VALID | changes).items()
    }
    with pytest.raises(ValueError, match=message):
        raw_op(*[arguments.pop(name) for name in VALID], **arguments)


def test_opcheck(device):
    from pytransformer.ops.decode_attention.call import DecodeCall, check_decode_attention

    blank = dict.fromkeys(DecodeCall._fields) | {
        "causal": True,
        "window": (-1, -1),
        "softcap": 0.0,
        "num_splits": 0,
        "return_lse": True,
    }
    for case in (Decode(dtype=BF16, page_size=4), Decode(dtype=F16, queries=(2, 1))):
        inputs = draw(case, 0, device)
        checked = check_decode_attention(DecodeCall(**(blank | inputs.tensors | inputs.options)))
        torch.library.opcheck(torch.ops.pytransformer.decode_attention.default, (*checked, "cuda"))
        options = {**inputs.tensors, **inputs.options}
        raw = raw_arguments(*[options.pop(name) for name in VALID], **options)
        torch.library.opcheck(extension.op("decode_attention"), raw)
