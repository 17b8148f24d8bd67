"""Triton's interpreter, hardened: kernels run on a machine without a GPU and are held to what a GPU would hold them to.

    os.environ["TRITON_INTERPRET"] = "1"        # before triton is first imported
    from pytransformer import triton_interpreter
    triton_interpreter.install()

Then, beyond what Triton's interpreter does by itself:

* bfloat16 casts, arithmetic, comparisons and ``tl.dot`` are right (rounded to nearest even), and what cannot be right
  raises;
* float32 ``tl.dot`` with tf32 precision loses the bits that tf32 loses;
* an access outside of the tensor that its pointer was derived from raises, also in the holes of a strided view, and
  so does a misaligned one;
* two programs that touch one element in ways whose order matters raise, whatever order they ran in; so does a store
  that writes an element twice;
* masked-off lanes of a load without ``other`` are NaN;
* ``tl.device_assert`` and integer overflow checks are on; a grid that CUDA would refuse is refused;
* :func:`program_order` shuffles the order of programs.

Checks cost about a quarter of the time of a launch, but the stock interpreter repeats work in each call of a device
function (``tl.sum``, ``tl.cdiv`` ...) that is done once per launch here, so in all a layer norm of 64 rows takes 0.6 of
the stock interpreter's time and attention (float32, 4 heads × 250 × 64) 0.8, about 1 ms per program.

It does not see what lies below the language: shared memory, asynchronous copies, the layouts and the instructions
that the compiler chooses for a GPU. Accesses through ``tl.multiple_of`` and ``tl.max_contiguous`` promises that do
not hold are not noticed either.
"""

from .errors import (
    KernelFault,
    MisalignedAccessError,
    OutOfBoundsError,
    RaceError,
    UnsupportedTritonError,
)
from .install import install, installed, program_order, uninstall

__all__ = [
    "KernelFault",
    "MisalignedAccessError",
    "OutOfBoundsError",
    "RaceError",
    "UnsupportedTritonError",
    "install",
    "installed",
    "program_order",
    "uninstall",
]
