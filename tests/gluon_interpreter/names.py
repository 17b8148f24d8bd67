"""Names of Gluon that Triton 3.6 and 3.9 spell differently, and marks of tests that need what 3.6 has not."""

from __future__ import annotations

import pytest
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

OLD = not hasattr(tma, "async_load")
async_load = tma.async_copy_global_to_shared if OLD else tma.async_load
async_store = tma.async_copy_shared_to_global if OLD else tma.async_store

needs_reductions = pytest.mark.skipif(not hasattr(tma, "async_atomic_add"), reason="this Triton's TMA does not reduce")
needs_inline_asm = pytest.mark.skipif(not hasattr(gl, "inline_asm"), reason="this Triton's Gluon has no inline_asm")
