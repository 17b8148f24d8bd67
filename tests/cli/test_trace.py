"""`pytransformer trace`: the Hopper kernel's timeline as a picture and as text."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from pytransformer.cli.main import main
from pytransformer.cli.trace import attention_traces, timeline_of
from pytransformer.gluon_interpreter import EARLY
from pytransformer.gluon_interpreter.timeline import TENSOR_CORES
from tests.conftest import INTERPRETING
from tests.gluon_interpreter.names import needs_reductions

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="the Gluon interpreter runs only where Triton's does")
SMALL = ("--head-dim", "64", "--seqlen", "200")


def test_a_picture_and_text_of_the_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "timeline.png"
    assert main(["trace", "attention", *SMALL, "--causal", "--text", "-o", str(output)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == str(output)
    assert struct.unpack(">II", output.read_bytes()[16:24]) == (1600, 900)
    text = "\n".join(shown)
    assert "head_dim 64, the last block of a sequence of 200, causal" in shown[0]
    assert re.search(r"^consumer 1 .*s", text, re.MULTILINE) and re.search(r"^tensor cores .*k0", text, re.MULTILINE)
    assert re.search(
        r"consumer 0 at forward\.py:\d+ for \S*full\[0\] \(phase 0\): the copy of .* \(forward\.py:\d+\)", text
    )
    assert "a model of order, not of time" in text.lower()
    assert max(map(len, shown[:12])) <= 160


def test_steps_in_another_schedule_as_text_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["trace", "attention", *SMALL, "--text", "--clock", "steps", "--schedule", "late"]) == 0
    assert "steps of the interpreter" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_parts_of_a_stage_are_that_stage() -> None:
    """At head_dim 96 each product with k is one of 64 features and one of 32."""
    picture = timeline_of(attention_traces("forward", 96, 300, False, EARLY), "model")
    products = [span for span in picture.spans if span.kind == "product"]
    assert {span.tile for span in products} == {f"{name}{number}" for name in "kv" for number in range(3)}
    held = {span.lane for span in picture.spans if span.kind == "held"}
    assert held == {span.lane for span in picture.spans if span.kind == "load"}


@needs_reductions
def test_the_backward_pass_has_five_products_for_a_tile() -> None:
    (trace,) = attention_traces("backward", 64, 128, False, EARLY)
    picture = timeline_of([trace], "model")
    assert picture.tasks == ("producer", "consumer")
    products = [span for span in picture.spans if span.lane == TENSOR_CORES]
    assert len(products) == 5 * 2  # two tiles of 64 queries
    assert sum(span.end - span.begin for span in products) == 5 * 2 * 64 * 128 * 128 / 4096
    for causal in (False, True):  # the block that all queries see is drawn
        longest = timeline_of(attention_traces("backward", 64, 256, causal, EARLY), "model")
        assert sum(span.kind == "product" for span in longest.spans) == 5 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--head-dim", "80"], "--head-dim of the forward pass must be one of 64, 96, 128, 192, 256, got 80"),
        (["--of", "backward", "--head-dim", "256"], "--head-dim of the backward pass must be one of 64, 128, got 256"),
        (["--seqlen", "0"], "--seqlen must be from 1 to 4096, got 0"),
        (["--seqlen", "5000"], "--seqlen must be from 1 to 4096, got 5000"),
        ([*SMALL, "-o", "timeline.xyz"], "not supported"),
    ],
)
def test_a_wrong_option_is_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "attention", *options]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_a_schedule_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["trace", "attention", "--schedule", "lazy"])
    assert "argument --schedule: invalid choice: 'lazy'" in capsys.readouterr().err
