"""Every pair of decode_attention's options within the contract, and each option alone on every backend."""

from __future__ import annotations

import pytest
import torch

from tests.combinations import decode_rows as options
from tests.combinations import record
from tests.combinations.pairwise import Row, label, one_at_a_time, plain
from tests.conftest import INTERPRETING
from tests.kernels.decode_contract import small_configs

ROWS = options.rows()


@pytest.mark.parametrize("number", range(len(ROWS)))
@pytest.mark.usefixtures("without_overflow_checks", "poison_empty")
def test_pairs_of_options(number: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytransformer.kernels.decode_attention import launcher as decode_attention

    monkeypatch.setattr(decode_attention, "decode_configs", lambda dim, value_dim, *_: small_configs(dim, value_dim))
    # As in test_attention_pairs: a fault shows in every draw, and in the interpreter a second run shows nothing.
    options.contract_of(ROWS[number], "triton", device, repeated=not INTERPRETING, least=1).check()
    record.expect(
        "decode_attention", "pairs", "triton", f"{number:02d}", {"options": ROWS[number], "forward": "passed"}
    )


def test_share_of_pairs_that_are_executed() -> None:
    """All that are possible; at least 95 in a hundred of all, and the rest has its reason."""
    record.expect_share("decode_attention", options.FACTORS, options.RULES, ROWS)


@pytest.mark.parametrize("rule", options.RULES, ids=lambda rule: ", ".join(rule.levels))
def test_impossible_pairs_are_refused(rule, device: torch.device) -> None:
    """What no call can have, no call gets silently."""
    row = {**plain(options.FACTORS), **{factor: levels[0] for factor, levels in rule.levels.items()}}
    contiguous = options.inputs_of({**row, "layout": "contiguous"}, 0, device)
    paged = options.inputs_of({**row, "cache_batch_idx": "none"}, 0, device)
    paged.tensors["cache_batch_idx"] = contiguous.tensors["cache_batch_idx"]
    with pytest.raises(ValueError, match="cache_batch_idx is for contiguous caches"):
        options.run_op(row, paged, "reference")


@pytest.mark.parametrize("backend", record.BACKENDS)
@pytest.mark.parametrize(
    "row", [pytest.param(row, id=label(row, options.FACTORS)) for row in one_at_a_time(options.FACTORS)]
)
@pytest.mark.usefixtures("poison_empty")
def test_option_alone(row: Row, backend: str, device: torch.device) -> None:
    """Served within the contract, or refused with a reason, as docs/attention-options.md says."""
    forward = record.outcome(lambda: options.contract_of(row, backend, device).check())
    if device.type == "cpu":  # torch's own backend serves nothing on a GPU, where lengths cannot be read back
        record.expect("decode_attention", "alone", backend, label(row, options.FACTORS), {"forward": forward})
