"""The decode step as a graph, without a GPU: replayed with every number of the host as it was when it was recorded.

What changes from step to step and does not come from a tensor that stays in its place is thereby found: the logits are wrong then.
"""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import Tensor

import pytransformer
from pytransformer.generation import bound, generate, graphs
from pytransformer.generation.caches import SequenceCache
from tests.model.configs import CONFIGS, EXPERT_CONFIGS, FAMILY_CONFIGS, make_model, random_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*the reference.*:RuntimeWarning")
CPU = torch.device("cpu")
RECORDED = ("gpt2", "llama-qk-norm-head-dim", "mistral-window", "gemma", "alibi-window-geglu")
KINDS = ("contiguous", "paged", "paged-int8")
# Attributes of a cache that are no tensors: a replay sees them as they were.
HOST_STATE = ("max_length", "is_direct", "_host_lengths", "_expected", "_reserved", "_ended", "_attended")


class FrozenHost:
    """Stands for the recorder: a replay runs the step again, but the host's numbers and the addresses are those of the recording."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, step):
        self.recordings += 1
        step()  # as before a recording, so that kernels are loaded
        cache: SequenceCache = step.__self__._cache
        frozen = {name: getattr(cache, name) for name in HOST_STATE if hasattr(cache, name)}
        frozen = {name: list(value) if isinstance(value, list) else value for name, value in frozen.items()}
        tensors = self.tensors(step, cache)
        addresses = [tensor.data_ptr() for tensor in tensors]

        def replay() -> Tensor:
            self.replays += 1
            assert [tensor.data_ptr() for tensor in self.tensors(step, cache)] == addresses
            now = {name: getattr(cache, name) for name in frozen}
            vars(cache).update(frozen)
            try:
                return step()
            finally:
                vars(cache).update(now)

        return replay

    @staticmethod
    def tensors(step, cache: SequenceCache) -> list[Tensor]:
        tables = [group.table for group in getattr(cache, "groups", [])]
        return [step.__self__._tokens, cache.lengths, cache.layer(0).k_cache, *tables]


@pytest.fixture
def recorder(monkeypatch) -> FrozenHost:
    """Recording is possible here, by the frozen host; and the step goes through the modules, as on a GPU."""
    found = FrozenHost()
    monkeypatch.setattr(graphs, "record", found)
    monkeypatch.setattr(graphs, "why_not_recorded", graphs.why_step_varies)
    monkeypatch.setattr(bound, "why_not_bound", lambda model: "as on a GPU")
    return found


def all_logits(model, prompts, kind: str, **options) -> Tensor:
    found: list[Tensor] = []
    generate(model, prompts, 12, cache=kind, callback=lambda step: found.append(step.logits), **options)
    return torch.stack(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RECORDED)
def test_a_replayed_step_gives_the_same_bits(name, kind, recorder):
    """Prompts of several lengths, one of which ends early; pages are handed out on the way."""
    model = make_model(CONFIGS[name], 0, CPU)
    prompts = [random_ids(model.config, (length,), length, CPU) for length in (9, 3, 6)]
    plain = generate(model, prompts, 12, cuda_graph=False)
    start = plain.prompt_lengths[0]
    options = {"eos_token_id": int(plain.token_ids[0][start + 4])}
    expected = all_logits(model, prompts, kind, cuda_graph=False, **options)
    assert recorder.recordings == 0
    actual = all_logits(model, prompts, kind, **options)
    assert torch.equal(actual, expected)
    assert recorder.recordings == 1 and recorder.replays == len(actual) - 1


@pytest.mark.parametrize("name", ["falcon-alibi", "t5-positions-decoder", "longrope", "mixtral", "bart"])
def test_steps_that_depend_on_the_hosts_numbers_are_not_recorded(name, recorder):
    model = make_model({**FAMILY_CONFIGS, **EXPERT_CONFIGS}[name], 0, CPU)
    assert graphs.why_step_varies(model)
    with pytest.raises(ValueError, match="cuda_graph=True asks for a CUDA graph of the decode step, but"):
        generate(model, random_ids(model.config, (1, 4), 0, CPU), 12, cuda_graph=True)
    generate(model, random_ids(model.config, (1, 4), 0, CPU), 10)
    assert recorder.recordings == 0


def test_the_frozen_host_sees_a_step_that_reads_its_numbers(recorder, monkeypatch):
    """T5's bias counts places on the host: recorded nevertheless, its logits are wrong, or do not fit."""
    model = make_model(FAMILY_CONFIGS["t5-positions-decoder"], 0, CPU)
    ids = random_ids(model.config, (1, 4), 0, CPU)
    expected = all_logits(model, ids, "contiguous", cuda_graph=False)
    monkeypatch.setattr(graphs, "why_not_recorded", lambda model: None)
    try:
        actual = all_logits(model, ids, "contiguous")
    except (ValueError, RuntimeError):
        return
    assert not torch.allclose(actual, expected)


def test_a_recording_that_fails_is_an_error_only_where_it_was_asked_for(recorder, monkeypatch):
    def fail(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    model = make_model(CONFIGS["gpt2"], 0, CPU)
    ids = random_ids(model.config, (2, 4), 0, CPU)
    expected = all_logits(model, ids, "paged", cuda_graph=False)
    monkeypatch.setattr(graphs, "record", fail)
    with pytest.warns(RuntimeWarning, match="could not be recorded as a CUDA graph .*: operation not permitted"):
        assert torch.equal(all_logits(model, ids, "paged"), expected)
    with pytest.raises(RuntimeError, match="operation not permitted"):
        generate(model, ids, 12, cuda_graph=True)


def test_where_it_cannot_be_the_reason_is_told():
    model = make_model(CONFIGS["gpt2"], 0, CPU)
    ids = random_ids(model.config, (1, 4), 0, CPU)
    assert graphs.why_not_recorded(model) == "the model is on cpu, and CUDA graphs are for CUDA devices"
    with pytest.raises(ValueError, match="but the model is on cpu, and CUDA graphs are for CUDA devices"):
        generate(model, ids, 4, cuda_graph=True)
    with pytest.raises(ValueError, match="but use_cache=False computes whole sequences"):
        generate(model, ids, 4, cuda_graph=True, use_cache=False)
    with pytest.raises(TypeError, match=r"cuda_graph must be True, False or None \(where it can be\), got 1"):
        generate(model, ids, 4, cuda_graph=1)
    handle = model.model.layers[0].register_forward_hook(lambda *arguments: None)
    assert graphs.why_step_varies(model) == "a forward hook is set on a Block, which a replay would not call"
    handle.remove()


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("cuda_graph", [None, False])
def test_the_host_reads_the_device_once_a_step(cuda_graph, kind, recorder, monkeypatch):
    """Whoever reads a tensor's values, outside of the ops (whose kernels do not): the chosen tokens and their faults, together."""
    reads: list[str] = []
    ops = pytransformer.__path__[0] + "/ops/"

    def counted(name: str):
        original = getattr(torch.Tensor, name)

        def read(self, *arguments, **options):
            frame = sys._getframe(1)
            while frame is not None and "/pytransformer/" not in frame.f_code.co_filename:
                frame = frame.f_back
            if frame is not None and ops not in frame.f_code.co_filename:
                reads.append(f"{name} in {frame.f_code.co_filename}:{frame.f_lineno}")
            return original(self, *arguments, **options)

        return read

    model = make_model(CONFIGS["llama"], 0, CPU)
    prompts = [random_ids(model.config, (length,), length, CPU) for length in (7, 4)]
    counts: list[int] = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    generate(model, prompts, 12, cache=kind, cuda_graph=cuda_graph, callback=lambda step: counts.append(len(reads)))
    assert [after - before for before, after in itertools.pairwise(counts[1:])] == [1] * 10, reads
