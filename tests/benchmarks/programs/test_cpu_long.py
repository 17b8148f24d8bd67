"""Long sequences on a CPU: what a run leaves, and when its targets are missed."""

import json

import pytest

from pytransformer.benchmarks.programs import cpu_long


def result_of(speedup: float, growth: float) -> dict:
    rows = [
        {"variant": name, "seqlen": seqlen, "backward": backward, "seconds": [seconds] * 3, "extra_bytes": extra}
        for backward in (False, True)
        for name, seqlen, seconds, extra in (
            (cpu_long.DENSE, cpu_long.JUDGED, speedup, 2**26),
            (cpu_long.LINEAR, cpu_long.JUDGED, 1.0, 2**26),
            (cpu_long.LINEAR, 2 * cpu_long.JUDGED, 2.0, round(growth * 2**26)),
        )
    ]
    return {"rows": rows, "threads": 1}


@pytest.mark.parametrize(("speedup", "growth", "code"), [(11.0, 2.0, 0), (9.0, 2.0, 1), (11.0, 2.2, 1)])
def test_targets(speedup, growth, code, capsys):
    assert cpu_long.judge(result_of(speedup, growth)) == code
    assert ("MISSED" in capsys.readouterr().out) == bool(code)


def test_a_short_run_and_its_picture(monkeypatch, tmp_path):
    pytest.importorskip("transformers", reason="the result names its version")
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "long.json", tmp_path / "long.png"
    for more in (["--lengths", "96,192", "--rounds", "1"], ["--plot", str(picture)]):
        monkeypatch.setattr("sys.argv", ["cpu_long", "--out", str(out), *more])
        assert cpu_long.main() == 0
    names = {row["variant"] for row in json.loads(out.read_text())["rows"]}
    assert names == {variant.name for variant in cpu_long.VARIANTS}
    assert picture.stat().st_size > 0
