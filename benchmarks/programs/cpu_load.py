"""Loading a checkpoint of 7 billion parameters on a CPU: seconds and memory, in this package and in transformers, interleaved in one run.

    python -m pytransformer.benchmarks.programs.cpu_load              # writes benchmarks/results/cpu/load.json

The checkpoint has Llama 2 7B's shapes in bfloat16, in several files, which are holes: valid headers, and zeros that take no place on the
disk. Each load is a process of its own that has imported everything first; memory is the most of RssAnon (/proc/self/status: what is in
memory and not of a file) that a thread saw meanwhile, the interpreter and its libraries included. A copying load (``mmap=False``) is made
once.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pytransformer.benchmarks.harness.paths import RESULTS
from pytransformer.benchmarks.harness.timing import Timing
from pytransformer.benchmarks.programs import cpu

RESULT = RESULTS / "cpu/load.json"
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
SHARD_BYTES = 5 * 10**9
LEAST_SPEEDUP = 3.0
# The most of RssAnon, in sizes of the checkpoint.
LIMITS = {"pytransformer": 0.1, "pytransformer, mmap=False": 1.1}
VARIANTS = ("pytransformer", "transformers")
COPYING = "pytransformer, mmap=False"


def main() -> int:
    """Measures, prints a table, writes the JSON; 0 if speed and memory meet their targets."""
    parser = cpu.new_parser("cpu_load", __doc__, 5, "loads", RESULT)
    parser.add_argument("--folder", type=Path, help="where to make the checkpoint (default: a temporary folder)")
    parser.add_argument("--child", choices=(*VARIANTS, COPYING), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(measure(arguments.child, arguments.folder)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        size = make_checkpoint(folder)
        result = cpu.new_result({**SHAPE, "dtype": "bfloat16", "bytes": size}, arguments.threads)
        loads = run_all(folder, arguments.rounds)
    code = report(result, loads, size)
    cpu.write(arguments.out, result)
    return code


def make_checkpoint(folder: Path, shape: Mapping[str, int] = SHAPE, shard_bytes: int = SHARD_BYTES) -> int:
    """A checkpoint of holes in transformers' layout; the bytes of its weights."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    shapes = {"model.embed_tokens.weight": [shape["vocab_size"], hidden]}
    for layer in range(shape["num_hidden_layers"]):
        place = f"model.layers.{layer}"
        shapes |= {f"{place}.self_attn.{name}_proj.weight": [hidden, hidden] for name in "qkvo"}
        shapes |= {f"{place}.mlp.{name}_proj.weight": [inner, hidden] for name in ("gate", "up")}
        shapes[f"{place}.mlp.down_proj.weight"] = [hidden, inner]
        shapes |= {f"{place}.{name}_layernorm.weight": [hidden] for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": [hidden], "lm_head.weight": [shape["vocab_size"], hidden]}
    sizes = {name: 2 * math.prod(sides) for name, sides in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if sum(sizes[other] for other in shards[-1]) + sizes[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys(names, file)
        _write_holes(folder / file, {name: (shapes[name], sizes[name]) for name in names})
    total = sum(sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    config = {
        **shape, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "num_key_value_heads": shape["num_attention_heads"], "max_position_embeddings": 4096, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return total


def _write_holes(path: Path, tensors: dict[str, tuple[list[int], int]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, size) in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def run_all(folder: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Each variant's loads, in turns; the copying one last and once."""
    loads: dict[str, list[dict[str, float]]] = {name: [] for name in (*VARIANTS, COPYING)}
    order = [*VARIANTS] * rounds + [COPYING]
    for done, name in enumerate(order, 1):
        command = [
            sys.executable,
            "-m",
            "pytransformer.benchmarks.programs.cpu_load",
            "--child",
            name,
            "--folder",
            str(folder),
        ]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        loads[name].append(json.loads(output.splitlines()[-1]))
        cpu.show_progress("load", done, len(order))
    return loads


def measure(variant: str, folder: Path) -> dict[str, float]:
    """Loads once in this process: seconds, and RssAnon in bytes before and at most."""
    load = _loader(variant, folder)
    before = most = rss_anon()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, rss_anon())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - start
    most = max(most, rss_anon())
    done.set()
    watcher.join()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"seconds": seconds, "rss_anon_before": before, "rss_anon_most": most, "parameters": parameters}


def _loader(variant: str, folder: Path) -> Callable[[], Any]:
    if variant == "transformers":
        from transformers import LlamaForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        return lambda: LlamaForCausalLM.from_pretrained(folder)
    from pytransformer.model.checkpoint import load

    mmap = False if variant == COPYING else None
    return lambda: load(folder, device="cpu", mmap=mmap)


def rss_anon() -> int:
    """Bytes of this process in memory that belong to no file."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def report(result: dict[str, Any], loads: dict[str, list[dict[str, float]]], size: int) -> int:
    """Adds the rows to the result and prints them; 0 if speed and memory meet their targets."""
    timings = {}
    within = True
    for name, samples in loads.items():
        seconds = [sample["seconds"] for sample in samples]
        timing = timings[name] = Timing.of(seconds, "clock")
        most = max(sample["rss_anon_most"] for sample in samples)
        limit = LIMITS.get(name)
        within &= limit is None or most <= limit * size
        row = {
            "variant": name,
            "seconds_per_load": {"median": timing.median, "p10": timing.low, "p90": timing.high},
            "loads": seconds,
            "parameters": samples[0]["parameters"],
            "rss_anon_before": max(sample["rss_anon_before"] for sample in samples),
            "rss_anon_most": most,
            "rss_anon_of_size": most / size,
            "rss_anon_limit": limit,
        }
        result["rows"].append(row)
        target = "" if limit is None else f" (target {limit})"
        print(
            f"{name:28} {timing.median:7.3f} s   RssAnon {most / 2**20:8.0f} MiB, {most / size:.3f} × the size{target}"
        )
    code = cpu.judge(result, {name: timings[name] for name in VARIANTS}, LEAST_SPEEDUP)
    return code if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
