"""Sinusoidal positions of the naive transformer against their formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from pytransformer.reference import sinusoidal_positions


def test_sinusoidal_values():
    table = sinusoidal_positions(50, 6)
    assert table.shape == (50, 6) and table.dtype == torch.float32
    for position in (0, 1, 49):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-7)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-7)
    assert torch.equal(sinusoidal_positions(50, 5)[:, :4].isfinite().all(), torch.tensor(True))


@pytest.mark.parametrize("shift", [1, 7])
def test_a_shift_of_positions_is_one_linear_map(shift):
    """PE(pos + k) = M(k) PE(pos) at every position, M(k) being the rotation of each pair by k times its frequency."""
    table = sinusoidal_positions(200, 16)
    frequencies = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    sin, cos = (shift * frequencies).sin(), (shift * frequencies).cos()
    rotations = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)  # of (sin, cos) pairs
    linear_map = torch.block_diag(*rotations)
    assert_close((table.double() @ linear_map.T)[:-shift].float(), table[shift:])
