"""Raw results as JSON: one file a run, written anew after each row, so that a run that is cut off loses nothing and can be resumed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pytransformer import __version__
from pytransformer.benchmarks.harness.paths import ROOT

# A record, or a row of one, that is only read.
Result = Mapping[str, Any]

SCHEMA = 2
# What must agree between two runs before their times may be put side by side in one file.
SAME_RUN = ("device", "torch", "triton", "revision")
NUMBERS = re.compile(r"\[\s*(-?\d[^\[\]{}\"]*?)\s*\]")


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions and source revision."""
    found: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "version": __version__,
        "revision": revision(),
        "device": _cpu_name(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found.update(
            device=properties.name,
            sms=properties.multi_processor_count,
            l2_bytes=properties.L2_cache_size,
            memory_bytes=properties.total_memory,
            compute_capability=f"{properties.major}.{properties.minor}",
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            driver=_nvidia_smi("driver_version").get("driver_version", "unknown"),
            power_limit=_nvidia_smi("power.limit").get("power.limit", "unknown"),
        )
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def revision() -> str:
    """What was measured: the commit of a checkout; without git, the version and a hash of the sources."""
    if os.environ.get("PYTRANSFORMER_REVISION"):
        return os.environ["PYTRANSFORMER_REVISION"]
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            result = None
        if result is not None and result.stdout.strip():
            return result.stdout.strip()
    digest = hashlib.sha256()
    for folder in ("kernels", "csrc", "ops", "pytransformer/ops"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp"):
                digest.update(path.read_bytes())
    return f"{__version__}, sources {digest.hexdigest()[:12]}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def clocks(device: torch.device) -> dict[str, str]:
    """What nvidia-smi says now of clocks (MHz), power (W) and temperature (°C); nothing on a CPU or where it does not answer."""
    if device.type != "cuda":
        return {}
    return _nvidia_smi("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def _nvidia_smi(*fields: str) -> dict[str, str]:
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = result.stdout.splitlines()[0].split(", ") if result.returncode == 0 and result.stdout else []
    return dict(zip(fields, values))


def key_of(op: str, shape: str) -> str:
    """How a row is told from the others."""
    return f"{op} | {shape}"


class Record:
    """The file of one run, and beside it a note of what is running now (FILE.running), which outlives the process.

    Args:
        path: the file. An unfinished one of the same device, versions and revision is continued.
        device: where the rows run.
        options: how they are run; of a continued file the grid may change (a quick grid goes on as a full one).

    Raises:
        ValueError: the file is there, but it is complete, or of another device, version or revision.
    """

    def __init__(self, path: Path, device: torch.device, options: dict[str, Any] | None = None) -> None:
        self.path = path
        self.running_path = running_path(path)
        here = environment(device)
        if path.exists():
            self.content: dict[str, Any] = load(path)
            there = self.content["environment"]
            for name in SAME_RUN:
                if there.get(name) != here[name]:
                    raise ValueError(
                        f"{path} holds results of {name} {there.get(name)}, here it is {here[name]}: give another file"
                    )
            if self.content["complete"]:
                raise ValueError(f"{path} holds a complete run: give another file")
            self.content["options"] = options or self.content["options"]
        else:
            self.content = new_content(here, options or {})
            path.parent.mkdir(parents=True, exist_ok=True)

    def done(self) -> set[str]:
        """Keys of the rows that need not be run again."""
        return {key_of(row["op"], row["shape"]) for row in entries(self.content)}

    def skipped_variants(self, key: str) -> dict[str, str]:
        """Variants of a row that took their process down before, and how."""
        return {
            incident["variant"]: incident["reason"]
            for incident in self.content["incidents"]
            if incident["variant"] and key_of(incident["op"], incident["shape"]) == key
        }

    def set(self, name: str, value: object) -> None:
        """Stores a value beside the rows."""
        self.content[name] = value
        self.write()

    def add(self, row: dict[str, Any], section: str = "rows") -> None:
        """Appends a row to "rows" or "measurements"."""
        self.content[section].append(row)
        self.write()

    def running(self, op: str, shape: str, section: str, variant: str, reason: str = "") -> None:
        """Notes what is about to run, or why it brought the process down."""
        note = {
            "op": op,
            "shape": shape,
            "section": section,
            "variant": variant,
            "since": time.time(),
            "pid": os.getpid(),
            "reason": reason,
        }
        _replace(self.running_path, json.dumps(note))

    def idle(self) -> None:
        """Nothing is running any more."""
        self.running_path.unlink(missing_ok=True)

    def write(self) -> None:
        """Replaces the file in one step."""
        save(self.path, self.content)


def new_content(here: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """An empty record."""
    return {
        "schema": SCHEMA,
        "environment": here,
        "options": options,
        "complete": False,
        "seconds": 0.0,
        "incidents": [],
        "left_out": [],
        "rows": [],
        "measurements": [],
    }


def entries(content: Result) -> list[dict[str, Any]]:
    """Rows and measurements of a record, in this order."""
    return [*content["rows"], *content["measurements"]]


def reopen(path: Path) -> None:
    """Lets a complete record be continued, with the rows of a larger grid."""
    save(path, {**load(path), "complete": False})


def running_path(path: Path) -> Path:
    """The note beside a record."""
    return path.with_name(path.name + ".running")


def load(path: Path) -> dict[str, Any]:
    """A record as it was written.

    Raises:
        ValueError: the file holds no record of this schema.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or "rows" not in content or "environment" not in content:
        raise ValueError(f"{path} holds no benchmark results")
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {content.get('schema')}, this program reads schema {SCHEMA}")
    return content


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a record in one step: samples on one line, six digits of each number."""
    # Where it was run is nobody's business.
    text = json.dumps(_rounded(content), indent=1, ensure_ascii=False).replace(f"{ROOT}/", "")
    _replace(path, NUMBERS.sub(lambda found: f"[{' '.join(found.group(1).split())}]", text) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        # JSON has no infinity; the schema refuses null where it matters.
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return value


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
