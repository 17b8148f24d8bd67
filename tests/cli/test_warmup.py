"""`pytransformer warmup`: what it compiles is what a later process looks up, for whatever lengths; and errors that name the option."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytransformer.cli.main import main
from pytransformer.cli.warmup import for_whom
from pytransformer.precompile import environment

ROOT = Path(__file__).resolve().parents[2]
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
    for batch, seqlen in ((1, 1), (3, 7), (2, 33)):
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


def _run(cache: Path, *command: str) -> subprocess.CompletedProcess[str]:
    # The test process interprets kernels; these compile them.
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command], env=variables, cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def warm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    result = _run(cache, "-m", "pytransformer", "warmup", *SIZES, "--arch", "90")
    assert result.returncode == 0, result.stderr
    for op in ("attention", "decode_attention", "kv_append", "rope", "norm", "activation", "linear_cross_entropy"):
        assert op in result.stdout
    assert ", 0 found" in result.stdout and str(cache) in result.stdout
    return cache


def test_a_later_launch_compiles_nothing_whatever_the_lengths(warm_cache: Path) -> None:
    result = _run(warm_cache, "-c", LAUNCH.replace("ARCH", "90"))
    assert result.returncode == 0, result.stderr


def test_another_architecture_has_to_be_compiled(warm_cache: Path) -> None:
    result = _run(warm_cache, "-c", LAUNCH.replace("ARCH", "80"))
    assert result.returncode != 0 and "compiles for GPUTarget" in result.stderr and "arch=80" in result.stderr


def test_what_is_there_is_found(warm_cache: Path) -> None:
    result = _run(warm_cache, "-m", "pytransformer", "warmup", *SIZES, "--arch", "90", "--ops", "norm,rope")
    assert result.returncode == 0 and "0 kernels compiled" in result.stdout, result.stdout + result.stderr


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


def test_a_variable_at_its_default_makes_triton_compile_again_and_warmup_says_so(
    warm_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("-m", "pytransformer", "warmup", *SIZES, "--arch", "90", "--ops", "rope")
    result = _run(warm_cache, *arguments)
    assert "0 kernels compiled" in result.stdout and "for processes without environment variables" in result.stdout
    # The value that every launch of ours gives anyway.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    result = _run(warm_cache, *arguments)
    assert ", 0 found" in result.stdout and "warning: for processes with TRITON_DEFAULT_FP_FUSION=" in result.stdout


def test_a_models_shapes_and_backward_passes(tmp_path: Path) -> None:
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
    result = _run(tmp_path / "cache", "-m", "pytransformer", "warmup", *arguments)
    assert result.returncode == 0, result.stderr
    assert "norm_forward_kernel" in result.stdout and "norm_backward_kernel" in result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num-heads", "4", "--arch", "90"], "--head-dim must be given, or --model"),
        (
            [*SIZES, "--ops", "norm,sorting"],
            "--ops must be among attention, decode_attention, kv_append, rope, norm, activation, grouped_linear, "
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


def test_without_a_gpu_an_architecture_is_needed(tmp_path: Path) -> None:
    result = _run(tmp_path, "-m", "pytransformer", "warmup", *SIZES)
    assert result.returncode == 2 and "arch must be given on a machine without a GPU" in result.stderr
    result = _run(tmp_path, "-m", "pytransformer", "warmup", *SIZES, "--arch", "91")
    assert result.returncode == 2 and "arch must be one of" in result.stderr
