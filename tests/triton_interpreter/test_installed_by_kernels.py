"""``TRITON_INTERPRET=1`` alone, as the message of the backend advises: right results, or an error that says what to do."""

from __future__ import annotations

import os
import subprocess
import sys

RIGHT = """
import torch, pytransformer
from pytransformer import reference
torch.manual_seed(0)
q, k, v = (torch.randn(1, 16, 2, 16).bfloat16() for _ in range(3))
out = pytransformer.attention(q, k, v, backend="triton")
print(float((out.double() - reference.attention(q.double(), k.double(), v.double())).abs().max()))
"""


def _run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", program], env={**environment, **variables}, capture_output=True, text=True, check=False
    )


def test_the_variable_alone_gives_right_bfloat16():
    result = _run("import triton.language\n" + RIGHT, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 2**-6  # outputs are about 1, and p and the result are rounded to 2^-9 of that


def test_kernels_without_the_ops_are_hardened_too_with_the_options_chosen_before():
    program = (
        "import sys\n"
        "from pytransformer import triton_interpreter\n"
        "triton_interpreter.install(bounds=False)\n"
        "module = sys.modules['pytransformer.triton_interpreter.install']\n"
        "chosen = module._active\n"
        "import pytransformer.kernels.norm.forward\n"
        "assert module._active is chosen\n"
        "triton_interpreter.uninstall()\n"
        "del sys.modules['pytransformer.kernels.launch']\n"
        "import pytransformer.kernels.launch\n"
        "assert triton_interpreter.installed()\n"
    )
    result = _run(program, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


def test_the_variable_that_is_not_set_or_set_too_late_is_said_to_be():
    late = (
        "import triton.language, os\n"
        "from pytransformer import triton_interpreter\n"
        "try:\n    triton_interpreter.install()\nexcept RuntimeError as error:\n    print(error)\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        "try:\n    import pytransformer.kernels.rope\nexcept RuntimeError as error:\n    print(error)\n"
    )
    result = _run(late + RIGHT)
    assert result.returncode != 0
    needs = "needs TRITON_INTERPRET=1 in the environment before triton is first imported; it is"
    assert f"{needs} 'not set' now" in result.stdout
    assert f"{needs} '1' now" in result.stdout
    assert "TRITON_INTERPRET=1 was set after triton had been imported, too late" in result.stderr
