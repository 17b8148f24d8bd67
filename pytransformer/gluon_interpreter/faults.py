"""What the Gluon interpreter raises: one class per rule of the asynchronous protocol that a kernel broke.

Every message ends with the line of the kernel that was running, and names the other line where two are in each
other's way.
"""

from __future__ import annotations

from pytransformer.triton_interpreter import KernelFault


class ProtocolFault(KernelFault):
    """Base class of the faults below."""


class DeadlockError(ProtocolFault):
    """No task can go on and no copy is under way; the message lists each waiter with its barrier, phase and line."""


class OverArrivalError(ProtocolFault):
    """More arrivals at a barrier in one phase than it was initialised for."""


class ByteCountError(ProtocolFault):
    """The bytes that a barrier expects in a phase are not those that copies bring."""


class BarrierStateError(ProtocolFault):
    """A barrier was used before it was initialised or after it was invalidated, or initialised while in use."""


class PhaseError(ProtocolFault):
    """A wait names a phase that is neither 0 nor 1, or its phase came and went before the waiter could see it."""


class OverwriteError(ProtocolFault):
    """Shared memory is written while an earlier access of the same bytes may not be through."""


class MissingWaitError(ProtocolFault):
    """What an asynchronous copy or product brings is read before anything says that it has arrived."""


class MissingFenceError(ProtocolFault):
    """Bytes that threads wrote are used by a copy or product, with no ``fence_async_shared`` in between."""


class OperandReuseError(ProtocolFault):
    """Nothing holds the registers of a product's operand any more, and the product may still read them."""


class UninitialisedReadError(ProtocolFault):
    """Shared memory is read that nothing has written."""


class SharedRaceError(ProtocolFault):
    """Two tasks touch the same bytes of shared memory, one of them writes, and nothing puts them in order."""


class UnfinishedError(ProtocolFault):
    """A task or the program ends while copies or products that it started may still run."""


class DescriptorError(ProtocolFault):
    """A copy's descriptor, coordinates and shared memory do not fit together."""


class LayoutError(ProtocolFault):
    """Layouts, shapes or types of a product are not those that the instruction takes."""


class NamedBarrierError(ProtocolFault):
    """A named barrier is used with a number or a count of threads that the others do not use."""


class SharedMemoryLimitError(ProtocolFault):
    """A program asks for more shared memory than a multiprocessor gives it."""
