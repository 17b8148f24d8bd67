"""What the hardened interpreter raises when a kernel does something that a GPU would not forgive."""

from __future__ import annotations


class KernelFault(Exception):
    """Base class of the faults below; they reach the caller of the launch as they are, not wrapped in Triton's
    InterpreterError.
    """


class OutOfBoundsError(KernelFault):
    """A load, store or atomic touched memory that is no element of the tensor its pointer was derived from."""


class MisalignedAccessError(KernelFault):
    """An element was accessed at an address that is no multiple of its size."""


class RaceError(KernelFault):
    """Two programs of one launch (or two lanes of one store) touched one element, and their order decides the result."""


class UnsupportedTritonError(RuntimeError):
    """The interpreter of the installed Triton is not one that this package knows how to harden, or a kernel does something
    that Triton does not compile, or whose compiled result cannot be told here; then it reaches the caller as a KernelFault does.
    """


class OrderDependentWarning(UserWarning):
    """A reduction met NaN, and its result depends on the order in which the compiler chose to combine the elements."""
