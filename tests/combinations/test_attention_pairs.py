"""Every pair of attention's options within the contract, forward and backward, and each option alone on every backend."""

from __future__ import annotations

import pytest
import torch

from tests.combinations import attention_rows as options
from tests.combinations import record
from tests.combinations.pairwise import Row, label, one_at_a_time, plain
from tests.conftest import INTERPRETING
from tests.kernels.attention_contract import run_reference

ROWS = options.rows()


@pytest.mark.parametrize("number", range(len(ROWS)))
@pytest.mark.usefixtures("without_overflow_checks", "poison_empty", "small_tiles")
def test_pairs_of_options(number: int, device: torch.device) -> None:
    # An option that goes wrong in the company of another does so with every draw. The interpreter runs programs in one order and finds
    # races itself: to run them once more would show nothing.
    options.contract_of(ROWS[number], "triton", device, repeated=not INTERPRETING, least=1).check()
    record.expect(
        "attention", "pairs", "triton", f"{number:02d}", {"options": ROWS[number], "forward, backward": "passed"}
    )


def test_share_of_pairs_that_are_executed() -> None:
    """All that are possible; at least 95 in a hundred of all, and the rest has its reason."""
    record.expect_share("attention", options.FACTORS, options.RULES, ROWS)
    assert not any(rule.matches(row) for rule in options.RULES for row in ROWS)


@pytest.mark.parametrize("backend", record.BACKENDS)
@pytest.mark.parametrize(
    "row", [pytest.param(row, id=label(row, options.FACTORS)) for row in one_at_a_time(options.FACTORS)]
)
@pytest.mark.usefixtures("poison_empty")
def test_option_alone(row: Row, backend: str, device: torch.device) -> None:
    """Served within the contract, or refused with a reason, as docs/attention-options.md says."""
    backward = record.outcome(lambda: options.contract_of(row, backend, device, repeated=True).check())
    # Who gives gradients has given the results too.
    forward = backward
    if backward != "served":
        forward = record.outcome(
            lambda: options.contract_of(row, backend, device, gradients=False, repeated=True).check()
        )
    if device.type == "cpu":  # torch's own backend serves less on a GPU, where lengths cannot be read back
        record.expect(
            "attention", "alone", backend, label(row, options.FACTORS), {"forward": forward, "backward": backward}
        )


TERMS = ("visible", "softcap", "mask", "bias", "block_mask", "key_padding_mask", "alibi_slopes", "sinks", "dropout_p")


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=label(row, options.FACTORS))
        for row in one_at_a_time(options.FACTORS)
        if label(row, options.FACTORS).partition(":")[0] in TERMS
    ],
)
def test_option_is_more_than_a_name(row: Row, device: torch.device) -> None:
    """Each option changes the exact result: a kernel that ignored it would not pass."""
    given = options.inputs_of(row, 0, device)
    bare = options.inputs_of(plain(options.FACTORS), 0, device)
    bare.tensors.update({name: given.tensors[name] for name in ("q", "k", "v")})
    with_option, without = (run_reference(inputs, torch.float64)[0]["out"] for inputs in (given, bare))
    assert not torch.equal(with_option, without)
