"""`pytransformer warmup`: what it compiles is what a later process looks up, for whatever lengths; and errors that name the option."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytransformer.cli.main import main
from pytransformer.cli.warmup import for_whom
from pytransformer.ops.overview import CHOICES
from pytransformer.precompile import OPS, environment
from tests.support.bare_process import MODULE, BareProcesses

SIZES = ["--num-heads", "4", "--num-kv-heads", "2", "--head-dim", "16", "--hidden-size", "48"]
SIZES += ["--intermediate-size", "96", "--vocab-size", "300"]

# A process that launches on Triton's own driver, whose CUDA library is a stub, and cannot compile.
LAUNCH = """
import torch
from triton.backends.nvidia.compiler import CUDABackend
from pytransformer import attention, decode_attention, kv_append, linear_cross_entropy, rms_norm, rope, swiglu
from tests.support.triton_stub import count_launches, stubbed_driver

def add_stages(self, stages, options, *others):
    raise AssertionError(f"compiles for {self.target}")

CUDABackend.add_stages = add_stages

def tensor(*sizes, dtype=torch.bfloat16):
    return torch.zeros(sizes, dtype=dtype)

tables = tensor(100, 8, dtype=torch.float32), tensor(100, 8, dtype=torch.float32)
launched = 0
with stubbed_driver(ARCH), torch.no_grad():
    for batch, seqlen in ((1, 1), (1, 1), (3, 7), (2, 33), (2, 33)):  # the same again goes by launches that were kept
        q, k, v = tensor(batch, seqlen, 4, 16), tensor(batch, seqlen, 2, 16), tensor(batch, seqlen, 2, 16)
        caches = tensor(batch, 100, 2, 16), tensor(batch, 100, 2, 16)
        lengths, x = torch.zeros(batch, dtype=torch.int32), tensor(batch, seqlen, 48)
        rms_norm(x, tensor(48), backend="triton")
        rms_norm(x, tensor(48), residual=tensor(batch, seqlen, 48), backend="triton")
        rope(q, k, *tables, offsets=seqlen, backend="triton")
        rope(q, k, *tables, offsets=seqlen, inplace=True, backend="triton")
        kv_append(k, v, *caches, cache_seqlens=lengths, q=q, cos=tables[0], sin=tables[1], backend="triton")
        attention(q, k, v, causal=True, backend="triton")
        decode_attention(q[:, :1], *caches, lengths + seqlen, backend="triton")
        swiglu(tensor(batch, seqlen, 192), backend="triton")
        linear_cross_entropy(x, tensor(300, 48), torch.zeros(batch, seqlen, dtype=torch.int64), backend="triton")
        launched += 9
    assert count_launches() == launched, count_launches()
"""


class Run:
    """Runs code, or `pytransformer warmup`, in a process of its own with a cache folder."""

    def __init__(self, processes: BareProcesses) -> None:
        self._processes = processes

    def __call__(self, cache: Path, code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self._processes.run(code, *arguments, variables={"TRITON_CACHE_DIR": str(cache), **variables})

    def warmup(self, cache: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self(cache, MODULE, "warmup", *arguments, **variables)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with BareProcesses("torch", "triton.backends.nvidia.compiler") as processes:
        yield Run(processes)


@pytest.fixture(scope="module")
def warm_cache(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    result = run.warmup(cache, *SIZES, "--arch", "90")
    assert result.returncode == 0, result.stderr
    for op in ("attention", "decode_attention", "kv_append", "rope", "norm", "activation", "linear_cross_entropy"):
        assert op in result.stdout
    assert ", 0 found" in result.stdout and str(cache) in result.stdout
    return cache


def test_a_later_launch_compiles_nothing_whatever_the_lengths(run: Run, warm_cache: Path) -> None:
    result = run(warm_cache, LAUNCH.replace("ARCH", "90"))
    assert result.returncode == 0, result.stderr


def test_another_architecture_has_to_be_compiled(run: Run, warm_cache: Path) -> None:
    result = run(warm_cache, LAUNCH.replace("ARCH", "80"))
    assert result.returncode != 0 and "compiles for GPUTarget" in result.stderr and "arch=80" in result.stderr


# Commands, one after the other, in one process.
COMMANDS = """
import contextlib, io, json, sys
from pytransformer.cli.main import main
results = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["warmup", *arguments])
    results.append((code, out.getvalue(), " ".join(err.getvalue().split())))
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def told(run: Run, warm_cache: Path) -> list[list[Any]]:
    """(exit code, output, errors) of warm-ups in a later process: what is there, and three without an architecture that will do."""
    others = ([], ["--arch", "91"], ["--load"])
    commands = [[*SIZES, "--arch", "90", "--ops", "norm,rope"], *([*SIZES, *other] for other in others)]
    result = run(warm_cache, COMMANDS, json.dumps(commands))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_what_is_there_is_found(told: list[list[Any]]) -> None:
    code, out, _ = told[0]
    assert code == 0 and "0 kernels compiled" in out and "for processes without environment variables" in out


# What a process may launch while it captures a CUDA graph: nothing new without a warm-up, and everything after one.
CAPTURE = """
import torch
from unittest import mock
from triton.runtime.jit import JITFunction
import pytransformer
from pytransformer import attention, linear_cross_entropy, rms_norm, rope
from pytransformer.precompile import Shapes
from tests.support.triton_stub import capturing, count_launches, stubbed_driver, visible_gpu

def tensor(*sizes, dtype=torch.bfloat16):
    return torch.zeros(sizes, dtype=dtype)

q, k, v = tensor(2, 5, 4, 16), tensor(2, 5, 2, 16), tensor(2, 5, 2, 16)
tables = tensor(9, 8, dtype=torch.float32), tensor(9, 8, dtype=torch.float32)
calls = {
    "norm": lambda: rms_norm(tensor(2, 5, 48), tensor(48), backend="triton"),
    "rope": lambda: rope(q, k, *tables, backend="triton"),
    "attention": lambda: attention(q, k, v, causal=True, backend="triton"),
    "linear_cross_entropy": lambda: linear_cross_entropy(
        tensor(2, 5, 48), tensor(300, 48), torch.zeros(2, 5, dtype=torch.int64), backend="triton"
    ),
}

def refused(op, state):
    before = count_launches()
    try:
        with capturing():
            calls[op]()
    except RuntimeError as error:
        message = str(error)
    assert count_launches() == before
    assert message.startswith(f"{op}: a CUDA graph is being captured, and ") and f" is not {state} yet for this call" in message, message
    assert message.endswith("run it once, or call pytransformer.warmup(..., load=True) for the model"), message

sizes = dict(num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=48, intermediate_size=96, vocab_size=300, num_layers=1)
shapes = Shapes.of(pytransformer.TransformerConfig.llama(**sizes))
with stubbed_driver(90), torch.no_grad():
    for op in calls:
        refused(op, "compiled")
    # Compiled by this process, but never loaded.
    run = JITFunction.run
    with mock.patch.object(JITFunction, "run", lambda *a, **k: run(*a, **{**k, "warmup": True})):
        calls["norm"]()
    refused("norm", "loaded")
    with visible_gpu():
        pytransformer.warmup(shapes, ops=list(calls), load=True)
    for _ in range(3):  # the third by a launch that was kept
        for op, call in calls.items():
            before = count_launches()
            with capturing():
                call()
            assert count_launches() == before + 1, op
"""


def test_a_captured_launch_is_refused_unless_it_was_warmed_up(run: Run, warm_cache: Path) -> None:
    result = run(warm_cache, CAPTURE)
    assert result.returncode == 0, result.stderr


def test_each_op_with_triton_kernels_is_listed() -> None:
    listed_as = dict.fromkeys(("layer_norm", "rms_norm"), "norm") | dict.fromkeys(
        ("swiglu", "geglu", "gelu"), "activation"
    )
    with_kernels = {choice.op for choice in CHOICES if any(backend.name == "triton" for backend in choice.candidates)}
    assert {listed_as.get(op, op) for op in with_kernels} == set(OPS)


def test_layers_of_codes_are_compiled_for_few_rows_and_many(run: Run, tmp_path: Path) -> None:
    script = """
from pytransformer import TransformerConfig, warmup
from pytransformer.precompile import Shapes
sizes = dict(num_heads=2, num_kv_heads=1, head_dim=32, hidden_size=64, intermediate_size=64, vocab_size=64, num_layers=2)
kernels = warmup(Shapes.of(TransformerConfig.llama(**sizes, quantization="int4-32")), ops=["quantized_linear"], arch=90)
print(sorted(kernel.kernel for kernel in kernels))
"""
    result = run(tmp_path, script)
    # 64 outputs (from attention, from the feed-forward, and words), 128 (gate and up; q, k and v): two widths, three tiles.
    assert result.stdout == f"{['quantized_product_kernel'] * 6}\n", result.stdout + result.stderr


IN_THE_KEY = (
    "TRITON_DEFAULT_FP_FUSION",
    "TRITON_F32_DEFAULT",
    "TRITON_DISABLE_LINE_INFO",
    "TRITON_DEBUG",
    "DISABLE_PTXAS_OPT",
)


@pytest.mark.parametrize("name", IN_THE_KEY)
def test_a_variable_in_tritons_key_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in environment():
        monkeypatch.delenv(other)
    assert environment() == {} and "warning" not in for_whom({})
    monkeypatch.setenv(name, "1")
    assert list(environment()) == [name]
    assert for_whom(environment()).startswith(f"warning: for processes with {name}=")


def test_a_variable_at_its_default_makes_triton_compile_again_and_warmup_says_so(run: Run, warm_cache: Path) -> None:
    # The value that every launch of ours gives anyway.
    result = run.warmup(warm_cache, *SIZES, "--arch", "90", "--ops", "rope", TRITON_DEFAULT_FP_FUSION="1")
    assert ", 0 found" in result.stdout and "warning: for processes with TRITON_DEFAULT_FP_FUSION=" in result.stdout


def test_a_models_shapes_and_backward_passes(run: Run, tmp_path: Path) -> None:
    from pytransformer import Transformer, TransformerConfig, save

    config = TransformerConfig(
        vocab_size=16, hidden_size=32, num_layers=1, num_heads=2, norm="layer_norm", max_seqlen=8
    )
    save(Transformer(config), tmp_path / "model")
    arguments = (
        "--model",
        str(tmp_path / "model"),
        "--dtype",
        "float32",
        "--arch",
        "90",
        "--ops",
        "norm",
        "--training",
    )
    result = run.warmup(tmp_path / "cache", *arguments)
    assert result.returncode == 0, result.stderr
    assert "norm_forward_kernel" in result.stdout and "norm_backward_kernel" in result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num-heads", "4", "--arch", "90"], "--head-dim must be given, or --model"),
        (
            [*SIZES, "--ops", "norm,sorting"],
            "--ops must be among attention, decode_attention, kv_append, rope, norm, activation, grouped_linear, quantized_linear, "
            "linear_cross_entropy, linear_attention",
        ),
        (["--model", "here", *SIZES], "--model says all shapes, so --hidden-size, --num-heads"),
        (["--model", "nowhere"], "no model folder nowhere"),
        (["--num-heads", "4", "--head-dim", "7"], "rotary_dim must be even and at most head_dim (7), got 7"),
        (
            ["--num-heads", "4", "--num-kv-heads", "3", "--head-dim", "16"],
            "num_heads must be a multiple of num_kv_heads",
        ),
        ([*SIZES, "--page-size", "0"], "page_size must be at least 1, got 0"),
    ],
)
def test_errors_name_the_option(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_without_a_gpu_an_architecture_is_needed(told: list[list[Any]]) -> None:
    messages = (
        "arch must be given on a machine without a GPU",
        "arch must be one of",
        "load=True loads kernels onto the current GPU, and this machine has none",
    )
    for (code, _, errors), message in zip(told[1:], messages, strict=True):
        assert code == 2 and message in errors
