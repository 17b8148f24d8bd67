"""Gluon kernels on a CPU, and the protocol of their asynchronous parts held to its rules.

    from pytransformer import gluon_interpreter
    for schedule in gluon_interpreter.SCHEDULES:
        gluon_interpreter.launch(kernel, (4, 2), q_descriptor, …, schedule=schedule)

A kernel of ``triton.experimental.gluon`` runs as the Python that it is: tensors are arrays, layouts are checked as
Triton checks them and otherwise say nothing, arithmetic and global memory are those of the hardened interpreter
beside this one (``TRITON_INTERPRET=1`` must be set before triton is first imported). Partitions of
``warp_specialize`` are tasks that take turns, in an order that a :class:`Schedule` decides; it also decides when
copies arrive and products (``warpgroup_mma``) read and write: as early or as late as they may.

What breaks a rule raises a :class:`ProtocolFault` with the line. Most do so in every schedule, as it is not the data
that are looked at but whether barriers, waits and fences put two accesses in order (knowledge.py).
docs/gluon-interpreter.md says what is modelled and what is not.
"""

from .clocks import Moments, Rates, by_model, by_steps
from .faults import (
    BarrierStateError,
    ByteCountError,
    DeadlockError,
    DescriptorError,
    LayoutError,
    MissingFenceError,
    MissingWaitError,
    NamedBarrierError,
    OperandReuseError,
    OverArrivalError,
    OverwriteError,
    PhaseError,
    ProtocolFault,
    SharedMemoryLimitError,
    SharedRaceError,
    UnfinishedError,
    UninitialisedReadError,
)
from .launch import launch, traced
from .schedules import EARLY, LATE, SCHEDULES, Schedule
from .timeline import Timeline, timeline
from .trace import Event, Trace

__all__ = [
    "EARLY",
    "LATE",
    "SCHEDULES",
    "BarrierStateError",
    "ByteCountError",
    "DeadlockError",
    "DescriptorError",
    "Event",
    "LayoutError",
    "MissingFenceError",
    "MissingWaitError",
    "Moments",
    "NamedBarrierError",
    "OperandReuseError",
    "OverArrivalError",
    "OverwriteError",
    "PhaseError",
    "ProtocolFault",
    "Rates",
    "Schedule",
    "SharedMemoryLimitError",
    "SharedRaceError",
    "Timeline",
    "Trace",
    "UnfinishedError",
    "UninitialisedReadError",
    "by_model",
    "by_steps",
    "launch",
    "timeline",
    "traced",
]
