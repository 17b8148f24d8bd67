"""README's numbers and pictures come from results; what is stale is found out. The results here are made up and stay in tmp_path."""

import importlib.util
import json
from pathlib import Path

import pytest

from pytransformer.benchmarks.harness import record
from tests.benchmarks.samples import attention_row, measurement, record_of, row

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """tools/readme_numbers.py, working on a page of its own."""
    spec = importlib.util.spec_from_file_location("readme_numbers", ROOT / "tools/readme_numbers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, path in (("ROOT", tmp_path), ("RESULTS", tmp_path / "results"), ("IMAGES", tmp_path / "docs/img")):
        monkeypatch.setattr(module, name, path)
    (tmp_path / "README.md").write_text(f"head\n{module.BEGIN}\nold\n{module.END}\ntail\n")
    return module


def page(tool):
    return (tool.ROOT / "README.md").read_text()


def put(tool, name, **changes):
    rows = [attention_row(length, {"cuda": 624.0, "triton": 400.0, "flex": 390.0}) for length in (1024, 2048, 4096)]
    rows.append(row("rope_forward", "9 tokens", 0.0, 4.3e6, {"triton": [2e-6]}, priority=1))
    rows.append(row("kv_append", "8", 0.0, 4.3e6, {}, failure="out of memory"))
    rates = [measurement("training", "GPT-2", "tokens/s", {"pytransformer": [600000.0], "nanogpt": [500000.0]}, True)]
    record.save(tool.RESULTS / "gpu" / name, record_of(rows, rates, **changes))


def test_without_a_result_the_page_says_so(tool):
    assert tool.main(["--check"]) == 1
    assert tool.main([]) == 0
    assert "**On a GPU**: no result has been measured yet" in page(tool)
    assert page(tool).startswith("head\n") and page(tool).endswith("tail\n")
    assert tool.main(["--check"]) == 0
    assert not tool.IMAGES.exists()


def test_a_result_becomes_tables_and_pictures(tool):
    (tool.RESULTS / "gpu").mkdir(parents=True)
    put(tool, "a.json", time="2026-01-01T00:00:00Z", revision="older")
    put(tool, "b.json", time="2026-02-01T00:00:00Z", revision="newer")
    assert tool.main(["--check"]) == 1
    assert not tool.IMAGES.exists(), "--check writes nothing"
    assert tool.main([]) == 0
    text = page(tool)
    assert "revision newer" in text and "older" not in text
    assert "| attention forward | causal B16 L1024 H32/8 d128 bf16 | cuda | 220 µs | 80 % | flex | 1.60× |" in text
    assert "| training | GPT-2 | pytransformer | 600,000 | tokens/s | nanogpt | 1.20× |" in text
    assert "rope forward" not in text, "rows outside the quick grid are in the JSON"
    for picture in ("roofline", "peers", "attention_forward"):
        assert f"![gpu-synthetic-gpu-{picture}](docs/img/gpu-synthetic-gpu-{picture}.png)" in text
        assert (tool.IMAGES / f"gpu-synthetic-gpu-{picture}.png").exists()
    assert tool.main(["--check"]) == 0


def test_a_picture_of_another_result_is_stale(tool, capsys):
    (tool.RESULTS / "gpu").mkdir(parents=True)
    put(tool, "a.json")
    assert tool.main([]) == 0
    before = (tool.IMAGES / "sources.json").read_text()
    result = tool.RESULTS / "gpu/a.json"
    content = record.load(result)
    content["rows"][3]["variants"]["triton"]["samples"] = [3e-6]  # nothing that the tables show
    record.save(result, content)
    assert tool.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert tool.main([]) == 0
    assert (tool.IMAGES / "sources.json").read_text() != before
    (tool.IMAGES / "gpu-synthetic-gpu-peers.png").unlink()
    assert tool.main(["--check"]) == 1


def test_an_invalid_result_is_refused(tool):
    (tool.RESULTS / "gpu").mkdir(parents=True)
    content = record_of([attention_row(1024, {"cuda": 600.0})])
    del content["rows"][0]["floor_seconds"]
    (tool.RESULTS / "gpu/a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"a.json: not a valid result"):
        tool.main([])
