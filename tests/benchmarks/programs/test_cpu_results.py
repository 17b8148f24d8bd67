"""The CPU comparisons' result files: what a run leaves, and that the next run replaces it."""

import json

import pytest
import torch

from pytransformer import TransformerConfig
from pytransformer.benchmarks.programs import cpu_chat, cpu_decode, cpu_generate, cpu_training


def run_with(module, monkeypatch, path, seconds):
    """main() with everything that takes time replaced; the names of the variants are real."""
    samples = {
        "pytransformer": [seconds] * 3,
        "transformers, static cache": [2 * seconds] * 3,
        "transformers, dynamic cache": [3 * seconds] * 3,
        "weights only, F.linear": [seconds] * 3,
    }
    if module is cpu_decode:
        monkeypatch.setattr(module.models, "transformers_model", lambda config: torch.nn.Identity())
        monkeypatch.setattr(module.models, "from_transformers", lambda theirs, config: None)
        monkeypatch.setattr(module, "check_same_tokens", lambda ours, theirs, prompt: 24)
        monkeypatch.setattr(module, "chains", lambda model: {})
        monkeypatch.setattr(module, "measure", lambda variants, rounds, tokens: samples)
    else:
        trainers = {"pytransformer": type("Trainer", (), {"parameters": 7})}
        monkeypatch.setattr(module, "make_trainers", lambda: trainers)
        monkeypatch.setattr(module, "measure", lambda trainers, rounds: (samples, {key: [3.0, 2.0] for key in samples}))
        monkeypatch.setattr(module, "check_same_losses", lambda losses: None)
    monkeypatch.setattr("sys.argv", [module.__name__, "--out", str(path)])
    return module.main()


@pytest.mark.parametrize("module", [cpu_decode, cpu_training], ids=["decode", "training"])
def test_a_run_replaces_the_result_of_the_one_before(module, monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers", reason="these comparisons are with transformers")
    path = tmp_path / "new" / "result.json"
    for seconds in (1.0, 0.5):
        assert run_with(module, monkeypatch, path, seconds) == 0
    result = json.loads(path.read_text())
    rates = {row["variant"]: row["tokens_per_second"] for row in result["rows"]}
    assert len(rates) == len(result["rows"]) == 4
    assert rates["pytransformer"] == pytest.approx(2 * rates["transformers, static cache"])
    assert result["speedup_over_transformers"] == pytest.approx(2.0)
    assert result["environment"]["torch"]
    assert "2.00 × transformers" in capsys.readouterr().out


def test_turns_of_a_tiny_model_are_measured_from_a_kept_cache(monkeypatch, tmp_path):
    pytest.importorskip("transformers", reason="the result names its version")
    tiny = TransformerConfig(vocab_size=61, hidden_size=32, num_layers=2, num_heads=2, max_seqlen=64)
    monkeypatch.setattr(TransformerConfig, "gpt2", lambda: tiny)
    for name, value in (("BEFORE", 20), ("NEW", 3), ("LEAST_SPEEDUP", 0.0)):
        monkeypatch.setattr(cpu_chat, name, value)
    monkeypatch.setattr(
        "sys.argv", ["cpu_chat", "--rounds", "2", "--tokens", "2", "--out", str(tmp_path / "chat.json")]
    )
    assert cpu_chat.main() == 0
    result = json.loads((tmp_path / "chat.json").read_text())
    rows = {row["variant"]: row for row in result["rows"]}
    assert list(rows) == [
        "turn, kept cache", "turn, anew", "prefill, float32", "prefill, bfloat16", "decode, float32", "decode, float32, plain weights",
        "decode, bfloat16", "decode, bfloat16, plain weights",
    ]  # fmt: skip
    assert all(row["tokens_per_second"] > 0 for row in rows.values()) and len(rows["turn, anew"]["turns"]) == 2


def test_generate_tells_both_batches_and_the_prefill_apart(monkeypatch, tmp_path):
    """A target that is missed is the exit status, whichever it is; what could not run is named."""
    pytest.importorskip("transformers", reason="these comparisons are with transformers")
    rows = {"transformers, static cache": [2.0], "transformers, dynamic cache": [3.0], "weights only, F.linear": [0.99]}

    def run(ours, long_prompt):
        def measure(variants, rounds, tokens):
            assert "transformers, dynamic cache" in variants
            return {"pytransformer": [ours if tokens > 1 else long_prompt], **rows}

        monkeypatch.setattr(cpu_generate, "measure", measure)
        return cpu_generate.main()

    monkeypatch.setattr(cpu_generate.models, "transformers_model", lambda config: torch.nn.Identity())
    monkeypatch.setattr(
        cpu_generate.models, "from_transformers", lambda theirs, config: cpu_generate.Transformer(config, device="meta")
    )
    monkeypatch.setattr(cpu_generate, "check_same_tokens", lambda ours, theirs, prompt: 24)
    monkeypatch.setattr(cpu_generate, "chains", lambda model: {})
    monkeypatch.setattr(cpu_generate, "works", lambda result, name, run, count: True)
    monkeypatch.setattr(cpu_generate, "ctranslate2_variant", lambda result, theirs, prompt, folder: {})
    path = tmp_path / "generate.json"
    monkeypatch.setattr("sys.argv", ["cpu_generate", "--out", str(path)])
    assert run(1.0, 1.0) == 0
    assert run(1.0, 1.9) == 1  # the prefill
    assert run(1.2, 1.0) == 1  # batch 1
    result = json.loads(path.read_text())
    assert result["prefill_speedup"] == pytest.approx(2.0) and result["speedup_at_batch_8"] == pytest.approx(
        2 / 1.2, rel=1e-5
    )
    assert [(row["part"], row["batch"]) for row in result["rows"][::4]] == [
        ("decode", 1),
        ("decode", 8),
        ("prefill", 1),
    ]
