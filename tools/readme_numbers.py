"""Writes the numbers of README.md from the committed results under benchmarks/results/; with --check, fails if they are stale.

Nothing in README.md's section of numbers is typed in by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- numbers: made by tools/readme_numbers.py from benchmarks/results/; do not edit -->"
END = "<!-- end of numbers -->"


def load(path: Path) -> dict[str, Any] | None:
    """The content of a result file, or None where there is none yet."""
    return json.loads(path.read_text()) if path.exists() else None


def cpu_table(title: str, result: dict[str, Any]) -> list[str]:
    """Tokens per second of each variant of one CPU benchmark."""
    where = result["environment"]
    shape = result["shape"]
    if isinstance(shape, dict):
        shape = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shape.items())
    lines = [
        f"{title} ({shape}; {where['device']}, torch {where['torch']}, transformers {result['transformers']}):",
        "",
    ]
    lines += ["| variant | tokens/s |", "|---|---:|"]
    lines += [
        f"| {row['variant']} | {row['tokens_per_second']:,.{0 if row['tokens_per_second'] >= 1000 else 1}f} |"
        for row in result["rows"]
    ]
    speedup = result["speedup_over_transformers"]
    return [*lines, "", f"That is {speedup:.2f} times transformers in the same run.", ""]


def host_table(result: dict[str, Any]) -> list[str]:
    """What one eager call costs the host."""
    where = result["machine"]
    lines = [
        "**Host time of an eager call** of the CUDA backend, its launch left out, beside torch's own `F.layer_norm` in the same run "
        f"({where['processor']}, Python {where['python']}, torch {where['torch']}):",
        "",
        "| call | µs | of F.layer_norm |",
        "|---|---:|---:|",
    ]
    lines += [f"| {row['name']} | {row['microseconds']:.2f} | {row['of_base']:.2f} |" for row in result["rows"]]
    return [*lines, ""]


def gpu_tables() -> list[str]:
    """Fraction of the floor of each row of the newest result of each GPU."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted((RESULTS / "gpu").glob("*.json")):
        result = json.loads(path.read_text())
        device = result["environment"]["device"]
        if device not in newest or result["environment"]["time"] > newest[device]["environment"]["time"]:
            newest[device] = result
    if not newest:
        return [
            "**On a GPU**: no result has been measured yet, so there is no number to show. `make gpu` makes them.",
            "",
        ]
    lines = []
    for device, result in newest.items():
        ceilings, where = result["ceilings"], result["environment"]
        lines += [
            f"**{device}** (torch {where['torch']}, triton {where['triton']}; in the same run copy {ceilings['copy'] * 1e-12:.2f} TB/s, "
            f"bf16 matmul {ceilings['matmul'] * 1e-12:.0f} TFLOP/s): fraction of the floor.",
            "",
            "| op | shape | ours | best peer |",
            "|---|---|---:|---:|",
        ]
        lines += [_gpu_row(row) for row in result["rows"] if row["variants"]]
        lines.append("")
    return lines


def _gpu_row(row: dict[str, Any]) -> str:
    ours = {name: v["fraction_of_floor"] for name, v in row["variants"].items() if name in ("triton", "cuda")}
    peers = {name: v["fraction_of_floor"] for name, v in row["variants"].items() if name not in ours}

    def best(found: dict[str, float]) -> str:
        if not found:
            return "—"
        name = max(found, key=lambda key: found[key])
        return f"{100 * found[name]:.0f} % ({name})"

    return f"| {row['op']} | {row['shape']} | {best(ours)} | {best(peers)} |"


def numbers() -> str:
    """The whole section."""
    lines = gpu_tables()
    host = load(RESULTS / "cpu" / "host_cost.json")
    if host is not None:
        lines += host_table(host)
    for title, name in (("**Decoding on a CPU**", "decode"), ("**Training on a CPU**", "training")):
        result = load(RESULTS / "cpu" / f"{name}.json")
        if result is not None:
            lines += cpu_table(title, result)
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Rewrites README.md; with --check only compares, and returns 1 if it differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail instead of writing")
    arguments = parser.parse_args()
    page = ROOT / "README.md"
    before = page.read_text()
    head, rest = before.split(BEGIN)
    after = f"{head}{BEGIN}\n{numbers()}{END}{rest.split(END, 1)[1]}"
    if arguments.check:
        if after != before:
            print("README.md's numbers are stale: run `make readme-numbers`", file=sys.stderr)
        return int(after != before)
    page.write_text(after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
