"""All 256 codes of the 8-bit caches, through every way that a decode kernel widens them: by the instruction's host twin, and by hand."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tests.support.emulator import build_program, builder

SOURCE = Path(__file__).with_name("codes.cu")


def test_every_code_has_the_bits_of_torch(tmp_path):
    try:
        program = build_program(SOURCE, "emulated", tmp_path, optimise="-O0")
    except builder().BuildError as error:
        pytest.skip(f"the emulator cannot be built here: {error}")
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    codes = torch.arange(256, dtype=torch.uint8)
    seen = set()
    for line in lines:
        name, *numbers = line.split()
        wide, narrow, way = name.split(":")
        expected = codes.view(getattr(torch, narrow)).float().to(getattr(torch, wide))
        actual = torch.tensor([int(number) for number in numbers]).to(torch.uint16).view(expected.dtype)
        is_nan = expected.isnan()
        assert torch.equal(actual.isnan(), is_nan), name
        # As bits, so that -0 is not 0.
        assert torch.equal(actual.view(torch.int16)[~is_nan], expected.view(torch.int16)[~is_nan]), name
        seen.add((wide, way))
    assert len(seen) == 6
