"""Writes docs/kernels.md: what decides the speed of the kernels in their machine code, from the committed figures of the gate.

    python tools/kernel_table.py [--check]

Read: benchmarks/results/gate/triton.json, peer.json, hopper_forward.json and cuda.json (what compiles now: `make gate-figures`),
before.json (the same figures of the kernels before their loops were looked at).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/gate"
PAGE = ROOT / "docs/kernels.md"

Figures = dict[str, dict[str, Any]]

# Which kernels are shown, by their names in the files: of Triton on sm_90 at 8k tokens with 32 heads in groups of 4.
TRITON = {
    **{
        f"attention {kernel}, d{dim}": f"attention_{case}-bfloat16-d{dim}-causal-sm_90 attention_{case}{suffix}_kernel {number}"
        for dim in (64, 128)
        for kernel, case, suffix, number in (
            ("forward", "forward", "", 0),
            ("dq", "backward", "_dq", 0),
            ("dk/dv", "backward", "_dkv", 1),
        )
    },
    "decode, d128, bfloat16": "decode_attention-bfloat16-d128-q1-sm_90 _decode_kernel 0",
    "decode, d128, int8 cache": "decode_attention-bfloat16-d128-int8-page0-sm_90 _decode_kernel 0",
    "decode, d128, fp8 cache": "decode_attention-bfloat16-d128-float8_e4m3fn-page0-sm_90 _decode_kernel 0",
    "cross-entropy, 50257 words": "linear_cross_entropy-50257-bfloat16-sm_90 cross_entropy_kernel 0",
    "cross-entropy, 131072 words": "linear_cross_entropy-131072-bfloat16-sm_90 cross_entropy_kernel 0",
    "cross-entropy, all options": "linear_cross_entropy-256000-bfloat16-everything-sm_90 cross_entropy_kernel 0",
    "RoPE, 32/8 heads × 128": "rope-half-32/8x128-bfloat16-sm_90 rope_kernel 0",
    "cache append, prefill, RoPE": "kv_append-bfloat16-prefill-rope-sm_90 _kv_append_kernel 0",
    "cache append, decode, RoPE and norm": "kv_append-bfloat16-decode-rope-norm-sm_90 _kv_append_kernel 0",
}
PEER = {
    f"peer, forward, d{dim}, {keys} keys a tile": f"peer-bfloat16-d{dim}-causal-{keys}_keys-sm_90 peer_attention_kernel 0"
    for dim in (64, 128)
    for keys in (64, 128)
}
HOPPER = {
    f"Hopper's forward, d{name.replace('-', ', ')}": f"hopper-bfloat16-d{name}-sm_90"
    for name in ("64-causal", "128-causal", "256-full-packed-sinks")
}
CUDA = {
    **{
        f"attention {name}, d{dim}": f"attention_{file}_bfloat16_{dim} attention_{kernel}_kernel<__nv_bfloat16, {dim}, false> sm_90"
        for dim in (64, 128)
        for name, file, kernel in (
            ("forward", "forward", "forward"),
            ("dq", "backward", "backward_dq"),
            ("dk/dv", "backward", "backward_dkv"),
        )
    },
    **{
        f"decode, d128, {title} cache": f"decode_attention_split_bfloat16_{file} "
        f"decode::decode_kernel<__nv_bfloat16, {element}, 128> sm_90"
        for title, file, element in (("bfloat16", "plain", "__nv_bfloat16"), ("8-bit", "widened", "signed char"))
    },
}

HEAD = """# Kernels in their machine code

<!-- Written by tools/kernel_table.py from benchmarks/results/gate; do not edit. -->

The gate compiles every kernel in every shipped configuration without a GPU (`make gate`) and finds its **hot loops**: innermost loops, by
their backward branches, that have the kernel's matrix instructions or, without any, move its global memory. A kernel without such a loop
is judged whole, in brackets. Attention is compiled at 8,192 tokens with 32 heads in groups of 4, causal, bfloat16. All figures are for
sm_90; those of sm_80 and sm_100 and each class of instruction are in `benchmarks/results/gate/`. An attention kernel's first loop has the
tiles that every row sees whole; the others have those that the diagonal or an end cuts.

The **issue ratio** compares the clocks in which a loop's instructions are issued, `instructions · warps / 4`, with those that its bytes
of global memory take at 18.6 bytes per clock and SM (4.3 TB/s on an H200). Above 0.8 a kernel whose floor is memory waits for issue
instead, and the gate fails unless a reason is listed in `tests/support/limits.py`. Of attention, whose tiles are read again and
again from L2, it says nothing. Local memory in a hot loop fails as well. The gate cannot see latency, bank conflicts or what a cache
serves: it is no substitute for a measurement.
"""
COLUMNS = "| kernel | registers | blocks per SM | hot loops, instructions | EX2 | integer | matrix | barriers | local | issue ratio |"
RULE = "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|"


def load(name: str) -> Figures:
    """The kernels of a file of figures; none without the file."""
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text())["kernels"]) if path.is_file() else {}


def loops(kept: dict[str, Any], name: str | None = None) -> str:
    """Instructions of each hot loop, all or of one class, in the order of the code."""
    counts = [loop["instructions"] if name is None else loop["classes"].get(name, 0) for loop in kept["loops"]]
    texts = [str(count) if loop["is_loop"] else f"[{count}]" for count, loop in zip(counts, kept["loops"])]
    return " / ".join(texts)


def row(title: str, kept: dict[str, Any], streams: bool) -> str:
    """A kernel's line; ``streams``: with its issue ratios."""
    barriers = " / ".join(str(loop["cta_barriers"]) for loop in kept["loops"])
    ratios = ["" if loop["issue_ratio"] is None else f"{loop['issue_ratio']:.2f}" for loop in kept["loops"]]
    columns = [
        title, str(kept["registers"]), str(kept["blocks_per_sm"]), loops(kept), loops(kept, "ex2"), loops(kept, "integer"),
        loops(kept, "matrix"), barriers, loops(kept, "local"), " / ".join(ratios) if streams else "",
    ]  # fmt: skip
    return "| " + " | ".join(columns) + " |"


def table(chosen: dict[str, str], figures: Figures) -> list[str]:
    """Lines of the kernels.

    Raises:
        LookupError: one of them has no figures: it is called otherwise now, or was not compiled.
    """
    missing = [name for name in chosen.values() if name not in figures]
    if missing:
        raise LookupError(f"there are no figures of these kernels in {RESULTS}: {missing}")
    # Where bytes go through L2 again and again, or are loaded by a loop around the one that multiplies (CUDA), a ratio says nothing.
    streams = {title for title in chosen if chosen is TRITON and not title.startswith("attention")}
    return [COLUMNS, RULE, *(row(title, figures[name], title in streams) for title, name in chosen.items())]


def changes(before: Figures, now: Figures) -> list[str]:
    """What changed in kernels that have figures of both."""
    lines = ["| kernel | registers | hot loops, instructions | largest issue ratio |", "|---|---:|---|---:|"]
    for title, name in TRITON.items():
        old, new = before.get(name), now.get(name, {})
        if old is None or "loops" not in new or old == new:
            continue
        columns = [title, f"{old['registers']} → {new['registers']}", f"{loops(old)} → {loops(new)}"]
        ratios = [max((loop["issue_ratio"] or 0.0 for loop in kept["loops"]), default=0.0) for kept in (old, new)]
        columns.append("" if title.startswith("attention") else f"{ratios[0]:.2f} → {ratios[1]:.2f}")
        lines.append("| " + " | ".join(columns) + " |")
    return lines


def page() -> str:
    """All of docs/kernels.md."""
    triton = load("triton")
    parts = [
        [HEAD],
        ["## Triton", "", *table(TRITON, triton)],
        [
            "",
            "The peer is attention written as Triton's tutorial goes about it, with tensor descriptors",
            "(`tests/compile/peer_attention.py`): no options, no lengths but multiples of the tile. Ours takes 128 keys a tile at both",
            "sizes; of 128 keys the peer's diagonal is one tile and no loop.",
            "",
            *table(PEER, load("peer")),
        ],
        [
            "",
            "Hopper's own forward kernel, in Gluon (`kernels/hopper`), has a masked and a whole loop for each of its two warpgroups,",
            "with 64 queries and four warps where the others have 128 and eight: the numbers compare as they stand.",
            "",
            *table(HOPPER, load("hopper_forward")),
        ],
        ["", "## CUDA", "", *table(CUDA, load("cuda"))],
        ["", "## What looking at loops changed", "", *changes(load("before"), triton)],
    ]
    return "\n".join(line for part in parts for line in part) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if the page is not what it would be now")
    if parser.parse_args(argv).check:
        if PAGE.read_text() != page():
            print("docs/kernels.md is not what its figures say: run tools/kernel_table.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
