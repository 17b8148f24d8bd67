"""``pytransformer trace``: who waits for whom in a kernel for Hopper, drawn from a launch in the Gluon interpreter."""

from __future__ import annotations

import argparse
import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pytransformer.gluon_interpreter import Schedule, Trace
    from pytransformer.gluon_interpreter.timeline import Timeline
    from pytransformer.ops.attention.call import AttentionCall

HEAD_DIMS = {"forward": (64, 96, 128, 192, 256), "backward": (64, 128)}
SCHEDULES = ("early", "late", "first", "last", "same", "random")
CLOCKS = ("model", "steps")
DEFAULT_OUTPUT = Path("timeline.png")
_MAX_SEQLEN = 4096
_TEXT_COLUMNS = (80, 160)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers the subcommand and what it traces."""
    parser = subparsers.add_parser("trace", help="draw who waits for whom in a Hopper kernel, without a GPU")
    kernels = parser.add_subparsers(dest="kernel", required=True, metavar="KERNEL")
    attention = kernels.add_parser(
        "attention",
        help="attention's kernels: copies, products and barriers of one block",
        description=(
            "Runs a small launch of the Hopper attention kernel in the Gluon interpreter and draws one block of it: tasks, copies, "
            "products, and who waits for whom. The picture is a model of order, not of time: copies, products and exponentials take "
            "what a multiprocessor needs for them at its limits, and nothing else takes any time."
        ),
    )
    attention.add_argument(
        "--of", choices=tuple(HEAD_DIMS), default="forward", help="which pass (default: the forward pass)"
    )
    attention.add_argument(
        "--head-dim", type=int, default=128, metavar="D", help="features of q, k and v (default 128)"
    )
    attention.add_argument(
        "--seqlen",
        type=int,
        default=512,
        metavar="N",
        help="length of the one sequence (default 512), of which the block that meets all tiles is drawn",
    )
    attention.add_argument("--causal", action="store_true", help="with a causal mask")
    attention.add_argument(
        "--clock",
        choices=CLOCKS,
        default="model",
        help="what spans are measured in: cycles of a model (the default), or steps of the interpreter",
    )
    attention.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="early",
        help="in which the interpreter takes its steps; the model's picture is the same in all (default: early)",
    )
    attention.add_argument("--text", action="store_true", help="print the timeline and a list of all waits")
    attention.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the picture (default {DEFAULT_OUTPUT}; with --text none)",
    )
    attention.set_defaults(run=run_attention)


def run_attention(arguments: argparse.Namespace) -> int:
    """Launches the kernel, and draws or prints the longest of its programs.

    Raises:
        ValueError: an option names what the kernel does not have.
        NotImplementedError: this Triton does not have what the kernel needs.
    """
    _check(arguments)
    import torch

    from pytransformer import verification

    verification.prepare_triton(torch.device("cpu"))

    from pytransformer.cli.timelines import draw, text_lines
    from pytransformer.gluon_interpreter import SCHEDULES as schedules

    chosen = dict(zip(SCHEDULES, schedules, strict=True))[arguments.schedule]
    traces = attention_traces(arguments.of, arguments.head_dim, arguments.seqlen, arguments.causal, chosen)
    picture = timeline_of(traces, arguments.clock)
    block = "the last" if arguments.of == "forward" else "the first"
    what = f"head_dim {arguments.head_dim}, {block} block of a sequence of {arguments.seqlen}{', causal' * arguments.causal}"
    title = f"Attention on Hopper, {arguments.of} pass: {what}"
    if arguments.text:
        low, high = _TEXT_COLUMNS
        columns = max(low, min(shutil.get_terminal_size().columns, high))
        print("\n".join(text_lines(picture, title, columns, arguments.clock)))
    output = arguments.output or (None if arguments.text else DEFAULT_OUTPUT)
    if output is not None:
        draw(picture, title, output, arguments.clock)
        print(output)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    allowed = HEAD_DIMS[arguments.of]
    if arguments.head_dim not in allowed:
        listed = ", ".join(map(str, allowed))
        raise ValueError(f"--head-dim of the {arguments.of} pass must be one of {listed}, got {arguments.head_dim}")
    if not 1 <= arguments.seqlen <= _MAX_SEQLEN:
        raise ValueError(f"--seqlen must be from 1 to {_MAX_SEQLEN}, got {arguments.seqlen}")


def attention_traces(of: str, head_dim: int, seqlen: int, causal: bool, schedule: Schedule) -> list[Trace]:
    """Traces of a launch in which one block meets all tiles: that of the last queries of a sequence of ``seqlen``, which see all keys; in
    the backward pass that of the first keys, which all queries see."""
    import torch

    from pytransformer.gluon_interpreter import traced
    from pytransformer.kernels.hopper.launch import interpreted_in
    from pytransformer.ops.attention.call import AttentionCall

    generator = torch.Generator().manual_seed(0)
    queries, keys = _lengths(of, head_dim, seqlen, causal)
    q, k, v, dout = (
        torch.randn(1, length, 1, head_dim, generator=generator).to(torch.bfloat16)
        for length in (queries, keys, keys, queries)
    )
    call = AttentionCall(q, k, v, causal=causal, softmax_scale=head_dim**-0.5)
    launch = _forward(call) if of == "forward" else _backward(call, dout)
    with traced() as traces, interpreted_in(schedule):
        launch()
    return traces


def _lengths(of: str, head_dim: int, seqlen: int, causal: bool) -> tuple[int, int]:
    """(queries, keys): those of one block where the mask allows it."""
    from pytransformer.kernels.hopper.backward import BLOCK_N
    from pytransformer.kernels.hopper.forward import BLOCK_M

    if of == "forward":
        return min(BLOCK_M.value, seqlen), seqlen
    # A causal mask is aligned to the ends: the first keys are seen by all queries only where there are as many of both.
    return seqlen, seqlen if causal else min(BLOCK_N.value, seqlen)


def _forward(call: AttentionCall) -> Callable[[], object]:
    from pytransformer.kernels.hopper.launch import HopperForward

    return functools.partial(HopperForward(call), call)


def _backward(call: AttentionCall, dout: torch.Tensor) -> Callable[[], object]:
    from pytransformer import reference
    from pytransformer.kernels.hopper.backward_launch import HopperBackward
    from pytransformer.kernels.hopper.names import HAS_REDUCTIONS

    if not HAS_REDUCTIONS:
        raise NotImplementedError(
            "--of backward: this Triton's copy engine does not reduce, which the kernel's dq needs"
        )
    out, lse = reference.attention(
        call.q, call.k, call.v, causal=call.causal, softmax_scale=call.softmax_scale, return_lse=True
    )
    arguments = (call, dout, out, lse, None)
    return functools.partial(HopperBackward(*arguments), *arguments)


def timeline_of(traces: Sequence[Trace], clock: str) -> Timeline:
    """The timeline, by one of ``CLOCKS``, of the program with the most events."""
    from pytransformer.gluon_interpreter import Rates, by_model, by_steps, timeline

    trace = max(traces, key=lambda candidate: len(candidate.events))
    return timeline(trace, by_steps(trace) if clock == "steps" else by_model(trace, Rates()))
