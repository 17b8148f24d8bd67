"""docs/architecture.md says how calls go today: the recorded ways, and the contracts of pyproject.toml."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/architecture.md"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver can be stubbed on a machine without a GPU only")
def test_the_page_says_what_is_recorded() -> None:
    # In a process of its own: here kernels are interpreted.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTRANSFORMER_"))
    }
    command = [sys.executable, "tools/walk.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_kernel_is_four_hops_from_the_public_function() -> None:
    hops = re.findall(r"^\| (\d) \| ([\w ]+) \|", PAGE.read_text(), re.MULTILINE)
    assert [station for hop, station in hops if hop == "4"] == ["kernel", "kernel"]
    assert max(hop for hop, _ in hops) == "4"


def test_every_room_is_on_the_page() -> None:
    page = PAGE.read_text()
    packages = [path.parent.name for path in (ROOT / "pytransformer").glob("*/__init__.py")]
    missing = [name for name in packages if f"  {name}/ " not in page and name != "triton_interpreter"]
    assert missing == ["benchmarks"], "benchmarks is a link to a folder of its own"
