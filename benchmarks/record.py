"""Raw results as JSON: one file a run, written anew after each row, so that a run that is cut off loses nothing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions and source revision."""
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "revision": _revision(),
        "device": _cpu_name(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found.update(
            device=properties.name,
            sms=properties.multi_processor_count,
            memory_bytes=properties.total_memory,
            compute_capability=f"{properties.major}.{properties.minor}",
            cuda=torch.version.cuda,
            **_nvidia_smi(),
        )
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _revision() -> str:
    result = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _nvidia_smi() -> dict[str, str]:
    fields = ("driver_version", "clocks.sm", "clocks.mem", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = result.stdout.splitlines()[0].split(", ") if result.returncode == 0 and result.stdout else []
    return dict(zip(fields, values))


class Record:
    """The file of one run."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.content: dict[str, Any] = {"environment": environment(device), "rows": []}
        path.parent.mkdir(parents=True, exist_ok=True)

    def set(self, name: str, value: object) -> None:
        """Stores a value beside the rows."""
        self.content[name] = value
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row."""
        self.content["rows"].append(row)
        self._write()

    def _write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(temporary, self.path)
