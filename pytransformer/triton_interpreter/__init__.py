"""Triton's interpreter, hardened: kernels run on a machine without a GPU and are held to what a GPU would hold them to.

    os.environ["TRITON_INTERPRET"] = "1"        # before triton is first imported
    from pytransformer import triton_interpreter
    triton_interpreter.install()

The kernels of this package install it by themselves where that variable is set. Then, beyond what Triton's interpreter
does by itself:

* bfloat16 casts, arithmetic, comparisons and ``tl.dot`` are right (rounded once, to nearest even), 8-bit floats are read
  and made as a GPU does it (nearest code, saturated, NaN kept), and what cannot be right, or what Triton does not compile,
  raises (:class:`UnsupportedTritonError` for casts and 8-bit floats);
* float32 ``tl.dot`` with tf32 precision does not read the low 13 bits of its operands, as a tensor core: in compiled
  kernels nothing rounds them before;
* floats that no integer holds saturate, NaN becomes 0, integers divided by zero have all bits set;
* minima and maxima, also of ``tl.max`` and ``tl.min``, leave NaN out unless it is to propagate, and hold +0 to be larger
  than -0; ``tl.argmax``, like any function that compares, keeps the second of a pair with NaN, and warns
  (:class:`OrderDependentWarning`) if another order of the elements would give another result;
* ``tl.exp`` has the error of compiled code (the argument's product with log2(e) is rounded), and functions flush
  subnormal numbers where their instructions do;
* an access outside of the tensor that its pointer was derived from raises, also in the holes of a strided view, and
  so does a misaligned one;
* two programs that touch one element in ways whose order matters raise, whatever order they ran in; so does a store
  that writes an element twice;
* masked-off lanes of a load without ``other`` are NaN;
* ``tl.inline_asm_elementwise`` runs, as far as the few PTX instructions go that :mod:`.assembly` knows;
* ``tl.device_assert`` and integer overflow checks are on; a grid that CUDA would refuse is refused;
* :func:`program_order` shuffles the order of programs.

Checks cost about a third of the time of a launch, but the stock interpreter walks through Triton's front end in each operation
of each program, and points the language at itself in each call of a device function (``tl.sum``, ``tl.cdiv`` ...). Here both
are done once, so that in all a layer norm of 64 rows takes a sixth of the stock interpreter's time (Triton 3.9), and attention
(float32, 4 heads × 250 × 64) a tenth.

It does not see what lies below the language: shared memory, asynchronous copies, the layouts and the instructions
that the compiler chooses for a GPU. Accesses through ``tl.multiple_of`` and ``tl.max_contiguous`` promises that do
not hold are not noticed either.

Numbers are those that Triton 3.9 compiles for compute capability 9.0. What else differs on a GPU: products and sums may
be fused into one rounding; ``/``, ``tl.exp``, ``tl.exp2``, ``tl.sqrt``, ``tl.rsqrt``, ``tl.sin``, ``tl.cos`` and
``tl.math.erf`` of float32 are off by one or two units in the last place, here by half a one; a reduction or scan adds in
another order; the accumulator of 8-bit products has fewer bits on 9.0; ``tl.dot_scaled`` goes through 16 bits, whose range
is not kept here; ``tl.atomic_add`` of float32 flushes subnormal numbers. Compute capability 8.0 has no float8e4nv, rounds
integers to bfloat16 by way of float32, keeps the sign of a NaN in float8e5, and saturates sums of int8 products. Before
Triton 3.9, 16-bit floats become float8e5 without saturation.
"""

from .errors import (
    KernelFault,
    MisalignedAccessError,
    OrderDependentWarning,
    OutOfBoundsError,
    RaceError,
    UnsupportedTritonError,
)
from .install import install, installed, launched, program_order, uninstall

__all__ = [
    "KernelFault",
    "MisalignedAccessError",
    "OrderDependentWarning",
    "OutOfBoundsError",
    "RaceError",
    "UnsupportedTritonError",
    "install",
    "installed",
    "launched",
    "program_order",
    "uninstall",
]
