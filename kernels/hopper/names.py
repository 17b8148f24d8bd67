"""Names of Gluon that Triton 3.6 and 3.9 spell differently."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

OLD = not hasattr(tma, "async_load")
async_load = tma.async_copy_global_to_shared if OLD else tma.async_load
async_store = tma.async_copy_shared_to_global if OLD else tma.async_store

# What 3.6 has not at all: a kernel that needs one of them falls to the portable one there.
HAS_REDUCTIONS = hasattr(tma, "async_atomic_add")
HAS_INLINE_ASM = hasattr(gl, "inline_asm")
