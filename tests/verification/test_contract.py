"""The rule that everything else is judged by must itself be able to fail."""

import math

import pytest
import torch

from pytransformer.verification import LIMITS, Contract, ContractError, limits_for

BF16 = torch.bfloat16


def results(scale: float, dtype: torch.dtype = BF16, seed: int = 0) -> dict[str, torch.Tensor]:
    """A golden result, a plain one that is off by rounding, and one that is off by ``scale`` times as much."""
    generator = torch.Generator().manual_seed(seed)
    golden = torch.randn(1000, dtype=torch.float64, generator=generator)
    plain = golden.to(dtype).double()
    return {"actual": golden + scale * (plain - golden), "plain": plain, "golden": golden}


@pytest.mark.parametrize(
    ("dtype", "kind", "scale", "passes"),
    [
        (BF16, "output", 1.0, True),
        (BF16, "output", 1.09, True),
        (BF16, "output", 1.2, False),  # the mean may be 1.1×
        (BF16, "gradient", 1.4, True),
        (BF16, "gradient", 1.6, False),
        (torch.float16, "output", 1.2, False),
        (torch.float32, "output", 2.9, True),
        (torch.float32, "output", 40.0, False),  # beyond 3× and the allowance of a few float32 roundings
    ],
)
def test_multiples_of_the_plain_error(dtype, kind, scale, passes):
    contract = Contract(dtype)
    for seed in range(8):
        contract.add("out", **results(scale, dtype, seed), kind=kind)
    assert (contract.ratio <= 1) is passes
    if passes:
        contract.check()
    else:
        with pytest.raises(ContractError, match="out: max error"):
            contract.check()


def test_one_large_error_is_seen_among_many_small_ones():
    values = results(1.0)
    values["actual"][17] += 2.5 * (values["plain"] - values["golden"]).abs().max()
    contract = Contract(BF16)
    contract.add("out", **values)
    assert contract.ratio > 1


def test_a_small_bias_of_every_value_is_seen():
    """No value is off by much, but all are off: only the rule for the mean sees it."""
    values = results(0.0)
    values["actual"] = values["golden"] + 1.5 * (values["plain"] - values["golden"]).abs().mean()
    contract = Contract(BF16)
    contract.add("out", **values)
    maximum, mean = contract.results["out"].ratios()
    assert maximum < 1 < mean


def test_nothing_absolute_is_allowed():
    """Gradients of 1e-9 are judged like gradients of 1."""
    values = {name: 1e-9 * value for name, value in results(3.0).items()}
    contract = Contract(BF16)
    contract.add("dq", **values, kind="gradient")
    assert contract.ratio > 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_fail(bad):
    values = results(1.0)
    values["actual"][3] = bad
    contract = Contract(BF16)
    contract.add("out", **values)
    assert contract.ratio == math.inf
    with pytest.raises(ContractError, match="1 values are NaN or infinite"):
        contract.check()


def test_infinities_must_be_met():
    values = results(1.0)
    for value in values.values():
        value[5] = -math.inf
    contract = Contract(BF16)
    contract.add("lse", **values)
    contract.check()
    values["actual"][5] = -1e30
    contract.add("lse", **values)
    with pytest.raises(ContractError, match="infinity"):
        contract.check()


def test_shapes_must_agree():
    values = results(1.0)
    values["actual"] = values["actual"][:-1]
    contract = Contract(BF16)
    contract.add("out", **values)
    with pytest.raises(ContractError, match="shapes differ"):
        contract.check()


def test_comparing_nothing_is_not_passing():
    with pytest.raises(ContractError, match="nothing was compared"):
        Contract(BF16).check()
    with pytest.raises(ContractError, match="nothing was compared"):
        _ = Contract(BF16).ratio


def test_golden_must_be_float64():
    values = results(1.0)
    values["golden"] = values["golden"].float()
    with pytest.raises(TypeError, match="golden must be float64"):
        Contract(BF16).add("out", **values)


def test_limits_are_those_of_the_documentation():
    assert (limits_for(BF16, "output").maximum, limits_for(BF16, "output").mean) == (2.0, 1.1)
    assert (limits_for(torch.float16, "gradient").maximum, limits_for(torch.float16, "gradient").mean) == (3.0, 1.5)
    assert limits_for(torch.float32, "output") == LIMITS["float32", "gradient"]
    assert (limits_for(torch.float32, "output").maximum, limits_for(torch.float32, "output").mean) == (4.0, 3.0)
