"""Rows of `make gpu-hopper`: attention at head_dim 128 and 64 over 1k to 16k tokens, Hopper's kernels beside the portable one and others.

A module with rows as benchmarks/suites/grid.py is. "triton hopper" is the Gluon kernel and "triton" the portable one, both launched without
the choice of a backend, so that each is what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import torch

from pytransformer.benchmarks import peers as all_peers
from pytransformer.benchmarks.definitions.cases import AttentionCase
from pytransformer.benchmarks.harness.rows import Absent, Inputs, Row, Variant
from pytransformer.benchmarks.suites import attention_golden as golden
from pytransformer.benchmarks.suites.attention import draw
from pytransformer.benchmarks.suites.common import backward_of, no_grad
from pytransformer.kernels.attention.backward import BackwardLaunch
from pytransformer.kernels.attention.forward import ForwardLaunch
from pytransformer.kernels.hopper.backward_launch import HopperBackward
from pytransformer.kernels.hopper.launch import HopperForward
from pytransformer.kernels.hopper.names import HAS_REDUCTIONS
from pytransformer.ops.attention.call import AttentionCall

SUITES = {"hopper": None}
TOKENS, HIDDEN_SIZE = 16384, 2048
# The most telling first: long, then what is bound by its beginnings and ends.
LENGTHS = (8192, 1024, 4096, 16384, 2048)
PEERS = ("sdpa_cudnn", "sdpa_flash", "flash_attn_4")


def rows(
    device: torch.device, *, tiny: bool = False, suites: Collection[str] = (), peers: bool = False, quick: bool = False
) -> Iterator[Row]:
    """Forward and backward of each length, at head_dim 128 first."""
    for case in _tiny() if tiny else _grid():
        yield _row(device, case, peers)


def peers(device: torch.device) -> list[dict[str, Any]]:
    """Those that the rows compare with."""
    return [peer for peer in all_peers.overview(device) if peer["name"] in PEERS]


def _grid() -> Iterator[AttentionCase]:
    for head_dim in (128, 64):
        heads = HIDDEN_SIZE // head_dim
        for seqlen in LENGTHS:
            case = AttentionCase(TOKENS // seqlen, seqlen, heads, heads, head_dim)
            yield case
            yield replace(case, backward=True)


def _tiny() -> Iterator[AttentionCase]:
    for head_dim in (128, 64):
        case = AttentionCase(1, 200, 1, 1, head_dim)
        yield case
        yield replace(case, backward=True)


def _row(device: torch.device, case: AttentionCase, with_peers: bool) -> Row:
    variants = _our_backward(case) if case.backward else _our_forward(case)
    found = all_peers.variants("attention", case, device, peers=with_peers)
    absent = {peer["name"]: peer.get("absent", "it does not serve this row") for peer in peers(device)}
    for name in PEERS:
        if name not in found:
            variants[name] = _absent(absent.get(name, "it is not known"))
        else:
            variants[name] = backward_of(name, found[name], ("q", "k", "v")) if case.backward else no_grad(found[name])
    check, pick = (golden.backward, golden.pick_backward) if case.backward else (golden.forward, golden.pick_forward)
    return Row(
        case.row_op,
        case.shape,
        case.flop,
        case.moved_bytes,
        lambda device, seed: draw(case, device, seed),
        variants,
        lambda inputs: check(case, inputs),
        lambda result: pick(case, result),
        priority=0,
    )


def _absent(why: str) -> Variant:
    def call(inputs: Inputs) -> Any:
        raise Absent(why)

    return call


def _call(case: AttentionCase, inputs: Inputs) -> AttentionCall:
    q, k, v = (inputs[name].detach() for name in "qkv")
    return AttentionCall(q, k, v, softmax_scale=case.head_dim**-0.5, causal=case.causal)


def _kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """Calls what ``make`` makes of the first arguments: a launch is prepared once for a row."""
    made: list[Any] = []

    def call(*arguments: Any) -> Any:
        if not made:
            made.append(make(*arguments))
        return made[0](*arguments)

    return call


def _our_forward(case: AttentionCase) -> dict[str, Variant]:
    launches = {"triton hopper": _kept(HopperForward), "triton": _kept(ForwardLaunch)}
    return {name: _forward_of(case, launch) for name, launch in launches.items()}


def _forward_of(case: AttentionCase, launch: Callable[..., Any]) -> Variant:
    return lambda inputs: launch(_call(case, inputs))[0]


def _our_backward(case: AttentionCase) -> dict[str, Variant]:
    launches = {"triton hopper": _kept(HopperBackward), "triton": _kept(BackwardLaunch)}
    variants = {name: _backward_of(case, launch) for name, launch in launches.items()}
    return variants if HAS_REDUCTIONS else {**variants, "triton hopper": _absent("this Triton's TMA does not reduce")}


def _backward_of(case: AttentionCase, launch: Callable[..., Any]) -> Variant:
    """The gradients alone; out and lse are computed once for each draw of inputs, by the portable kernel."""
    forward = _kept(ForwardLaunch)

    def call(inputs: Inputs) -> Any:
        attention = _call(case, inputs)
        out, lse = all_peers.kept(inputs, "portable forward", lambda: forward(attention))
        return launch(attention, inputs["dout"], out, lse, None)[:3]

    return call
