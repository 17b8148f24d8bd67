"""The sums of the norms' gradients over programs: who adds them, in which order, what it costs, and what the next launch finds."""

from __future__ import annotations

import pytest
import torch

from pytransformer.kernels import counters
from pytransformer.kernels.launch import DeviceLimits
from pytransformer.kernels.norm import backward, partials
from pytransformer.kernels.norm.forward import NormConfig
from pytransformer.triton_interpreter import KernelFault, program_order
from tests.conftest import INTERPRETING
from tests.support.broken_kernel import load_broken
from tests.support.launchers import norm_backward, norm_backward_by

INTERPRETED = pytest.mark.skipif(
    not INTERPRETING, reason="orders of programs, and faulty kernels, in the interpreter only"
)
# A row a program, seven programs: groups of three, three and one.
PROGRAMS = 7
TILE = NormConfig(1, 32, 4, programs_per_sm=1, num_stages=2)
BLOCKS = NormConfig(1, 16, 4, programs_per_sm=2, num_stages=2)


def with_programs(monkeypatch, programs: int, module=backward) -> None:
    monkeypatch.setattr(module, "device_limits", lambda device: DeviceLimits(90, programs, 232448))
    monkeypatch.setattr(partials, "_ONE_GROUP", 2)
    monkeypatch.setattr(counters, "_kept", {})


def gradients(device, launch=norm_backward, config: NormConfig = TILE, rows: int = PROGRAMS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    dy, s = (torch.randn(rows, 24, generator=generator).to(device) for _ in range(2))
    weight, mean, rstd = (torch.ones(size, device=device) for size in (24, rows, rows))
    return list(launch(dy, None, s, weight, mean, rstd, dbias_dtype=torch.float32, config=config))


def same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(actual, expected))


@INTERPRETED
@pytest.mark.parametrize(
    ("programs", "config"),
    [(1, TILE), (2, TILE), (PROGRAMS, TILE), (PROGRAMS, BLOCKS)],
    ids=["1", "2", "7", "7 in blocks"],
)
def test_order_of_programs_does_not_change_a_bit(programs, config, monkeypatch, device, poison_empty):
    with_programs(monkeypatch, programs)
    expected = gradients(device, config=config)
    with program_order(1):
        assert same(gradients(device, config=config), expected)
    assert counters._kept and not any(bool(kept.any()) for kept in counters._kept.values())


class Recorder:
    """Takes the place of a prepared launch, and notes what it was made and called with."""

    def __init__(self, kernel, grid, *arguments) -> None:
        self._name = kernel.__name__

    def __call__(self, pointers) -> None:
        self.launches.append((self._name, sum(0 if tensor is None else tensor.nbytes for tensor in pointers[11:13])))


def test_groups_of_programs():
    """Up to 16 programs are one group; of more, no program reads more than twice their root, and each is in a group."""
    for programs in (1, 2, 16, 17, 66, 132, 264, 660):
        group = partials.merge_group(programs)
        groups = -(-programs // group)
        assert partials.count_counters(programs, 4) == 4 * (groups + 1)
        assert groups == 1 if programs <= 16 else group + groups <= 2 * programs**0.5 + 2


@pytest.mark.parametrize(
    ("cols", "kernels", "most"), [(4096, 1, 2.2e6), (128, 1, 0.4e6), (8192, 1, 4.4e6), (65536, 2, 4.4e6)]
)
def test_launches_and_bytes_of_partial_sums(cols, kernels, most, monkeypatch):
    """RMSNorm of more rows than 132 SMs take at once."""
    rows = 2**23 // cols
    monkeypatch.setattr(backward, "PreparedLaunch", Recorder)
    monkeypatch.setattr(Recorder, "launches", [], raising=False)
    x = torch.empty(rows, cols, dtype=torch.bfloat16)
    norm_backward(x, None, x, x[0], None, torch.empty(rows))
    names, scratch = zip(*Recorder.launches)
    assert names == ("norm_row_sums_kernel", "norm_backward_kernel")[-kernels:]
    assert 0 < scratch[-1] <= most


FAULTS = {
    "counter not reset": ("tl.atomic_xchg(counter_ptr, 0,", "tl.atomic_xchg(counter_ptr, 1,"),
    "added before all have arrived": ("== number - 1", "== number - 2"),
    "nobody adds": ("== number - 1", "== number"),
    "release forgotten": ('counter_ptr, 1, sem="acq_rel"', 'counter_ptr, 1, sem="acquire"'),
    "acquire forgotten": ('counter_ptr, 1, sem="acq_rel"', 'counter_ptr, 1, sem="release"'),
    "added in another order": ("(first_row + places * step)", "(first_row + (number - 1 - places) * step)"),
    "a group's last row left out": ("merge_group)\n    if _is_last", "merge_group) - 1\n    if _is_last"),
    "a group's sum at the program's place": ("dweight_partial_ptr, first, dweight,", "dweight_partial_ptr, program, dweight,"),
    "groups one row apart": ("dbias_partial_ptr, 0, merge_group,", "dbias_partial_ptr, 0, 1,"),
}  # fmt: skip


@INTERPRETED
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault, tmp_path, monkeypatch, device):
    """By a race, or by bits that differ, in the first call or the second."""
    with_programs(monkeypatch, PROGRAMS)
    expected = gradients(device)
    broken = load_broken(tmp_path, "norm/backward")
    broken.merge_partials = load_broken(tmp_path, "norm/partials", FAULTS[fault]).merge_partials
    with_programs(monkeypatch, PROGRAMS, broken)
    caught = None
    for _ in range(2):
        try:
            if not same(gradients(device, norm_backward_by(broken)), expected):
                caught = caught or "other bits"
        except KernelFault as error:
            caught = caught or type(error).__name__
    assert caught is not None
    print(f"caught: {fault} ({caught})")
