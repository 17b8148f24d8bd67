"""A checkpoint is complete or not there, whatever happens while it is written."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pytransformer.training import checkpoint as checkpoint_module
from pytransformer.training.checkpoint import (
    LATEST,
    MANIFEST,
    OPTIMIZER,
    CheckpointStore,
    optimizer_tensors,
    read_training_state,
    write_training_state,
)
from pytransformer.training.config import TrainingConfig
from pytransformer.training.optimizer import make_optimizer

STAGES = ("files written", "before rename", "renamed", "pointed to")


def _write(content: str):
    def write(folder):
        (folder / "a.txt").write_text(content * 100)
        (folder / "b.txt").write_text(content)

    return write


def _content(store: CheckpointStore) -> str | None:
    latest = store.latest()
    return None if latest is None else (latest / "b.txt").read_text()


def test_the_newest_is_found_and_old_ones_go(tmp_path):
    store = CheckpointStore(tmp_path / "deep" / "checkpoints", keep=2)
    assert store.latest() is None
    for step in (5, 10, 15):
        folder = store.save(step, _write(str(step)))
        assert store.latest() == folder and _content(store) == str(step)
    assert sorted(path.name for path in store.folder.iterdir()) == [LATEST, "step-00000010", "step-00000015"]


def test_saving_a_step_again_replaces_it(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(5, _write("old"))
    store.save(5, _write("new"))
    assert _content(store) == "new"


def test_a_failing_write_changes_nothing(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(5, _write("good"))

    def fail(folder):
        (folder / "a.txt").write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        store.save(10, fail)
    assert _content(store) == "good"
    store.save(15, _write("next"))
    assert _content(store) == "next" and not list(tmp_path.glob(".writing-*"))


def _killed_at(stage: str | int, action) -> None:
    """Runs ``action`` in a child that SIGKILLs itself when ``stage`` is reached: no handler runs, nothing is flushed."""
    child = os.fork()
    if child == 0:

        def die(reached):
            if reached == stage:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint_module.stages = die
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("first", [False, True])
def test_a_kill_during_a_save_leaves_the_old_or_the_new(tmp_path, stage, first):
    store = CheckpointStore(tmp_path, keep=1)
    if not first:
        store.save(5, _write("old"))
    _killed_at(stage, lambda: store.save(10, _write("new")))
    expected = "new" if stage == "pointed to" else None if first else "old"
    assert _content(CheckpointStore(tmp_path, keep=1)) == expected
    again = CheckpointStore(tmp_path, keep=1)
    again.save(10, _write("again"))
    assert _content(again) == "again"
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "step-00000010"]


def test_a_kill_while_a_file_is_written_leaves_the_old(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(5, _write("old"))

    def cut(folder):
        (folder / "a.txt").write_text("ha")
        os.kill(os.getpid(), signal.SIGKILL)

    _killed_at("never", lambda: store.save(10, cut))
    assert _content(store) == "old"


def test_every_cut_of_every_file_is_refused(tmp_path):
    """What no kill can do (a broken disk, a copy that stopped) is seen all the same, and named."""
    store = CheckpointStore(tmp_path / "good")
    folder = store.save(5, _write("text"))
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        for length in {0, 1, size // 2, size - 2}:
            copy = CheckpointStore(tmp_path / f"{path.name}-{length}")
            shutil.copytree(store.folder, copy.folder)
            os.truncate(copy.folder / folder.name / path.name, length)
            with pytest.raises(ValueError, match=path.name):
                copy.latest()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "b.txt").unlink(), r"is damaged: b\.txt is missing"),
        (lambda folder: (folder / "b.txt").write_text("texT"), r"is damaged: b\.txt has changed"),
        (lambda folder: (folder / "b.txt").write_text("longer"), r"b\.txt has 6 bytes instead of 4"),
        (lambda folder: (folder / MANIFEST).unlink(), "is incomplete: it has no checkpoint.json"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), r"checkpoint\.json lists no files"),
        (shutil.rmtree, "is incomplete"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    store = CheckpointStore(tmp_path)
    damage(store.save(5, _write("text")))
    with pytest.raises(ValueError, match=message):
        store.latest()


def test_beside_a_damaged_one_the_way_to_the_older_is_named_and_works(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    first, second, third = (store.save(step, _write(str(step))) for step in (5, 10, 15))
    for damaged in (third, second):
        (damaged / "b.txt").unlink()
    with pytest.raises(
        ValueError, match=rf"b\.txt is missing\. The older {first} is whole: remove the folder {third.name} to go"
    ):
        store.latest()
    shutil.rmtree(third)
    with pytest.raises(ValueError, match=rf"{second.name} is damaged.*remove the folder {second.name} to go on"):
        store.latest()
    shutil.rmtree(second)
    assert store.latest() == first
    assert store.save(20, _write("20")) == store.latest()
    (store.folder / LATEST).unlink()
    assert _content(store) == "20"
    (first / "b.txt").unlink()
    (store.folder / "step-00000020" / "b.txt").unlink()
    with pytest.raises(
        ValueError,
        match="There is no other that is whole: start anew with --overwrite, or in another folder with --out",
    ):
        store.latest()


def test_beside_a_damaged_pointer_the_way_to_the_newest_is_named_and_works(tmp_path):
    store = CheckpointStore(tmp_path)
    newest = store.save(5, _write("text"))
    (tmp_path / LATEST).write_text("{")
    with pytest.raises(ValueError, match=r"is not valid JSON.*which is whole, let it hold") as error:
        store.latest()
    (tmp_path / LATEST).write_text(str(error.value).rpartition("let it hold ")[2])
    assert store.latest() == newest


@pytest.mark.parametrize("pointer", ["[]", "{}", '{"checkpoint": 5}', "{"])
def test_a_damaged_pointer_is_named(tmp_path, pointer):
    store = CheckpointStore(tmp_path)
    store.save(5, _write("text"))
    (tmp_path / LATEST).write_text(pointer)
    with pytest.raises(ValueError, match=r"latest\.json"):
        store.latest()


def test_a_pointer_cannot_lead_out_of_the_folder(tmp_path):
    store = CheckpointStore(tmp_path / "run")
    store.save(5, _write("text"))
    (tmp_path / "run" / LATEST).write_text(json.dumps({"checkpoint": "../elsewhere", "step": 5}))
    with pytest.raises(ValueError, match="run/elsewhere is incomplete"):
        store.latest()


def _trained(device, name: str, steps: int = 3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).to(device)
    optimizer = make_optimizer(model, TrainingConfig(optimizer=name, learning_rate=0.1))
    _step(model, optimizer, device, steps)
    return model, optimizer


def _step(model, optimizer, device, steps: int) -> list[torch.Tensor]:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 4).to(device)).square().sum().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("steps", [0, 3])
def test_optimizer_and_random_state_continue_to_the_bit(device, tmp_path, name, steps):
    model, optimizer = _trained(device, name, steps)
    write_training_state(tmp_path, model, optimizer, {"step": steps})
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    unbroken = _step(model, optimizer, device, 4)

    resumed, fresh = _trained(device, name, 0)
    resumed.load_state_dict(weights)
    torch.manual_seed(99)
    read_training_state(tmp_path, resumed, fresh)
    for found, expected in zip(_step(resumed, fresh, device, 4), unbroken):
        assert torch.equal(found, expected)


def test_state_that_does_not_fit_is_refused_with_the_whole_list(device, tmp_path):
    model, optimizer = _trained(device, "adamw")
    write_training_state(tmp_path, model, optimizer, {})
    other = nn.Sequential(nn.Linear(4, 5)).to(device)
    fresh = make_optimizer(other, TrainingConfig())
    with pytest.raises(ValueError) as error:
        read_training_state(tmp_path, other, fresh)
    text = str(error.value)
    assert "optimizer.safetensors doesn't fit the model" in text
    assert "exp_avg/0.weight has shape (3, 4) instead of (5, 4)" in text
    assert "there is no parameter for exp_avg_sq/1.bias" in text
    assert not fresh.state

    tensors = {key: value for key, value in load_file(tmp_path / OPTIMIZER).items() if not key.endswith("1.bias")}
    save_file(tensors, tmp_path / OPTIMIZER)
    model, fresh = _trained(device, "adamw", 0)
    with pytest.raises(ValueError, match=r"there is no state for 1\.bias"):
        read_training_state(tmp_path, model, fresh)


def test_a_cut_optimizer_file_is_refused(device, tmp_path):
    model, optimizer = _trained(device, "adamw")
    write_training_state(tmp_path, model, optimizer, {})
    os.truncate(tmp_path / OPTIMIZER, 100)
    with pytest.raises(ValueError, match=r"optimizer\.safetensors cannot be read"):
        read_training_state(tmp_path, model, optimizer)


def test_names_say_what_a_tensor_is(device):
    model, optimizer = _trained(device, "adamw")
    assert {"step/0.weight", "exp_avg/0.weight", "exp_avg_sq/1.bias"} <= set(optimizer_tensors(model, optimizer))
