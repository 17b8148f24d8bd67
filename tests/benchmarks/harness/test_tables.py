"""Tables: units, spread, ratios, reasons; and the sweeps that pictures find in shapes."""

import pytest

from pytransformer.benchmarks.harness import plots, tables
from tests.benchmarks.samples import attention_row, measurement, record_of, row


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.0, "2.00 s"), (0.0123, "12.3 ms"), (4.567e-6, "4.57 µs"), (1.5e-4, "150 µs"), (3e-8, "30.0 ns")],
)
def test_durations(seconds, text):
    assert tables.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(4.31e12, "4.31 TB/s"), (9.9e5, "990 kB/s"), (12.0, "12 B/s"), (1.2e15, "1200 TB/s")]
)
def test_amounts(value, text):
    assert tables.amount(value, "B/s") == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(23019.7, "23,020"), (0.014684, "0.01468"), (2.908, "2.908"), (0.0, "0"), (-1234567.0, "-1,235,000")],
)
def test_numbers(value, text):
    assert tables.number(value) == text


def test_a_row_as_cells():
    found = row("op", "8", 0.0, 4.3e6, {"cuda": [2e-6, 1e-6, 1.1e-6], "liger": [4e-6]}, notes={"liger": "two launches"})
    found["variants"]["liger"]["method"] = "events"
    ours, peer = tables.cells(found)
    assert ours == ["cuda", "1.10 µs ± 45.5 %", "91 %", "3.91 TB/s", "1.0e-03", "1.05 MB", "3.64× liger"]
    assert peer[:2] == ["liger (two launches)", "4.00 µs eager ± 0.0 %"]
    assert peer[-1] == ""


def test_arithmetic_is_shown_where_it_is_counted():
    assert tables.cells(attention_row(1024, {"cuda": 500.0}))[0][3] == "500 TFLOP/s"


def test_a_measurement_as_cells():
    found = measurement(
        "training", "GPT-2", "tokens/s", {"pytransformer": [90.0, 100.0, 110.0], "nanogpt": [50.0]}, True
    )
    assert tables.cells(found)[0] == ["pytransformer", "100.0 ± 10", "tokens/s", "2.00× nanogpt"]


def test_everything_is_shown(capsys):
    found = attention_row(1024, {"cuda": 624.0, "flex": 400.0})
    found["failed"], found["absent"] = {"triton": "RuntimeError: no"}, {"quack": "not for attention"}
    broken = row("rope_forward", "8", 0.0, 1.0, {}, failure="out of memory: 20 GiB")
    content = record_of([found, broken], [measurement("training", "GPT-2", "tokens/s", {"pytransformer": [1.0]}, True)])
    content["peers"] = [
        {"name": "liger", "distribution": "liger-kernel", "ops": ["rms_norm"], "absent": "not installed"}
    ]
    content["left_out"] = ["rope 9"]
    tables.show(content)
    shown = capsys.readouterr().out
    for text in (
        "Synthetic GPU; torch 2.13.0, triton 3.9.0, revision 0123456789ab",
        "copy 4.3 TB/s, read 4.4 TB/s, bf16 matmul 780 TFLOP/s; at the end of the run they differ by 0.4 %",
        "624 TFLOP/s",
        "1.56× flex",
        "no figures",
        "FAILED out of memory: 20 GiB [rope_forward 8]",
        "FAILED triton: RuntimeError: no [attention_forward causal B16 L1024 H32/8 d128 bf16]",
        "absent quack: not for attention [attention_forward]",
        "absent liger: not installed [rms_norm]",
        "left out for want of time: 1 rows",
    ):
        assert text in shown
    assert tables.SMOKE not in shown


def test_smoke_sizes_are_called_that(capsys):
    content = record_of([], device_type="cpu")
    content["options"]["grid"] = "tiny"
    tables.show(content)
    assert tables.SMOKE in capsys.readouterr().out


def found_sweeps(*shapes):
    rows = [row("op", shape, 1.0, 1.0 + index, {"cuda": [1.0]}) for index, shape in enumerate(shapes)]
    return [(sweep.along, sweep.title, [number for number, _ in sweep.points]) for sweep in plots.sweeps(rows)]


def test_batch_and_length_move_together():
    shapes = [f"causal B{16384 // length} L{length} H32/8 d128 bf16" for length in (1024, 512, 2048)]
    expected = [("sequence length", "causal H32/8 d128 bf16, 16384 tokens", [512, 1024, 2048])]
    assert found_sweeps(*shapes, "causal B1 L4096 H32/8 d128 bf16", shapes[0] + " sinks") == expected


def test_other_sweeps():
    assert found_sweeps(*(f"{2**20 // width}×{width} bf16" for width in (64, 128, 256))) == [
        ("width", "rows × width bf16", [64, 128, 256])
    ]
    assert found_sweeps(*(f"B8 kv{keys} H32 d128 bf16 contiguous" for keys in (1024, 4096, 32768))) == [
        ("keys", "B8 kv… H32 d128 bf16 contiguous", [1024, 4096, 32768])
    ]
    assert found_sweeps(*(f"B8 kv4096 H32 d128 bf16 pages of {size}" for size in (1, 16, 64))) == [
        ("page size", "B8 kv4096 H32 d128 bf16 pages of …", [1, 16, 64])
    ]
    assert found_sweeps(*(f"B1 kv64 H8 d{dim} bf16" for dim in (64, 128, 256))) == [], (
        "another head_dim is another kernel"
    )
