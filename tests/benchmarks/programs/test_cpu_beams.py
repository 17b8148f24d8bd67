"""The comparison of beam searches on a CPU, with a tiny model."""

import json

import pytest
import torch

from pytransformer import TransformerConfig
from pytransformer.benchmarks.programs import cpu_beams


def test_a_run_compares_equal_searches(monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers", reason="the comparison is with transformers")
    tiny = TransformerConfig.gpt2(vocab_size=67, hidden_size=32, num_layers=2, num_heads=4, max_seqlen=140)
    monkeypatch.setattr(TransformerConfig, "gpt2", lambda: tiny)
    monkeypatch.setattr(
        "sys.argv", ["cpu_beams", "--rounds", "2", "--tokens", "5", "--out", str(tmp_path / "beams.json")]
    )
    assert cpu_beams.main() in (0, 1)  # of so tiny a model the speed says nothing
    result = json.loads((tmp_path / "beams.json").read_text())
    assert [row["variant"] for row in result["rows"]] == ["pytransformer", "transformers, dynamic cache"]
    assert result["speedup_over_transformers"] > 0 and "× transformers" in capsys.readouterr().out


def test_different_tokens_are_no_result():
    with pytest.raises(SystemExit, match="one and other disagree"):
        cpu_beams.measure({"one": lambda: torch.tensor([[1]]), "other": lambda: torch.tensor([[2]])}, 1)
