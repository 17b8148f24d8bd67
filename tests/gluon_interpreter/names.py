"""Marks of tests that need what Triton 3.6's Gluon has not."""

from __future__ import annotations

import pytest

from pytransformer.kernels.hopper.names import HAS_INLINE_ASM, HAS_REDUCTIONS

needs_reductions = pytest.mark.skipif(not HAS_REDUCTIONS, reason="this Triton's TMA does not reduce")
needs_inline_asm = pytest.mark.skipif(not HAS_INLINE_ASM, reason="this Triton's Gluon has no inline_asm")
