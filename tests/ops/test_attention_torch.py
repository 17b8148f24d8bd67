"""The path through scaled_dot_product_attention: it stays in the fused kernel, builds small masks and costs next to nothing itself."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pytransformer.ops.attention import attention, by_torch
from pytransformer.ops.attention.call import AttentionCall
from tests.ops.attention_cases import BY_NAME, BY_TILES, packed_qkv, qkv


class Calls(TorchDispatchMode):
    """Names of the attention kernels that ran, and the largest number of elements that any op returned."""

    def __init__(self):
        super().__init__()
        self.kernels = []
        self.ops = []
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.ops.append(function.__name__)
        if "attention" in str(function):
            self.kernels.append(function.__name__)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in BY_TILES])
def test_every_case_runs_in_the_fused_cpu_kernel(name):
    """Without a gradient of the bias, which only the unfused path has."""
    with Calls() as calls, torch.no_grad():
        BY_NAME[name].actual(BY_NAME[name].inputs(1), "torch")
    assert calls.kernels
    assert set(calls.kernels) == {"_scaled_dot_product_flash_attention_for_cpu.default"}


def test_masks_are_built_at_the_smallest_shape():
    """Never (batch, heads, seqlen_q, seqlen_k)."""
    tensors = qkv(3, 40, 40, 4, 4, 8)
    with Calls() as calls, torch.no_grad():
        attention(**tensors, causal=True, window=(7, 0), backend="torch")
    assert calls.largest <= 3 * 40 * 4 * 8
    with Calls() as calls, torch.no_grad():
        attention(**tensors, key_padding_mask=torch.ones(3, 40, dtype=torch.bool), backend="torch")
    assert calls.largest <= 3 * 40 * 4 * 8


def test_windows_that_cut_nothing_need_no_mask():
    for options in ({}, {"causal": True}, {"window": (6, -1)}, {"window": (9, 9)}, {"causal": True, "window": (20, 3)}):
        with Calls() as calls, torch.no_grad():
            attention(**qkv(), **options, backend="torch")
        assert calls.kernels == ["_scaled_dot_product_flash_attention_for_cpu.default"]
        assert not {"arange.default", "ge.Scalar", "le.Scalar"} & set(calls.ops)
    with Calls() as calls, torch.no_grad():
        attention(**qkv(seqlen_q=1, seqlen_k=9), causal=True, backend="torch")  # a decode step sees all keys
    assert calls.kernels == ["_scaled_dot_product_flash_attention_for_cpu.default"]
    assert not {"arange.default", "ge.Scalar", "le.Scalar"} & set(calls.ops)


class OnGpu:
    """Stands in for a CUDA tensor where only its kind is asked for."""

    is_cuda = True
    shape = (1, 1, 1, 8)

    def __init__(self, dtype):
        self.dtype = dtype


@pytest.mark.parametrize(
    ("dtype", "options", "serves"),
    [
        (torch.bfloat16, {"deterministic": True}, False),
        (torch.float16, {"alibi_slopes": torch.ones(2)}, False),
        (torch.bfloat16, {"bias": torch.ones(2, 2)}, False),
        (torch.float32, {"alibi_slopes": torch.ones(2)}, True),
        (torch.bfloat16, {"bias": torch.ones(2, 2).bfloat16(), "causal": True}, True),
    ],
)
def test_what_the_fused_function_leaves_to_tiles_on_a_gpu(dtype, options, serves):
    """Its kernels there are not deterministic and round what they add to 16-bit scores."""
    stand_in = OnGpu(dtype)
    assert by_torch.serves_by_sdpa(AttentionCall(stand_in, stand_in, stand_in, **options), 2, 2) == serves


def test_threads_choose_for_themselves(device):
    """Two threads with different backends at the same time."""
    from pytransformer.ops.backend import requested_backend, use_backend

    barrier = threading.Barrier(2)
    seen = {}

    def work(name):
        with use_backend(name):
            barrier.wait()
            seen[name] = requested_backend(None)
            barrier.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("torch", "reference")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"torch": "torch", "reference": "reference"}
    assert requested_backend(None) is None


def test_long_packed_documents_never_meet(device):
    """A NaN in one document stays there."""
    packed = packed_qkv([40, 24], [40, 24])
    packed["v"][:40] = torch.nan
    out = attention(**packed, causal=True, backend="torch")
    assert out[:40].isnan().all()
    assert out[40:].isfinite().all()


def test_the_wrapper_costs_less_than_five_percent_of_a_training_step():
    """What it adds to the bare function, seen on tiny tensors, against a step of batch 8 × 256 tokens × 4 heads; in processor time."""

    def seconds(function, tensors, runs):
        times = []
        for _ in range(runs):
            start = time.process_time()
            torch.autograd.grad(function(*tensors).sum(), tensors)
            times.append(time.process_time() - start)
        return min(times)

    def bare(q, k, v):
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def ours(q, k, v):
        return attention(q, k, v, causal=True)

    tiny = [tensor.requires_grad_() for tensor in qkv(1, 2, 2, 1, 1, 8).values()]
    step = [tensor.requires_grad_() for tensor in qkv(8, 256, 256, 4, 4, 64).values()]
    added = seconds(ours, tiny, 300) - seconds(bare, tiny, 300)
    assert added < 0.05 * seconds(bare, step, 4)
    with Calls() as calls:
        seconds(ours, step, 1)
    with Calls() as bare_calls:
        seconds(bare, step, 1)
    assert calls.ops == bare_calls.ops  # and not one op more
