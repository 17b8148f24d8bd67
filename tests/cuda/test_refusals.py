"""How a call that goes wrong arrives in Python: refused arguments as ValueError, a failed launch as RuntimeError."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.broken_cuda import run_broken

OPS = torch.ops.pytransformer_cuda


def _calls(x: Tensor) -> dict[str, tuple[object, ...]]:
    """Arguments of one call of each op; float64 ``x`` is refused by all of them."""
    heads, table, lengths = x.view(1, 2, 2, 8), x.new_zeros(2, 4), x.new_zeros(1, dtype=torch.int32)
    attention = (heads, heads, heads, None, None, None, 1.0, False, -1, -1, 0.0)
    statistics = x.new_zeros(2)
    return {
        "rms_norm": (x, None, 1e-5, 0.0),
        "norm_backward": (x, None, x, None, statistics, statistics, 0.0, False, False, None),
        "rope_at": (heads, None, table, table, 0, False),
        "rope_at_": (heads, None, table, table, 0, False),
        "kv_store": (heads, heads, heads, heads, lengths, None),
        "attention_forward": attention,
        "attention_backward": (heads, None, heads, statistics, *attention),
        "decode_attention": (heads, heads, heads, lengths, *[None] * 11, 1.0, False, -1, -1, 0.0, 0),
    }


@pytest.mark.parametrize("name", _calls(torch.zeros(4, 8)))
def test_refused_arguments_are_a_value_error_however_the_op_is_called(name: str, device: torch.device) -> None:
    arguments = _calls(torch.zeros(4, 8, device=device, dtype=torch.float64))[name]
    packet = getattr(OPS, name)
    for call in (packet, packet.default, packet.default._op):
        with pytest.raises(ValueError, match=r"must be (float32, )?float16 or bfloat16, got float64") as caught:
            call(*arguments)
        assert caught.type is ValueError


SCRIPT = """
import torch
for call in (torch.ops.pytransformer_cuda.rope_at, torch.ops.pytransformer_cuda.rope_at.default._op):
    try:
        call(torch.zeros(1, 2, 2, 8), None, torch.zeros(2, 4), torch.zeros(2, 4), 0, False)
    except RuntimeError as error:
        print(type(error).__name__, error)
"""


def test_a_launch_that_fails_is_a_runtime_error(tmp_path: Path, device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("faults are put into what the host emulator runs")
    changes = [("grid, dim3(shape.threads), 0, stream", "grid, dim3(2048), 0, stream")]
    script = "from pytransformer import extension\nassert extension.extension(), extension._load()\n" + SCRIPT
    result = run_broken(tmp_path, "rope/rope.cu", changes, script)
    lines = result.stdout.splitlines()
    assert len(lines) == 2 and all(line.startswith("RuntimeError") for line in lines), (
        result.stdout + result.stderr[-2000:]
    )
