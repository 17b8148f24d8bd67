"""Attention's options on a CPU: time and memory against length, beside torch's causal attention of the same shape.

Grouped-query attention (8 heads, 2 key heads of 64), float32, causal, forward and backward. Up to 4,096 tokens all variants of a length
take turns in one process; longer ones run once each. Memory is what the process grows to beyond its inputs, outputs and gradients. Peers
are transformers' eager attention and FlexAttention, compiled, which on a CPU has a forward pass only.

    python -m pytransformer.benchmarks.programs.cpu_attention            # writes benchmarks/results/cpu/attention.json
    python -m pytransformer.benchmarks.programs.cpu_attention --plot docs/img/cpu-attention.png
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer import attention
from pytransformer.benchmarks.harness.paths import RESULTS
from pytransformer.benchmarks.programs import cpu

RESULT = RESULTS / "cpu/attention.json"
# A run of its own over all lengths, of which those beyond LONGEST_IN_TURNS are shown, and one of the package before this way of computing.
LONG = RESULTS / "cpu/attention_long.json"
BEFORE = RESULTS / "cpu/attention_before.json"
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
# Beyond it variants run once, and those stay out that hold a number for each pair of tokens.
LONGEST_IN_TURNS = 4096
BASE = "torch, causal"
# Forward and backward, in times of the base at 4,096 tokens.
TARGETS = {
    "softcap": 2.5,
    "sinks": 2.5,
    "lse": 2.5,
    "ALiBi": 2.5,
    "bias": 1.8,
    "mask": 1.8,
    "dropout": 6.0,
    "window 256": 0.35,
}
MOST_BYTES, MOST_GROWTH = 64 * 2**20, 2.1
QUADRATIC = ("bias", "bias, trained", "mask")
# It stays out where one run would take minutes.
DROPOUT_UP_TO = 16384

Tensors = dict[str, Tensor]
Run = Callable[[bool], None]


def options(name: str, seqlen: int) -> dict[str, Any]:
    """What the call of a variant has beside causality."""
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "softcap": lambda: {"softcap": 20.0},
        "sinks": lambda: {"sinks": torch.randn(HEADS, requires_grad=True)},
        "lse": lambda: {"return_lse": True},
        "ALiBi": lambda: {"alibi_slopes": 2.0 ** -torch.arange(1.0, HEADS + 1)},
        "bias": lambda: {"bias": torch.randn(1, 1, seqlen, seqlen)},
        "bias, trained": lambda: {"bias": torch.randn(1, 1, seqlen, seqlen, requires_grad=True)},
        "mask": lambda: {"mask": torch.rand(1, 1, seqlen, seqlen) > 0.1},
        "dropout": lambda: {"dropout_p": 0.1, "dropout_seed": 1},
        "window 256": lambda: {"window": (255, 0)},
    }
    return made[name]()


def main() -> int:
    """Measures, prints a table, writes the JSON; 0 if the targets are met."""
    parser = cpu.new_parser("cpu_attention", __doc__, 5, "runs", RESULT)
    parser.add_argument("--lengths", type=lambda text: tuple(map(int, text.split(","))), default=LENGTHS)
    parser.add_argument("--no-peers", action="store_true", help="without transformers and FlexAttention")
    parser.add_argument("--plot", type=Path, help="draws the committed results into this file, and measures nothing")
    arguments = parser.parse_args()
    if arguments.plot:
        after, long, before = (json.loads(path.read_text()) for path in (RESULT, LONG, BEFORE))
        after["rows"] += [row for row in long["rows"] if row["seqlen"] > LONGEST_IN_TURNS]
        plot(after, before, arguments.plot)
        return 0
    shape = {"heads": HEADS, "key heads": KV_HEADS, "head dim": HEAD_DIM, "dtype": "float32", "batch": 1}
    result = cpu.new_result(shape, arguments.threads)
    torch.manual_seed(0)
    for seqlen in arguments.lengths:
        measure(result, seqlen, arguments.rounds, peers=not arguments.no_peers)
        cpu.write(arguments.out, result)
    return judge(result)


def measure(result: dict[str, Any], seqlen: int, rounds: int, *, peers: bool) -> None:
    """Adds the rows of one length."""
    in_turns = seqlen <= LONGEST_IN_TURNS
    tensors = {
        name: torch.randn(1, seqlen, heads, HEAD_DIM, requires_grad=True)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    }
    names = [name for name in (*TARGETS, "bias, trained") if in_turns or name not in QUADRATIC]
    if seqlen > DROPOUT_UP_TO:
        names.remove("dropout")
    runs: dict[str, Run] = {BASE: torch_run(tensors), **{name: our_run(name, tensors, seqlen) for name in names}}
    if peers and in_turns:
        runs |= peer_runs(tensors, seqlen)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    forward: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds if in_turns else 0):
        for name, run in runs.items():
            forward[name].append(seconds(run, False))
            if not name.startswith("FlexAttention"):
                samples[name].append(seconds(run, True))
    for name, run in runs.items():
        elapsed, extra = time_and_extra_bytes(run, not name.startswith("FlexAttention"), tensors)
        row: dict[str, Any] = {
            "variant": name,
            "seqlen": seqlen,
            "forward_seconds": forward[name],
            "seconds": samples[name] if in_turns else [elapsed],
            "extra_bytes": extra,
        }
        result["rows"].append(row)
        times = " ".join(f"{1e3 * statistics.median(of):9.1f} ms" for of in (forward[name], samples[name]) if of)
        print(f"{seqlen:6} {name:24} {times}  {extra / 2**20:8.1f} MB", flush=True)


def torch_run(tensors: Tensors) -> Run:
    """scaled_dot_product_attention, causal."""

    def run(backward: bool) -> None:
        q, k, v = (tensor.transpose(1, 2) for tensor in tensors.values())
        finish(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), backward)

    return run


def our_run(name: str, tensors: Tensors, seqlen: int) -> Run:
    """attention, causal, with the options of a variant."""
    more = options(name, seqlen)

    def run(backward: bool) -> None:
        result = attention(**tensors, causal=True, **more)  # type: ignore[arg-type]
        finish(result, backward)
        for value in more.values():
            if isinstance(value, Tensor):
                value.grad = None

    return run


def finish(result: Any, backward: bool) -> None:
    """The backward pass, through out and lse."""
    if backward:
        outputs = result if isinstance(result, tuple) else (result,)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def peer_runs(tensors: Tensors, seqlen: int) -> dict[str, Run]:
    """transformers' eager attention, with the scores in memory, and FlexAttention where it compiles."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from transformers.models.llama.modeling_llama import eager_attention_forward

    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // KV_HEADS  # type: ignore[assignment]
    hidden = torch.full((seqlen, seqlen), -torch.inf).triu_(1)[None, None]

    def eager(backward: bool) -> None:
        q, k, v = (tensor.transpose(1, 2) for tensor in tensors.values())
        finish(eager_attention_forward(module, q, k, v, hidden, scaling=HEAD_DIM**-0.5)[0], backward)

    found: dict[str, Run] = {"transformers eager": eager}
    compiled = torch.compile(flex_attention)
    masks = {
        "causal": lambda b, h, i, j: i >= j,
        "window 256": lambda b, h, i, j: (i >= j) & (i - j < 256),
    }
    for name, score_mod in {
        "causal": None,
        "softcap": lambda s, b, h, i, j: 20 * torch.tanh(s / 20),
        "window 256": None,
    }.items():
        block_mask = create_block_mask(masks.get(name, masks["causal"]), None, None, seqlen, seqlen, device="cpu")

        def flex(backward: bool, block_mask: Any = block_mask, score_mod: Any = score_mod) -> None:
            q, k, v = (tensor.detach().transpose(1, 2).contiguous() for tensor in tensors.values())
            compiled(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=True)

        found[f"FlexAttention {name}"] = flex
        # Compiled as it is measured: without a gradient.
        seconds(flex, False)
    return found


def seconds(run: Run, backward: bool) -> float:
    """Of one run."""
    with torch.set_grad_enabled(backward):
        start = time.perf_counter()
        run(backward)
        return time.perf_counter() - start


def time_and_extra_bytes(run: Run, backward: bool, tensors: Tensors) -> tuple[float, int]:
    """Seconds of one run, and what the process grows to beyond what it holds before, less outputs and gradients."""
    for tensor in tensors.values():
        tensor.grad = None
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # Linux forgets the highest mark.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    elapsed = seconds(run, backward)
    out = tensors["q"].nbytes
    results = out + (out + sum(tensor.nbytes for tensor in tensors.values()) if backward else 0)
    for tensor in tensors.values():
        tensor.grad = None
    return elapsed, max(0, _status("VmHWM") - before - results)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def summary(result: Mapping[str, Any]) -> dict[str, dict[int, tuple[float, float]]]:
    """By variant and length: median seconds (of both passes, where there are both) and extra bytes."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for row in result["rows"]:
        times = row["seconds"] or row["forward_seconds"]
        found.setdefault(row["variant"], {})[row["seqlen"]] = statistics.median(times), row["extra_bytes"]
    return found


def judge(result: Mapping[str, Any]) -> int:
    """Prints each variant beside its target; 0 if all are met."""
    rows, code = summary(result), 0
    at = LONGEST_IN_TURNS
    if at not in rows.get(BASE, {}):
        return 0
    for name, target in TARGETS.items():
        found = rows[name]
        ratio = found[at][0] / rows[BASE][at][0]
        longest = max(found)
        # A few megabytes of resident memory are uncertain by as much, so growth is taken over all lengths from here on.
        growth = (found[longest][1] / max(found[at][1], 2**20)) ** (1 / max(1, math.log2(longest / at)))
        met = ratio <= target and found[at][1] <= MOST_BYTES and growth <= MOST_GROWTH
        doubling = f", {growth:.2f}× for each doubling of the length" if longest > at else ""
        print(
            f"{name:12} {ratio:5.2f}× {BASE} (target {target}), {found[at][1] / 2**20:.0f} MB{doubling}"
            f"{'' if met else '  MISSED'}"
        )
        code = code or int(not met)
    return code


def plot(after: Mapping[str, Any], before: Mapping[str, Any], path: Path) -> None:
    """Time and memory against length: a line for each variant, dashed as it was before."""
    from pytransformer.training.plots import new_figure, save_figure

    figure = new_figure(13, 5.5)
    left, right = figure.subplots(1, 2)
    for index, name in enumerate((BASE, *TARGETS)):
        color = "black" if name == BASE else f"C{index - 1}"
        for result, style in ((after, "o-"), (before, "x--")):
            points = summary(result).get(name, {})
            if name == BASE and result is before:
                continue
            lengths = sorted(points)
            label = name if result is after else None
            left.plot(
                lengths, [points[n][0] for n in lengths], style, color=color, label=label, linewidth=1.4, markersize=5
            )
            right.plot(
                lengths,
                [max(points[n][1], 2**20) / 2**20 for n in lengths],
                style,
                color=color,
                linewidth=1.4,
                markersize=5,
            )
    for axes, label in ((left, "seconds, forward and backward"), (right, "MB beyond inputs, outputs and gradients")):
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.set_xticks(LENGTHS, [f"{n // 1024}k" for n in LENGTHS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(fontsize=7, ncols=2, loc="lower right", title="solid: now, dashed: before")
    left.set_title("Causal attention on a CPU, 8 heads of 64, float32")
    save_figure(figure, path)


if __name__ == "__main__":
    raise SystemExit(main())
