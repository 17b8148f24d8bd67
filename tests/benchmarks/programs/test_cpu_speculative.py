"""The comparison of speculative with plain decoding: what it counts, writes and refuses."""

import dataclasses
import json

import pytest
import torch

from pytransformer.benchmarks.programs import cpu, cpu_speculative
from pytransformer.generation import PromptLookup, generate
from tests.model.configs import CONFIGS, make_model, random_ids

CPU = torch.device("cpu")
DRAFT = PromptLookup(1, 3)


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIGS["llama"], 0, CPU)


@pytest.fixture(scope="module")
def prompts():
    return [random_ids(CONFIGS["llama"], (4,), seed, CPU) for seed in range(2)]


def test_both_sides_are_counted_and_written(model, prompts, tmp_path, capsys):
    result = {"rows": [], **cpu_speculative.check_same_tokens(model, prompts, DRAFT)}
    assert result["same_tokens"] == 2 * 20 and 0 < result["accepted"] <= result["drafted"]
    assert result["tokens_per_pass"] == 40 / (40 - result["accepted"])
    seconds = cpu_speculative.measure(model, prompts, DRAFT, 2)
    assert {name: [len(times) for times in rounds] for name, rounds in seconds.items()} == {
        cpu_speculative.PLAIN: [2, 2],
        cpu_speculative.SPECULATIVE: [2, 2],
    }
    for plain, code in ((3.0, 0), (1.0, 1)):
        given = {cpu_speculative.PLAIN: [[plain, plain]] * 3, cpu_speculative.SPECULATIVE: [[1.0, 1.0]] * 3}
        assert cpu_speculative.report(result, given) == code
        assert result["speedup_over_plain"] == plain
    cpu.write(tmp_path / "new" / "result.json", result)
    assert len(json.loads((tmp_path / "new" / "result.json").read_text())["rows"]) == 4
    assert "3.00 × plain decoding (target 1.5)" in capsys.readouterr().out


def test_other_tokens_are_no_result(model, prompts, monkeypatch):
    def wrong(model, prompt, count, draft=None, **options):
        found = generate(model, prompt, count, draft=draft, **options)
        return found if draft is None else dataclasses.replace(found, token_ids=found.token_ids + 1)

    monkeypatch.setattr(cpu_speculative, "generate", wrong)
    with pytest.raises(SystemExit, match="prompt 0 gets other tokens"):
        cpu_speculative.check_same_tokens(model, prompts, DRAFT)
