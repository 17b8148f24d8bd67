"""layer_norm and rms_norm with backend "cuda": the tests that every backend passes, in the process that has the extension.

On a GPU tests/ops/test_norm.py itself has "cuda" among its backends, and nothing is repeated here.
"""

from __future__ import annotations

import os

if "PYTRANSFORMER_CUDA_LIBRARY" in os.environ:
    from tests.ops.test_norm import *  # noqa: F403
