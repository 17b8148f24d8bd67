"""``warmup(load=True)`` for the extension: what a model's calls launch was launched before, so that a capture loads nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import pytransformer
from pytransformer import TransformerConfig, attention, decode_attention, kv_append, rms_norm, rope
from pytransformer.ops.overview import CHOICES
from pytransformer.precompile import EXTENSION_OPS, OPS, Shapes, run_extension
from tests.cuda.attention_ops import EMULATED
from tests.support.emulator import configure, runtime_calls

SIZES = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 72,
    "hidden_size": 48,
    "intermediate_size": 96,
    "vocab_size": 64,
    "num_layers": 1,
}


def _ops_that_run(call: Callable[[], object]) -> set[str]:
    """Names of the extension's ops that run in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = [event.key for event in profile.key_averages()]
    return {name.removeprefix("pytransformer_cuda::") for name in names if name.startswith("pytransformer_cuda::")}


def _calls(device: torch.device) -> list[Callable[[], object]]:
    """What a model of these sizes launches, in sizes of another kind than the warm-up's."""

    def tensor(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(sizes, dtype=dtype, device=device)

    lengths = tensor(3, dtype=torch.int32)
    q, k, v = tensor(3, 7, 4, 72), tensor(3, 7, 2, 72), tensor(3, 7, 2, 72)
    cache = tensor(3, 50, 2, 72), tensor(3, 50, 2, 72)
    tables = tensor(9, 36, dtype=torch.float32), tensor(9, 36, dtype=torch.float32)
    return [
        lambda: attention(q, k, v, causal=True, backend="cuda"),
        lambda: decode_attention(q[:, :1], *cache, lengths + 5, backend="cuda"),
        lambda: kv_append(k, v, *cache, cache_seqlens=lengths, q=q, cos=tables[0], sin=tables[1], backend="cuda"),
        lambda: rope(q, k, *tables, backend="cuda"),
        lambda: rms_norm(tensor(21, 48), tensor(48), backend="cuda"),
    ]


def test_nothing_is_new_to_the_runtime_after_a_warm_up(device: torch.device) -> None:
    if not EMULATED:
        pytest.skip("the emulator counts what the runtime is asked")
    shapes = Shapes.of(TransformerConfig.llama(**SIZES))
    with torch.no_grad():
        configure(shared_memory=203 * 1024, stub_launches=True)  # devices that no test has seen, as none has a kernel
        before = runtime_calls()
        for call in _calls(device):
            call()
        assert runtime_calls() != before
        configure(shared_memory=204 * 1024, stub_launches=True)
        run_extension(shapes, OPS, training=False)
        before = runtime_calls()
        for call in _calls(device):
            call()
    assert runtime_calls() == before
    configure()


def test_a_warm_up_runs_every_op_of_the_extension(device: torch.device) -> None:
    shapes = Shapes.of(TransformerConfig.llama(**SIZES))
    if EMULATED:
        configure(stub_launches=True)
    names = _ops_that_run(lambda: run_extension(shapes, OPS, training=True))
    if EMULATED:
        configure()
    assert names >= {"attention_forward", "attention_backward", "decode_attention", "norm_backward"}, names
    assert {name.split("_")[0] for name in names} >= {"kv", "rope", "norm"}, names


def test_what_is_not_served_has_nothing_to_load(device: torch.device) -> None:
    shapes = Shapes.of(TransformerConfig.llama(**SIZES), dtype=torch.float32)
    assert not _ops_that_run(lambda: run_extension(shapes, ["attention"], training=False))


def test_each_op_of_the_extension_is_listed() -> None:
    listed_as = {"layer_norm": "norm", "rms_norm": "norm"}
    served = {choice.op for choice in CHOICES if any(backend.name == "cuda" for backend in choice.candidates)}
    assert {listed_as.get(op, op) for op in served} == set(EXTENSION_OPS)
    assert pytransformer.extension.extension() is not None
