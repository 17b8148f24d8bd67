"""Other implementations in the same process, each behind one small adapter; `docs` of a peer's ops are in `base.py`.

No code of any peer is in this repository. A peer that is not here is listed once, with the reason; one that is here and does not serve a
case has no variant in that row; one that raises is reported in the row.
"""

from __future__ import annotations

from typing import Any

import torch

from pytransformer.benchmarks.harness.rows import Variant
from pytransformer.benchmarks.peers import (
    flash_attention,
    flashinfer,
    liger,
    quack,
    torch_attention,
    torch_functions,
    triton_tutorial,
)
from pytransformer.benchmarks.peers import transformers as transformers_peer
from pytransformer.benchmarks.peers.base import Peer, kept, lazily, loose_file, use_folder

# Whole models only: see end_to_end/training.py.
NANOGPT = Peer("nanogpt", "nanogpt", "torch", {}, file="nanogpt/model.py", least_capability=None)

PEERS: tuple[Peer, ...] = (
    *torch_attention.PEERS,
    torch_functions.FUNCTIONS,
    torch_functions.COMPILED,
    *flash_attention.PEERS,
    flashinfer.PEER,
    liger.PEER,
    quack.PEER,
    transformers_peer.PEER,
    triton_tutorial.ATTENTION_PEER,
    triton_tutorial.LAYER_NORM_PEER,
    NANOGPT,
)

__all__ = [
    "NANOGPT",
    "PEERS",
    "is_here",
    "kept",
    "loose_file",
    "notes",
    "overview",
    "use_folder",
    "variants",
]


def chosen(device: torch.device, *, peers: bool, quick: bool) -> list[Peer]:
    """Those that can run here: torch's own, with ``peers`` all of them, in a quick run without those that compile for long."""
    return [
        peer
        for peer in PEERS
        if (peers or peer.always) and not (quick and peer.slow_start) and peer.why_absent(device) is None
    ]


def is_here(name: str, device: torch.device) -> bool:
    """Whether the peer of this name can run here."""
    return any(peer.name == name and peer.why_absent(device) is None for peer in PEERS)


def variants(
    op: str, case: Any, device: torch.device, *, peers: bool = False, quick: bool = False
) -> dict[str, Variant]:
    """Name → call of everybody who serves this case here."""
    found: dict[str, Variant] = {}
    for peer in chosen(device, peers=peers, quick=quick):
        factory = peer.ops[op](case) if op in peer.ops else None
        if factory is not None:
            found[peer.name] = lazily(factory)
    return found


def notes(op: str, names: Any) -> dict[str, str]:
    """What is to be said beside the figures of these variants."""
    return {peer.name: peer.notes[op] for peer in PEERS if peer.name in names and op in peer.notes}


def overview(device: torch.device) -> list[dict[str, Any]]:
    """Every peer with its version, the ops it is compared in, and why it is absent, for the record of a run."""
    found = []
    for peer in PEERS:
        reason = peer.why_absent(device)
        entry: dict[str, Any] = {"name": peer.name, "distribution": peer.distribution, "ops": sorted(peer.ops)}
        entry.update({"absent": reason} if reason else {"version": peer.version()})
        found.append(entry)
    return found
