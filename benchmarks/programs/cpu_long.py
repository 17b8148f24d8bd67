"""Long sequences on a CPU: time and memory against length, of exact attention and of what grows more slowly.

Grouped-query attention (8 heads, 2 key heads of 64), float32, causal, the forward pass alone and with the backward pass. All variants of a
length take turns in one process. Memory is what the process grows to beyond its inputs, outputs and gradients; a run of its own.

    python -m pytransformer.benchmarks.programs.cpu_long            # writes benchmarks/results/cpu/long.json
    python -m pytransformer.benchmarks.programs.cpu_long --plot docs/img/cpu-long.png
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pytransformer import attention, linear_attention
from pytransformer.benchmarks.harness.paths import RESULTS
from pytransformer.benchmarks.programs import cpu
from pytransformer.benchmarks.programs.cpu_attention import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    Run,
    Tensors,
    finish,
    seconds,
    time_and_extra_bytes,
)
from pytransformer.block_masks import local_global_blocks

RESULT = RESULTS / "cpu/long.json"
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
DENSE, LINEAR, SPARSE, MASKED = "dense causal", "linear", "block-sparse", "the same as a dense mask"
# Of the sparse variants: positions in a block, blocks on either side that are seen, and blocks that all see.
BLOCK, LOCAL, GLOBAL = 128, 2, 1
# What must hold: of linear attention at this length, in times of dense attention's speed; and its memory for each doubling from there on.
JUDGED, LEAST_SPEEDUP, MOST_GROWTH = 32768, 10.0, 2.1
# And of block-sparse attention at this length, in times of the speed with its mask given densely.
JUDGED_SPARSE, LEAST_SPARSE_SPEEDUP = 16384, 4.0
# Below it a megabyte more or less of resident memory decides, which is no figure.
LEAST_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Variant:
    """One way to attend.

    Attributes:
        name: in the result and the picture.
        attend: of q, k and v.
        longest: tokens; beyond them it would take minutes.
    """

    name: str
    attend: Callable[..., Any]
    longest: int = LENGTHS[-1]

    def run(self, tensors: Tensors) -> Run:
        """A call on these tensors, with a backward pass or without."""
        return lambda backward: finish(self.attend(**tensors), backward)


def blocks(seqlen: int) -> torch.Tensor:
    """Local and global blocks, causal."""
    return local_global_blocks(seqlen, seqlen, BLOCK, local=LOCAL, global_=GLOBAL, causal=True)


def attend_to_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    """By the mask of blocks."""
    return attention(q, k, v, causal=True, block_mask=blocks(q.shape[1]), block_size=BLOCK)


@functools.lru_cache(maxsize=1)
def dense_mask(seqlen: int) -> torch.Tensor:
    """(1, 1, seqlen, seqlen) of the same blocks, kept, so that no call pays for it."""
    mask = blocks(seqlen).repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)
    return mask[..., :seqlen, :seqlen].contiguous()


VARIANTS = (
    Variant(DENSE, lambda q, k, v: attention(q, k, v, causal=True), JUDGED),
    Variant("window 256", lambda q, k, v: attention(q, k, v, causal=True, window=(255, 0))),
    Variant(SPARSE, attend_to_blocks),
    Variant(MASKED, lambda q, k, v: attention(q, k, v, causal=True, mask=dense_mask(q.shape[1])), JUDGED_SPARSE),
    Variant(LINEAR, linear_attention),
)


def main() -> int:
    """Measures, prints a table, writes the JSON; 0 if the targets are met."""
    parser = cpu.new_parser("cpu_long", __doc__, 3, "runs", RESULT)
    parser.add_argument("--lengths", type=lambda text: tuple(map(int, text.split(","))), default=LENGTHS)
    parser.add_argument("--plot", type=Path, help="draws the result of --out into this file, and measures nothing")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(json.loads(arguments.out.read_text()), arguments.plot)
        return 0
    shape = {"heads": HEADS, "key heads": KV_HEADS, "head dim": HEAD_DIM, "dtype": "float32", "batch": 1}
    result = cpu.new_result(shape, arguments.threads)
    torch.manual_seed(0)
    for seqlen in arguments.lengths:
        measure(result, seqlen, arguments.rounds)
        cpu.write(arguments.out, result)
    return judge(result)


def measure(result: dict[str, Any], seqlen: int, rounds: int) -> None:
    """Adds the rows of one length, and prints them."""
    tensors = {
        name: torch.randn(1, seqlen, heads, HEAD_DIM, requires_grad=True)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    }
    runs = {variant.name: variant.run(tensors) for variant in VARIANTS if seqlen <= variant.longest}
    samples: dict[tuple[str, bool], list[float]] = {(name, backward): [] for name in runs for backward in (False, True)}
    for _ in range(rounds):
        for (name, backward), found in samples.items():
            found.append(seconds(runs[name], backward))
            for tensor in tensors.values():
                tensor.grad = None
    for (name, backward), found in samples.items():
        _, extra = time_and_extra_bytes(runs[name], backward, tensors)
        result["rows"].append(
            {"variant": name, "seqlen": seqlen, "backward": backward, "seconds": found, "extra_bytes": extra}
        )
        passes = "forward, backward" if backward else "forward"
        print(
            f"{seqlen:6} {name:25} {passes:18} {statistics.median(found):9.3f} s  {extra / 2**20:8.1f} MB", flush=True
        )


def summary(result: Mapping[str, Any], backward: bool) -> dict[str, dict[int, tuple[float, int]]]:
    """By variant and length: median seconds and extra bytes."""
    found: dict[str, dict[int, tuple[float, int]]] = {}
    for row in result["rows"]:
        if row["backward"] == backward:
            figures = statistics.median(row["seconds"]), row["extra_bytes"]
            found.setdefault(row["variant"], {})[row["seqlen"]] = figures
    return found


def judge(result: Mapping[str, Any]) -> int:
    """Prints linear and block-sparse attention beside their targets, as far as the lengths allow; 0 if none is missed."""
    code = 0
    for backward in (False, True):
        found, passes = summary(result, backward), "both passes" if backward else "forward"
        linear, dense = found.get(LINEAR, {}), found.get(DENSE, {})
        if JUDGED in linear and JUDGED in dense:
            speedup = dense[JUDGED][0] / linear[JUDGED][0]
            code |= _say(f"{passes}: linear is {speedup:.1f}× as fast as dense at {JUDGED}", speedup >= LEAST_SPEEDUP)
        sparse, masked = (found.get(name, {}).get(JUDGED_SPARSE) for name in (SPARSE, MASKED))
        if sparse and masked:
            speedup = masked[0] / sparse[0]
            met = speedup >= LEAST_SPARSE_SPEEDUP
            code |= _say(f"{passes}: block-sparse is {speedup:.1f}× as fast as its dense mask at {JUDGED_SPARSE}", met)
        for seqlen in sorted(linear):
            if seqlen >= JUDGED and 2 * seqlen in linear:
                growth = max(linear[2 * seqlen][1], LEAST_BYTES) / max(linear[seqlen][1], LEAST_BYTES)
                code |= _say(f"{passes}: {growth:.2f}× the memory from {seqlen} to {2 * seqlen}", growth <= MOST_GROWTH)
    return code


def _say(text: str, is_met: bool) -> int:
    print(f"{text}{'' if is_met else '  MISSED'}")
    return int(not is_met)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Time and memory against length, a line for each variant: with the backward pass, dashed without."""
    from pytransformer.training.plots import new_figure, save_figure

    figure = new_figure(13, 5.5)
    left, right = figure.subplots(1, 2)
    for backward, style in ((True, "o-"), (False, "x--")):
        for index, (name, points) in enumerate(summary(result, backward).items()):
            lengths = sorted(points)
            line: dict[str, Any] = {"color": f"C{index}", "linewidth": 1.4, "markersize": 5}
            label = name if backward else None
            left.plot(lengths, [points[n][0] for n in lengths], style, label=label, **line)
            right.plot(lengths, [max(points[n][1], 2**20) / 2**20 for n in lengths], style, **line)
    lengths = sorted({row["seqlen"] for row in result["rows"]})
    for axes, label in ((left, "seconds"), (right, "MB beyond inputs, outputs and gradients")):
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(fontsize=8, loc="lower right", title="solid: forward and backward\ndashed: forward", title_fontsize=8)
    threads = result["threads"]
    left.set_title(f"Causal attention on a CPU, {HEADS} heads of {HEAD_DIM}, float32, {threads} threads")
    save_figure(figure, path)


if __name__ == "__main__":
    raise SystemExit(main())
