"""A saved model comes back bit for bit; what is damaged is refused whole; an interrupted save loses nothing."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pytransformer import Transformer, load, save
from pytransformer.model import checkpoint
from pytransformer.model.checkpoint import CheckpointError
from tests.model.configs import CONFIGS, make_model, random_ids


@pytest.fixture
def saved(tmp_path, device) -> tuple[Path, Transformer]:
    model = make_model(CONFIGS["llama"], 0, device)
    save(model, tmp_path)
    return tmp_path, model


def rewrite(folder: Path, change) -> None:
    """Changes the tensors of the file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_exact(name, tmp_path, device):
    model = make_model(CONFIGS[name], 3, device)
    save(model, tmp_path / "made" / "on the way")
    loaded = load(tmp_path / "made" / "on the way", device=device)
    assert loaded.config == model.config and not loaded.training
    before, after = model.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_embeddings
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    ids = random_ids(model.config, (2, 9), 0, device)
    assert torch.equal(loaded(ids), model(ids))


def test_files_are_safetensors_and_json_with_each_weight_once(saved):
    folder, model = saved
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    tied = make_model(CONFIGS["gpt2"], 0, model.lm_head.weight.device)
    save(tied, folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_dtype_is_kept_or_converted(tmp_path, device):
    model = make_model(CONFIGS["gpt2"], 0, device, torch.bfloat16)
    save(model, tmp_path)
    assert load(tmp_path).model.embed_tokens.weight.dtype == torch.bfloat16
    widened = load(tmp_path, dtype=torch.float32, device=device)
    assert widened.model.layers[0].attention.qkv_proj.weight.dtype == torch.float32
    assert widened.lm_head.weight is widened.model.embed_tokens.weight
    assert torch.equal(widened.model.embed_tokens.weight, model.model.embed_tokens.weight.float())


def test_a_loaded_model_trains(saved, device):
    folder, _ = saved
    model = load(folder, device=device).train()
    model(random_ids(model.config, (1, 5), 0, device)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_a_truncated_file_is_refused(saved, kept):
    folder, _ = saved
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or not a safetensors file"):
        load(folder)


def test_everything_that_does_not_fit_is_listed(saved):
    folder, _ = saved

    def damage(tensors):
        del tensors["model.norm.weight"]
        tensors["model.extra"] = torch.zeros(3)
        tensors["lm_head.weight"] = torch.zeros(5, 32)
        tensors["model.layers.0.feed_forward_norm.weight"] = torch.zeros(32, dtype=torch.int64)

    rewrite(folder, damage)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    for fault in (
        "missing: model.norm.weight",
        "unexpected: model.extra",
        "lm_head.weight: shape (5, 32), expected (67, 32)",
        "model.layers.0.feed_forward_norm.weight: dtype I64, expected F64, F32, F16 or BF16",
    ):
        assert fault in str(error.value)


def test_weights_of_another_configuration_are_refused(saved, device):
    folder, _ = saved
    save(make_model(CONFIGS["gpt2"], 0, device), folder / "other")
    os.replace(folder / "other" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json: missing: lm_head\.weight"):
        load(folder)


def test_pickle_is_never_read(saved):
    folder, _ = saved

    class Explosive:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    (folder / "model.safetensors").write_bytes(pickle.dumps(Explosive()))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: a configuration must be JSON"),
        ('{"hidden_size": 8}', "missing configuration keys"),
        ('{"n_layer": 8}', "unknown configuration keys: 'n_layer'"),
    ],
)
def test_a_damaged_configuration_is_refused(saved, text, message):
    folder, _ = saved
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    folder, _ = saved
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"does not hold a complete model: there is no {name}"):
        load(folder)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", ["write", "move"])
def test_an_interrupted_save_leaves_the_old_model(saved, at, monkeypatch, device):
    folder, old = saved
    new = make_model(CONFIGS["llama"], 1, device)

    def killed(*arguments, **options):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, {"write": "fsync", "move": "replace"}[at], killed)
        with pytest.raises(Killed):
            save(new, folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert torch.equal(load(folder, device=device).lm_head.weight, old.lm_head.weight)


def test_another_configuration_never_stands_beside_the_old_weights(saved, monkeypatch, device):
    folder, _ = saved
    new = make_model(CONFIGS["mistral-window"], 1, device)  # same names and shapes, another meaning
    moves = []
    real = os.replace

    def until(limit):
        def replace(source, target):
            if len(moves) == limit:
                raise Killed
            moves.append(Path(target).name)
            real(source, target)

        return replace

    for limit in (0, 1):
        moves.clear()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, "replace", until(limit))
            with pytest.raises(Killed):
                save(new, folder)
        with pytest.raises(FileNotFoundError, match=r"there is no config\.json"):
            load(folder)
    save(new, folder)
    assert torch.equal(load(folder, device=device).lm_head.weight, new.lm_head.weight)


def test_leftovers_of_a_killed_process_are_removed_and_those_of_a_living_one_not(saved):
    folder, model = saved
    old, fresh = folder / ".model.safetensors.1.tmp", folder / ".model.safetensors.2.tmp"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    save(model, folder)
    assert not old.exists() and fresh.exists()


def test_other_files_are_left_alone(saved):
    folder, model = saved
    (folder / "tokenizer.json").write_text("{}")
    save(model, folder)
    assert (folder / "tokenizer.json").read_text() == "{}"


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(TypeError, match="save writes a Transformer, got Linear"):
        save(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(
        ValueError, match=r"parameters on the meta device have no values to save: model\.embed_tokens\.weight, "
    ):
        save(Transformer(CONFIGS["llama"], device="meta"), tmp_path)
