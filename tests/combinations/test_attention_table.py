"""docs/attention-options.md is what the committed findings say, and they promise what the project promises."""

from __future__ import annotations

import subprocess
import sys

from tests.combinations import record


def test_the_page_is_not_stale() -> None:
    result = subprocess.run(
        [sys.executable, record.ROOT / "tools/attention_table.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_no_option_is_left_to_the_reference() -> None:
    """Each level of each option is in some call that Triton served; the reference serves all of them alone."""
    for op in ("attention", "decode_attention"):
        findings = record.committed()[op]
        calls = findings["pairs"]["triton"].values()
        for name, levels in findings["share"]["triton"]["options"].items():
            served = {call["options"][name] for call in calls}
            assert served == set(levels), (op, name)
        for alone in findings["alone"]["reference"].values():
            assert set(alone.values()) == {"served"}
