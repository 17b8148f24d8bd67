"""Writes the numbers of README.md from the committed results under benchmarks/results/; with --check, fails if they are stale.

Nothing in README.md's section of numbers is typed in by hand. Results of GPUs (benchmarks/results/gpu/*.json, as `make gpu` writes them)
are also drawn, into docs/img/; sources.json there says from which result each picture was made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "img"
# Ends of the names of the pictures that README.md shows; the others lie beside them.
SHOWN = ("-peers", "-roofline", "-attention_forward", "-decode_attention")
WRITING = True
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
    """What one eager call costs the host, by backend."""
    where = result["machine"]
    lines = [
        "**Host time of an eager call**, its launch left out, beside torch's own `F.layer_norm` in the same run "
        f"({where['processor']}, Python {where['python']}, torch {where['torch']}, Triton {where['triton']}):",
        "",
        "| call | CUDA, µs | of F.layer_norm | Triton, µs | of F.layer_norm |",
        "|---|---:|---:|---:|---:|",
    ]
    cells: dict[str, dict[str, str]] = {}
    both = ", forward and backward"
    for row in result["rows"]:
        # Forward and backward have a base of their own, which takes longer.
        if (row["limit"] is not None or row["backend"] == "torch") and not row["name"].endswith(both):
            cells.setdefault(row["name"], {})[row["backend"]] = f"{row['microseconds']:.2f} | {row['of_base']:.2f}"
    base = cells.pop("F.layer_norm")["torch"]
    lines.append(f"| F.layer_norm | {base} | {base} |")
    for name, found in cells.items():
        if "torch" not in found:
            lines.append(f"| {name} | {found.get('cuda', '— | —')} | {found.get('triton', '— | —')} |")
    first = result["first_launch_seconds"]
    pairs = [row for row in result["rows"] if row["name"].endswith(both)]
    of_torch = ", ".join(
        f"{row['name'].removesuffix(both)} {row['of_base']:.2f} ({row['backend']})"
        for row in pairs
        if row["backend"] != "torch"
    )
    return [
        *lines,
        "",
        f"Forward and backward pass together take, in times of torch's own pair of `F.layer_norm`: {of_torch}.",
        "",
        f"Triton's first `layer_norm` of a process took {first['cold']:.2f} s where it had to compile it, and {first['warm']:.2f} s where "
        "another process or `pytransformer warmup` had.",
        "",
    ]


def attention_table(result: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Attention's options on a CPU, now and before they went over tiles, beside torch's causal attention."""
    from pytransformer.benchmarks.programs.cpu_attention import BASE, LONGEST_IN_TURNS, TARGETS, summary

    where, at = result["environment"], LONGEST_IN_TURNS
    now, then = summary(result), summary(before)
    shape = ", ".join(f"{name} {value}" for name, value in result["shape"].items())
    lines = [
        f"**Attention's options on a CPU**, causal, {at:,} tokens, forward and backward, and the memory beyond inputs, outputs and "
        f"gradients ({shape}; {where['device']}, {result['threads']} threads, torch {where['torch']}). Before, a matrix of scores or of "
        "masks was in memory for each:",
        "",
        "| option | time | of torch's causal | MB | before: time | MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    base = now[BASE][at][0]
    for name in (BASE, *TARGETS, "transformers eager"):
        seconds, extra = now[name][at]
        cells = f"{1e3 * seconds:,.0f} ms | {seconds / base:.2f}× | {extra / 2**20:,.0f}"
        old = then.get(name, {}).get(at) if name in TARGETS else None
        cells += f" | {1e3 * old[0]:,.0f} ms | {old[1] / 2**20:,.0f}" if old else " | | "
        lines.append(f"| {name} | {cells} |")
    return [
        *lines,
        "",
        "![Time and memory of attention's options on a CPU against length](docs/img/cpu-attention.png)",
        "",
    ]


def gpu_results() -> dict[Path, dict[str, Any]]:
    """The newest result of each GPU, by its file. Raises ValueError if a file there is not a valid result."""
    from pytransformer.benchmarks.harness import record, schema

    newest: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted((RESULTS / "gpu").glob("*.json")):
        result = record.load(path)
        try:
            schema.validate(result)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        device = result["environment"]["device"]
        if device not in newest or result["environment"]["time"] > newest[device][1]["environment"]["time"]:
            newest[device] = (path, result)
    return dict(newest.values())


def gpu_tables() -> list[str]:
    """Times and fractions of the floor of the quick grid's rows, of each GPU, and pictures of the whole result."""
    if not any((RESULTS / "gpu").glob("*.json")):
        return [
            "**On a GPU**: no result has been measured yet, so there is no number to show. `make gpu` makes them.",
            "",
        ]
    from pytransformer.benchmarks.harness.tables import describe_ceilings

    lines = []
    for path, result in gpu_results().items():
        where = result["environment"]
        lines += [
            f"**{where['device']}** (torch {where['torch']}, triton {where['triton']}, revision {where['revision']}; "
            f"{describe_ceilings(result['ceilings'])}, measured in the same run). "
            f"All rows and samples: [{path.name}]({path.relative_to(ROOT)}).",
            "",
            "| op | shape | fastest of ours | time | of floor | best peer | ours is |",
            "|---|---|---|---:|---:|---|---:|",
        ]
        rows = [row for row in result["rows"] if row["variants"]]
        lines += [gpu_row(row) for row in ([row for row in rows if row["priority"] == 0] or rows)]
        lines += ["", *measurement_table(result)]
        for picture in pictures(path, result):
            if picture.stem.endswith(SHOWN):
                lines += [f"![{picture.stem}]({picture.relative_to(ROOT)})", ""]
    return lines


def gpu_row(row: dict[str, Any]) -> str:
    """One row of a GPU's table."""
    from pytransformer.benchmarks.harness.tables import best_of_ours, best_peer, duration, speedup

    ours, peer = best_of_ours(row), best_peer(row)
    cells = ["—", "—", "—"]
    if ours:
        share = 100 * row["variants"][ours[0]]["fraction_of_floor"]
        cells = [ours[0], duration(ours[1]), f"{share:.0f} %"]
    ratio = speedup(row, ours[0]) if ours else None
    cells += [peer[0] if peer else "—", f"{ratio:.2f}×" if ratio else "—"]
    return f"| {row['op'].replace('_', ' ')} | {row['shape']} | {' | '.join(cells)} |"


def measurement_table(result: dict[str, Any]) -> list[str]:
    """Tokens per second and other figures with a unit of their own."""
    from pytransformer.benchmarks.harness.tables import best_of_ours, best_peer, number, speedup

    lines = ["| measured | shape | fastest of ours | | unit | best peer | ours is |", "|---|---|---|---:|---|---|---:|"]
    for row in result["measurements"]:
        ours, peer = best_of_ours(row), best_peer(row)
        if not ours or row["priority"]:
            continue
        ratio = speedup(row, ours[0])
        cells = [ours[0], number(ours[1]), row["unit"], peer[0] if peer else "—", f"{ratio:.2f}×" if ratio else "—"]
        lines.append(f"| {row['op'].replace('_', ' ')} | {row['shape']} | {' | '.join(cells)} |")
    return [*lines, ""] if len(lines) > 2 else []


def pictures(path: Path, result: dict[str, Any]) -> list[Path]:
    """The pictures of a result: as sources.json lists them if they were made from it, else drawn now, unless nothing may be written."""
    listed: dict[str, Any] = load(IMAGES / "sources.json") or {}
    stem = "gpu-" + re.sub(r"[^a-z0-9]+", "-", result["environment"]["device"].lower()).strip("-")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    known = listed.get(stem, {})
    drawn = [IMAGES / name for name in known.get("pictures", ())]
    if known.get("sha256") == digest and all(picture.exists() for picture in drawn):
        return drawn
    # Without them the links are missing, so the page is stale.
    if not WRITING:
        return []
    from pytransformer.benchmarks.harness.plots import draw

    for picture in drawn:
        picture.unlink(missing_ok=True)
    drawn = draw(result, IMAGES, stem)
    listed[stem] = {"result": path.name, "sha256": digest, "pictures": [picture.name for picture in drawn]}
    (IMAGES / "sources.json").write_text(json.dumps(listed, indent=1, sort_keys=True) + "\n")
    return drawn


def numbers() -> str:
    """The whole section."""
    lines = gpu_tables()
    host = load(RESULTS / "cpu" / "host_cost.json")
    if host is not None:
        lines += host_table(host)
    attention, before = load(RESULTS / "cpu" / "attention.json"), load(RESULTS / "cpu" / "attention_before.json")
    if attention is not None and before is not None:
        lines += attention_table(attention, before)
    for title, name in (("**Decoding on a CPU**", "decode"), ("**Training on a CPU**", "training")):
        result = load(RESULTS / "cpu" / f"{name}.json")
        if result is not None:
            lines += cpu_table(title, result)
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    """Rewrites README.md; with --check only compares, and returns 1 if it differs."""
    global WRITING
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail instead of writing")
    arguments = parser.parse_args(argv)
    WRITING = not arguments.check
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
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main())
