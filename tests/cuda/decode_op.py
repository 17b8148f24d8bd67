"""The CUDA op of decode attention by its own arguments, behind which no Python checks anything."""

from __future__ import annotations

from pytransformer import extension

TENSOR_OPTIONS = (
    "cu_seqlens_q", "max_seqlen_q", "block_table", "cache_batch_idx", "cache_leftpad", "mask", "bias", "alibi_slopes", "sinks", "k_scale",
    "v_scale",
)  # fmt: skip


def raw_arguments(q, k_cache, v_cache, cache_seqlens, **options):
    numbers = {"softmax_scale": 0.25, "causal": True, "left": -1, "right": -1, "softcap": 0.0, "num_splits": 0}
    tensors = {name: options.pop(name, None) for name in TENSOR_OPTIONS}
    assert not options.keys() - numbers.keys()
    return (q, k_cache, v_cache, cache_seqlens, *tensors.values(), *(numbers | options).values())


def raw_op(*tensors, **options):
    """torch.ops.pytransformer_cuda.decode_attention, behind which no Python checks anything."""
    return extension.op("decode_attention")(*raw_arguments(*tensors, **options))
