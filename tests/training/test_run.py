"""Whole runs: what a folder holds afterwards, and resuming with exactly the losses of an unbroken run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pytransformer.model.checkpoint import load
from pytransformer.training import checkpoint as checkpoint_module
from pytransformer.training import metrics, plots
from pytransformer.training import run as run_module
from pytransformer.training.checkpoint import CheckpointStore
from pytransformer.training.data import prepare, validation_windows
from pytransformer.training.loss import evaluate
from pytransformer.training.progress import Quiet
from pytransformer.training.run import saved_baselines, saved_config, train
from tests.training.support import cli_options, tiny_config, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


class _Notes(Quiet):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def _curve(folder: Path) -> list[dict[str, object]]:
    """Everything recorded but the speed, which is never the same twice."""
    records = metrics.read(folder / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in records]


@pytest.fixture(scope="module")
def unbroken(corpus, cache, device, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    return train(tiny_config(corpus), folder, device=device, cache=cache)


def test_a_run_leaves_what_its_folder_promises(unbroken, corpus, cache, device):
    folder = unbroken.folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints", "config.json", "loss.png", "metrics.jsonl", "model.safetensors", "run.json", "tokenizer.json",
    ]  # fmt: skip
    assert unbroken.picture == folder / "loss.png" and unbroken.picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted((folder / "checkpoints").glob("step-*"))] == ["step-00000009", "step-00000012"]
    assert unbroken.checkpoint.name == "step-00000012"
    assert saved_config(folder) == tiny_config(corpus)
    assert saved_baselines(folder) == unbroken.baselines

    records = _curve(folder)
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 13))
    assert records[-1] == {"step": 12, "validation_loss": unbroken.validation_loss}
    # The saved model is the trained one: it has the loss that was recorded.
    model = load(unbroken.checkpoint, device=device)
    data = prepare(tiny_config(corpus).corpus, cache)
    windows = validation_windows(data.validation.tokens, 16, 64, 4)
    assert evaluate(model, windows, device=device) == pytest.approx(unbroken.validation_loss, rel=1e-6)
    for name, tensor in load(folder, device=device).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert model.config.eos_token_id == data.tokenizer.end_token_id


def test_the_same_run_gives_the_same_bits(unbroken, corpus, cache, device, tmp_path):
    train(tiny_config(corpus), tmp_path / "run", device=device, cache=cache)
    assert _curve(tmp_path / "run") == _curve(unbroken.folder)


def test_another_seed_gives_another_run(unbroken, corpus, cache, device, tmp_path):
    train(tiny_config(corpus, seed=1), tmp_path / "run", device=device, cache=cache)
    assert _curve(tmp_path / "run")[0] != _curve(unbroken.folder)[0]


class _Interrupted(Exception):
    pass


class _Interrupt(Quiet):
    """Stops the run in this process when ``step`` is shown."""

    def __init__(self, step: int) -> None:
        self.step = step

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        if step >= self.step:
            raise _Interrupted


@pytest.mark.parametrize("step, options", [(2, {}), (3, {}), (8, {}), (10, {}), (8, {"optimizer": "sgd"})], ids=str)
def test_an_interrupted_run_continues_with_the_same_bits(unbroken, corpus, cache, device, tmp_path, step, options):
    config = tiny_config(corpus, **options)
    expected = unbroken.folder
    if options:
        expected = train(config, tmp_path / "unbroken", device=device, cache=cache).folder
    with pytest.raises(_Interrupted):
        train(config, tmp_path / "run", device=device, cache=cache, progress=_Interrupt(step))
    notes = _Notes()
    result = train(config, tmp_path / "run", resume=True, device=device, cache=cache, progress=notes)
    assert _curve(tmp_path / "run") == _curve(expected)
    started = f"resuming after step {(step - 1) // 3 * 3}" if step > 3 else "starting from the beginning"
    assert any(started in note for note in notes.notes)
    assert result.validation_loss == _curve(expected)[-1]["validation_loss"]
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [CheckpointStore(folder / "checkpoints").latest() / name for folder in (tmp_path / "run", expected)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "options", [{"precision": "bf16"}, {"accumulation_steps": 2, "schedule": "wsd"}, {"optimizer": "adam"}]
)
def test_other_ways_to_train_resume_exactly_too(corpus, cache, device, tmp_path, options):
    config = tiny_config(corpus, **options)
    train(config, tmp_path / "unbroken", device=device, cache=cache)
    with pytest.raises(_Interrupted):
        train(config, tmp_path / "run", device=device, cache=cache, progress=_Interrupt(8))
    train(config, tmp_path / "run", resume=True, device=device, cache=cache)
    assert _curve(tmp_path / "run") == _curve(tmp_path / "unbroken")


def test_resuming_a_finished_run_changes_nothing(corpus, cache, device, tmp_path):
    config = tiny_config(corpus)
    first = train(config, tmp_path / "run", device=device, cache=cache)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train(config, tmp_path / "run", resume=True, device=device, cache=cache) == first
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


_CHILD = """
import sys, time
from pytransformer.cli.main import main
from pytransformer.training import checkpoint

saves = 0
def slow(stage):
    global saves
    saves += stage == "files written"
    if saves == 3 and stage == {stage!r}:
        print("reached", flush=True)
        time.sleep(600)

checkpoint.stages = slow
import torch
torch.set_num_threads(1)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("stage", ["files written", pytest.param("renamed", marks=pytest.mark.slow)])
def test_kill_minus_nine_in_the_middle_of_a_save(unbroken, corpus, cache, device, tmp_path, stage):
    """A real process, killed from outside while it writes its third checkpoint, loses nothing but the time."""
    command = [
        sys.executable,
        "-c",
        _CHILD.format(stage=stage),
        "train",
        "--out",
        str(tmp_path / "run"),
        "--cache",
        str(cache),
    ]
    command += ["--device", device.type, *cli_options(corpus)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "reached\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    latest = CheckpointStore(tmp_path / "run" / "checkpoints").latest()
    assert latest is not None and latest.name == "step-00000006"
    train(tiny_config(corpus), tmp_path / "run", resume=True, device=device, cache=cache)
    assert _curve(tmp_path / "run") == _curve(unbroken.folder)
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing-*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_at_random_moments(unbroken, corpus, cache, tmp_path):
    """The run is killed again and again, each time a little later, until it gets through."""
    config, folder = tiny_config(corpus), tmp_path / "run"
    for attempt in range(40):
        child = os.fork()
        if child == 0:
            try:
                train(config, folder, resume=True, device="cpu", cache=cache)
            finally:
                os._exit(0)
        deadline = time.monotonic() + 0.05 + 0.07 * attempt
        while (finished := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.005)
        if finished != (0, 0):
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        CheckpointStore(folder / "checkpoints").latest()  # what it points to is complete, or there is nothing
    else:
        pytest.fail("the run never got through")
    if not torch.cuda.is_available():
        assert _curve(folder) == _curve(unbroken.folder)


def test_a_folder_with_a_run_is_not_overwritten_by_accident(corpus, cache, device, tmp_path):
    config = tiny_config(corpus, steps=2)
    folder = tmp_path / "run"
    train(config, folder, device=device, cache=cache)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"already holds a run: continue it with --resume, or start anew with --overwrite"
    ):
        train(config, folder, device=device, cache=cache)
    with pytest.raises(ValueError, match="give one of them"):
        train(config, folder, resume=True, overwrite=True, device=device, cache=cache)
    train(tiny_config(corpus, steps=3), folder, overwrite=True, device=device, cache=cache)
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-00000003"]
    assert (folder / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"the run folder .*file is a file"):
        train(config, tmp_path / "file", device=device, cache=cache)


def test_resuming_with_another_configuration_lists_what_differs(unbroken, corpus, cache, device):
    config = tiny_config(corpus, steps=20, learning_rate=0.5, save_every=7, eval_every=100)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=3))
    before = (unbroken.folder / "run.json").read_bytes()
    with pytest.raises(ValueError) as error:
        train(config, unbroken.folder, resume=True, device=device, cache=cache)
    text = str(error.value)
    for part in (
        "num_layers: 2 in the checkpoint, 3 now",
        "steps: 12 in the checkpoint, 20 now",
        "learning_rate: 0.01 in the checkpoint, 0.5 now",
    ):
        assert part in text
    assert "save_every" not in text and "eval_every" not in text
    assert (unbroken.folder / "run.json").read_bytes() == before


def test_a_finished_run_names_the_way_to_more_steps(corpus, cache, device, tmp_path):
    config = tiny_config(corpus, steps=2)
    train(config, tmp_path / "run", device=device, cache=cache)
    notes = _Notes()
    train(config, tmp_path / "run", resume=True, device=device, cache=cache, progress=notes)
    assert any(
        "the run is complete: all of its 2 steps are done. More steps are a new run" in note for note in notes.notes
    )
    with pytest.raises(
        ValueError,
        match=r"steps: 2 in the checkpoint, 4 now.*or start a new run, in another folder with --out or in place",
    ):
        train(tiny_config(corpus, steps=4), tmp_path / "run", resume=True, device=device, cache=cache)


def test_a_model_of_others_is_not_written_over(corpus, cache, device, tmp_path):
    theirs = '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'
    (tmp_path / "config.json").write_text(theirs)
    for overwrite in (False, True):
        with pytest.raises(
            FileExistsError,
            match=r"holds a model of Hugging Face transformers \(model_type 'gpt2'\).*another folder with --out",
        ):
            train(tiny_config(corpus), tmp_path, overwrite=overwrite, device=device, cache=cache)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"] and (
        tmp_path / "config.json"
    ).read_text() == theirs


def test_resuming_with_other_text_is_refused(cache, device, tmp_path):
    corpus = write_corpus(tmp_path / "texts")
    config = tiny_config(corpus, steps=3)
    train(config, tmp_path / "run", device=device, cache=cache)
    (corpus / "file03.py").write_text("something else entirely\n" * 20)
    with pytest.raises(ValueError, match="the sources have changed since the run was started"):
        train(config, tmp_path / "run", resume=True, device=device, cache=cache)


def test_resuming_elsewhere_warns_about_the_last_bits(corpus, cache, device, tmp_path, monkeypatch):
    config = tiny_config(corpus, steps=3)
    train(config, tmp_path / "run", device=device, cache=cache)
    here = run_module.environment(device)
    monkeypatch.setattr(run_module, "environment", lambda device: {**here, "threads": 64})
    notes = _Notes()
    train(config, tmp_path / "run", resume=True, device=device, cache=cache, progress=notes)
    assert any("last bits of the losses may differ" in note and "64 now" in note for note in notes.notes)


def test_a_damaged_checkpoint_is_refused(corpus, cache, device, tmp_path):
    config = tiny_config(corpus, steps=3)
    result = train(config, tmp_path / "run", device=device, cache=cache)
    os.truncate(result.checkpoint / "model.safetensors", 100)
    with pytest.raises(ValueError, match=r"step-00000003 is damaged: model\.safetensors has 100 bytes instead of"):
        train(config, tmp_path / "run", resume=True, device=device, cache=cache)


def test_a_damaged_run_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no training run in"):
        saved_config(tmp_path)
    assert saved_baselines(tmp_path) is None
    for content in ({"config": {"corpus": {}, "model": {"colour": 1}, "training": {}}}, {}):
        (tmp_path / "run.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"run\.json is not a run configuration of this version"):
            saved_config(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [({"context_length": 100_000}, "validation text has .* a context length of 100000 needs at least 100001"),
     ({"context_length": 300}, "validation text|training text")],
)  # fmt: skip
def test_too_little_text_is_refused(cache, device, tmp_path, options, message):
    (tmp_path / "texts").mkdir()
    for index in range(3):
        (tmp_path / "texts" / f"{index}.txt").write_text("a few words\n" * 4)
    with pytest.raises(ValueError, match=message):
        train(tiny_config(tmp_path / "texts", **options), tmp_path / "run", device=device, cache=cache)


def test_without_matplotlib_training_still_works(corpus, cache, device, tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise ModuleNotFoundError("pictures need matplotlib")

    monkeypatch.setattr(plots, "new_figure", missing)
    notes = _Notes()
    result = train(tiny_config(corpus, steps=2), tmp_path / "run", device=device, cache=cache, progress=notes)
    assert result.picture is None and any(
        "no picture of the loss: pictures need matplotlib" in note for note in notes.notes
    )


def test_a_gpt2_model_trains_too(corpus, cache, device, tmp_path):
    config = tiny_config(corpus)
    shape = dataclasses.replace(config.model, family="gpt2", num_kv_heads=None, dropout=0.0, max_seqlen=32)
    result = train(dataclasses.replace(config, model=shape), tmp_path / "run", device=device, cache=cache)
    losses = metrics.series(metrics.read(tmp_path / "run" / "metrics.jsonl"), "loss")[1]
    assert losses[-1] < losses[0] - 1.0
    assert load(result.checkpoint).config.max_seqlen == 32


def test_the_default_device_and_stages_outside_of_tests(corpus, cache, tmp_path):
    checkpoint_module.stages("anything")
    result = train(tiny_config(corpus, steps=1), tmp_path / "run", cache=cache)
    assert result.num_parameters > 1000
