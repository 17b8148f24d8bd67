#!/usr/bin/env python3
"""Packages to compare with, for a GPU machine without a network: their wheels into a folder here, and unpacked there.

    python tools/fetch_peers.py                      # downloads into peers/wheels, for Python 3.12 on Linux x86-64 and CUDA 13
    python tools/fetch_peers.py --install            # unpacks into peers/site-packages, where the benchmarks look by themselves

Only wheels are taken, none is built, and nothing that torch brings (torch, triton, numpy, …). A wheel over the limit is packed anew with xz
and, if it is still over it, cut in parts; unpacking joins them. What is in no package index goes beside them by hand:
``triton-tutorials/06-fused-attention.py``, ``triton-tutorials/05-layer-norm.py`` and ``nanogpt/model.py`` of their own repositories.
Standard library only, so that any Python can unpack.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

# What each comparison needs beyond torch and its own dependencies.
GROUPS = {
    "liger": ("liger-kernel",),
    "cute": (
        "quack-kernels", "flash-attn-4", "nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-core", "nvidia-cutlass-dsl-libs-base",
        "nvidia-cutlass-dsl-libs-cu13", "apache-tvm-ffi", "torch-c-dlpack-ext", "cuda-bindings", "cuda-pathfinder", "einops", "protobuf",
        "packaging", "typing-extensions",
    ),
    "transformers": (
        "transformers", "tokenizers", "safetensors", "huggingface-hub", "regex", "pyyaml", "packaging", "tqdm", "typer", "click",
        "filelock", "fsspec", "hf-xet", "httpx2", "httpcore2", "truststore", "anyio", "idna", "h11", "certifi", "shellingham", "rich",
        "annotated-doc", "markdown-it-py", "mdurl", "pygments", "pydantic", "pydantic-core", "annotated-types", "typing-inspection",
    ),
    "flashinfer": (
        "flashinfer-python", "apache-tvm-ffi", "requests", "charset-normalizer", "urllib3", "idna", "certifi", "tabulate", "nvidia-ml-py",
        "ninja", "einops",
    ),
}  # fmt: skip
# flash-attn-4 has had no final release yet.
PRE_RELEASES = frozenset({"flash-attn-4"})
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34)),
    "manylinux2014_x86_64",
    "linux_x86_64",
    "any",
)
LIMIT_MB = 60
PART = ".part"


def main(argv: Sequence[str] | None = None) -> int:
    """Downloads, or unpacks; 0 unless a package could not be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("PYTRANSFORMER_PEERS") or Path(__file__).resolve().parents[1] / "peers")
    parser.add_argument("--folder", type=Path, default=default, help=f"default {default}")
    parser.add_argument("--install", action="store_true", help="unpack what was downloaded")
    parser.add_argument("--group", action="append", choices=sorted(GROUPS), help="only these (may be repeated)")
    parser.add_argument("--python", default="3.12", help="Python of the GPU machine (default 3.12)")
    parser.add_argument(
        "--limit-mb", type=float, default=LIMIT_MB, help=f"largest file, in 10^6 bytes (default {LIMIT_MB})"
    )
    arguments = parser.parse_args(argv)
    wheels = arguments.folder / "wheels"
    if arguments.install:
        count = install(wheels, arguments.folder / "site-packages")
        print(f"{count} packages unpacked into {arguments.folder / 'site-packages'}")
        return 0 if count else 1
    missing = [name for name in packages(arguments.group) if not download(name, wheels, arguments.python)]
    for path in sorted(wheels.glob("*.whl")):
        if path.stat().st_size > arguments.limit_mb * 1e6:
            repack(path, int(arguments.limit_mb * 1e6))
    report(wheels)
    if missing:
        print(f"no wheel was found of: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


def packages(groups: Sequence[str] | None) -> list[str]:
    """Names of the chosen groups (all if none is named), each once."""
    return list(dict.fromkeys(name for group in (groups or GROUPS) for name in GROUPS[group]))


def download(name: str, wheels: Path, python: str) -> bool:
    """The newest wheel of a package without its dependencies; False if there is none for that Python and platform."""
    tag = python.replace(".", "")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", "--dest", str(wheels)]
    for abi in (f"cp{tag}", "abi3", "none"):
        command += ["--abi", abi]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    command += ["--pre"] if name in PRE_RELEASES else []
    result = subprocess.run([*command, name], check=False, capture_output=True, text=True)
    if result.returncode:
        print(f"{name}: {result.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
    return result.returncode == 0


def repack(wheel: Path, limit: int) -> list[Path]:
    """The wheel's files as a tar.xz in its place, in parts no larger than the limit if need be."""
    archive = wheel.with_suffix(".tar.xz")
    with zipfile.ZipFile(wheel) as source, tarfile.open(archive, "w:xz", preset=9) as target:
        for entry in source.infolist():
            if not entry.is_dir():
                member = tarfile.TarInfo(entry.filename)
                member.size, member.mode = entry.file_size, (entry.external_attr >> 16) & 0o777 or 0o644
                with source.open(entry) as stream:
                    target.addfile(member, stream)
    wheel.unlink()
    if archive.stat().st_size <= limit:
        return [archive]
    parts = list(cut(archive, limit))
    archive.unlink()
    return parts


def cut(path: Path, limit: int) -> Iterator[Path]:
    """Parts of a file, numbered from 00."""
    with path.open("rb") as stream:
        for index, content in enumerate(iter(lambda: stream.read(limit), b"")):
            part = path.with_name(f"{path.name}{PART}{index:02d}")
            part.write_bytes(content)
            yield part


class Joined(io.RawIOBase):
    """Parts read as the one file that they are."""

    def __init__(self, parts: Iterable[Path]) -> None:
        self._parts = iter(sorted(parts))
        self._open: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while True:
            if self._open is None:
                following = next(self._parts, None)
                if following is None:
                    return 0
                self._open = following.open("rb")
            count = self._open.readinto(buffer)  # type: ignore[attr-defined]
            if count:
                return int(count)
            self._open.close()
            self._open = None


def install(wheels: Path, target: Path) -> int:
    """Unpacks every wheel, packed anew or not, into a folder that was emptied before; number of packages.

    The folder must be called site-packages: quack tells installed code from its own by that name in the path.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    count = 0
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
        count += 1
    for name in sorted({path.name.split(PART)[0] for path in wheels.glob("*.tar.xz*")}):
        parts = [path for path in wheels.iterdir() if path.name == name or path.name.startswith(name + PART)]
        with tarfile.open(fileobj=io.BufferedReader(Joined(parts)), mode="r|xz") as archive:  # type: ignore[type-var]
            archive.extractall(target, filter="data")
        count += 1
    for data in target.glob("*.data"):
        _place_data(data, target)
    return count


def _place_data(data: Path, target: Path) -> None:
    """A wheel's extra folders: libraries to the others, programs into bin/."""
    for kind in ("purelib", "platlib"):
        if (data / kind).is_dir():
            shutil.copytree(data / kind, target, dirs_exist_ok=True)
    if (data / "scripts").is_dir():
        shutil.copytree(data / "scripts", target / "bin", dirs_exist_ok=True)
        for program in (target / "bin").iterdir():
            program.chmod(0o755)
    shutil.rmtree(data)


def report(wheels: Path) -> None:
    """Files and sizes."""
    files = sorted(wheels.iterdir(), key=lambda path: -path.stat().st_size)
    for path in files:
        print(f"{path.stat().st_size / 1e6:8.1f} MB  {path.name}")
    print(f"{sum(path.stat().st_size for path in files) / 1e6:8.1f} MB  in {len(files)} files, in {wheels}")


if __name__ == "__main__":
    sys.exit(main())
