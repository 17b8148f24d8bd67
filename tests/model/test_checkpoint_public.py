"""Folders in the layout of a public family: read beside transformers, written for it, and refused whole with everything that does not fit.

The families themselves are tested beside theirs; here is what all of them share, on Llama.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from pytransformer import TransformerConfig, load, save
from pytransformer.model import writing
from pytransformer.model.families import FAMILIES, CheckpointError
from pytransformer.model.families.weights import same
from pytransformer.nn import RowBlocks
from tests.model.configs import CONFIGS, make_model

logging.disable_progress_bar()
SHAPE = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 24,
}  # fmt: skip
SHARD_BYTES = 20_000  # the weights have 80 KB


def make_theirs(dtype: torch.dtype = torch.float32, **options: object) -> LlamaForCausalLM:
    """Their model with random norms and biases."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


@pytest.fixture
def theirs() -> LlamaForCausalLM:
    return make_theirs(attention_bias=True)


@pytest.fixture
def folder(tmp_path, theirs) -> Path:
    theirs.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(67, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    found = model(ids)
    return getattr(found, "logits", found)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def mapped_places(folder: Path) -> list[tuple[int, int]]:
    """Addresses at which files of the folder are mapped in this process."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    return [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]


@pytest.mark.parametrize("mmap", [None, True, False])
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_logits_are_theirs(tmp_path, theirs, ids, mmap, shard):
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    model = load(tmp_path, device="cpu", mmap=mmap)
    assert model.config.family == "llama" and not model.training
    assert all(type(parameter) is torch.nn.Parameter and parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(logits_of(model, ids), logits_of(theirs, ids))


@pytest.mark.parametrize("mmap", [None, False])
def test_weights_stay_in_the_files_where_they_may(folder, mmap):
    model = load(folder, device="cpu", mmap=mmap)
    places = mapped_places(folder)
    inside = {
        name: any(start <= parameter.data_ptr() < stop for start, stop in places)
        for name, parameter in model.named_parameters()
    }
    if mmap is False:
        assert not any(inside.values()) and not any(isinstance(module, RowBlocks) for module in model.modules())
    else:
        # A joined bias is small, and copied.
        assert {name for name, there in inside.items() if not there} == {
            f"model.layers.{layer}.attention.qkv_proj.bias" for layer in range(2)
        }
        assert sum(isinstance(module, RowBlocks) for module in model.modules()) == 4


def test_mapped_weights_train_and_generate_and_leave_the_file_alone(folder, ids):
    before = (folder / "model.safetensors").read_bytes()
    mapped, copied = load(folder, device="cpu"), load(folder, device="cpu", mmap=False)
    for pack in (False, True):
        expected = copied.generate(ids, 6, pack_weights=pack)
        assert torch.equal(mapped.generate(ids, 6, pack_weights=pack), expected)
    for model in (mapped, copied):
        model.train()(ids).logsumexp(-1).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, tensor in copied.state_dict().items():
        torch.testing.assert_close(mapped.state_dict()[name], tensor)
    assert not torch.equal(mapped.lm_head.weight, load(folder, device="cpu").lm_head.weight)
    assert (folder / "model.safetensors").read_bytes() == before


def test_another_dtype_is_read_fused(folder, device):
    model = load(folder, dtype=torch.bfloat16, device=device)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(isinstance(module, RowBlocks) for module in model.modules())
    names = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
    joined = torch.cat([all_tensors(folder)[name] for name in names]).bfloat16()
    assert torch.equal(model.model.layers[1].attention.qkv_proj.weight.cpu(), joined)


def test_mapping_is_for_a_cpu(folder):
    with pytest.raises(ValueError, match=r"mmap=True is for weights on a CPU, got device='meta'"):
        load(folder, device="meta", mmap=True)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("limit", [10**9, SHARD_BYTES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_saved_loads_in_transformers_without_a_word(tmp_path, ids, tie, limit, dtype):
    theirs = make_theirs(dtype, attention_bias=True, tie_word_embeddings=tie)
    theirs.save_pretrained(tmp_path / "theirs")
    save(load(tmp_path / "theirs", device="cpu"), tmp_path / "ours", max_shard_bytes=limit)
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert (len(files) > 1) == (limit == SHARD_BYTES)
    assert all((tmp_path / "ours" / name).stat().st_size < limit + 10_000 for name in files)
    before, after = all_tensors(tmp_path / "theirs"), all_tensors(tmp_path / "ours")
    assert set(before) == set(after) and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(back) is LlamaForCausalLM and back.dtype == dtype
    assert not any(info.values()), info
    assert torch.equal(logits_of(back, ids), logits_of(LlamaForCausalLM.from_pretrained(tmp_path / "theirs"), ids))


def test_from_one_layout_to_the_other_and_back(folder, tmp_path, theirs, ids):
    save(load(folder, device="cpu"), tmp_path / "own", family="pytransformer", max_shard_bytes=SHARD_BYTES)
    own = load(tmp_path / "own", device="cpu")
    assert own.config.family is None and "hidden_size" in json.loads((tmp_path / "own/config.json").read_text())
    torch.testing.assert_close(logits_of(own, ids), logits_of(theirs, ids))
    save(own, tmp_path / "back", family="llama")
    before, after = all_tensors(folder), all_tensors(tmp_path / "back")
    assert set(before) == set(after) and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    save(own, tmp_path / "own again")
    assert load(tmp_path / "own again", device="cpu").config == own.config


def test_a_head_that_differs_from_the_embedding_wins_over_the_configuration(folder, theirs, ids):
    change_config(folder, tie_word_embeddings=True)
    model = load(folder, device="cpu")
    assert not model.config.tie_embeddings
    torch.testing.assert_close(logits_of(model, ids), logits_of(theirs, ids))

    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 0}))
    tied = load(folder, device="cpu")
    assert tied.config.tie_embeddings and tied.lm_head.weight is tied.model.embed_tokens.weight

    change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert load(folder, device="cpu").lm_head.weight is not None
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight$"):
        load(folder)


def test_everything_that_does_not_fit_is_listed(folder):
    def damage(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.k_proj.weight"]
        tensors["model.extra"] = torch.zeros(3)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(47, 32)
        tensors["model.layers.0.input_layernorm.weight"] = torch.zeros(32, dtype=torch.int64)

    change_tensors(folder, damage)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert str(error.value) == (
        f"{folder} does not fit its config.json: missing: model.layers.1.self_attn.k_proj.weight; missing: model.norm.weight; "
        "unexpected: model.extra; "
        "model.layers.0.input_layernorm.weight: dtype I64, expected F64, F32, F16 or BF16; "
        "model.layers.0.mlp.up_proj.weight: shape (47, 32), expected (48, 32)"
    )


def test_a_family_that_the_configuration_does_not_name_is_recognised(folder, monkeypatch):
    weights = tuple(same(f"model.{name}", f"odd.{{i}}.{name}") for name in ("a", "b", "c"))
    monkeypatch.setitem(FAMILIES, "odd", dataclasses.replace(FAMILIES["llama"], name="odd", weights=weights))
    tensors = {f"odd.{layer}.{name}": torch.zeros(1) for layer in range(2) for name in "ab"}
    save_file({**tensors, "lm_head.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"By their names the tensors are not of llama but of odd$"):
        load(folder)
    change_config(folder, model_type="unheard-of")
    with pytest.raises(CheckpointError, match=r"config\.json: model_type must be one of .*llama.*, got 'unheard-of'"):
        load(folder)


def test_tensors_that_a_family_lacks_in_every_layer_make_it_another_one(folder, tmp_path):
    make_theirs().save_pretrained(tmp_path / "plain")
    change_config(tmp_path / "plain", model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=8)
    with pytest.raises(CheckpointError, match=r"missing: .*q_norm.* the tensors are not of qwen3 but of llama or"):
        load(tmp_path / "plain")
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"))
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.mlp\.down_proj\.weight$"):
        load(folder)


@pytest.mark.parametrize("name", [None, "llamma", 3])
def test_what_the_tensors_of_an_unknown_family_look_like_is_said(folder, name):
    change_config(folder, model_type=name)
    with pytest.raises(
        CheckpointError, match=r"model_type must be one of .*; by their names 100% of its tensors could be of llama"
    ):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"got {name!r}$"):
        load(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"num_attention_heads": 0}, {"hidden_size": None}, {"quantization_config": "mxfp4"}, {"rope_theta": "x"}, {"eos_token_id": {}},
        {"architectures": "LlamaModelling"}, {"num_key_value_heads": 0}, {"rms_norm_eps": None}, {"vocab_size": "a"}, {"id2label": 3},
    ],
)  # fmt: skip
def test_nonsense_in_a_configuration_is_an_error_that_names_the_file(folder, values):
    for model_type in ("llama", "gpt_oss"):
        change_config(folder, model_type=model_type, rope_parameters=None, **values)
        with pytest.raises(CheckpointError, match=r"config\.json: "):
            load(folder)


def test_generation_config_is_read_kept_and_written(folder, tmp_path):
    values = {"eos_token_id": [2, 5], "bos_token_id": 3, "pad_token_id": 0, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(values))
    model = load(folder, device="cpu")
    assert model.config.eos_token_ids == (2, 5) and model.config.bos_token_id == 3 and model.config.pad_token_id == 0
    assert model.generation_config == values
    save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/generation_config.json").read_text()) == values
    assert json.loads((tmp_path / "saved/config.json").read_text())["eos_token_id"] == [2, 5]
    (folder / "generation_config.json").unlink()
    assert load(folder, device="cpu").generation_config is None
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "must hold an object"),
        ('{"eos_token_id": "end"}', "eos_token_id"),
    ):
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"generation_config\.json.*{message}"):
            load(folder)


def test_what_cannot_be_saved_so_is_refused_before_anything_is_written(tmp_path):
    model = make_model(CONFIGS["gpt2"], 0, torch.device("cpu"))
    for options, message in (
        ({"family": "llama"}, "the family llama cannot express this model: "),
        ({"family": "gpt-17"}, "family must be one of pytransformer, .*llama.*, got 'gpt-17'"),
        ({"max_shard_bytes": 0}, "max_shard_bytes must be a positive int, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            save(model, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


class Killed(BaseException):
    pass


def test_a_killed_save_never_leaves_a_folder_that_looks_complete(folder, tmp_path, monkeypatch):
    """Shards over a single file, a single file over shards, shards over shards: killed at each step that changes what is seen."""
    model, place = load(folder, device="cpu", mmap=False), tmp_path / "place"
    new = load(folder, device="cpu", mmap=False)
    with torch.no_grad():
        new.lm_head.weight.add_(1)
    real_replace, real_unlink = os.replace, Path.unlink
    monkeypatch.setattr(writing.os, "fsync", lambda handle: None)  # the machine stays up
    for before, after in ((10**9, SHARD_BYTES), (SHARD_BYTES, 10**9), (SHARD_BYTES, SHARD_BYTES)):
        for limit in range(20):
            save(model, place, max_shard_bytes=before)
            left = limit

            def step(real, *arguments, **options):
                nonlocal left
                if ".tmp" not in Path(arguments[0]).name or real is real_replace:
                    if left == 0:
                        raise Killed
                    left -= 1
                return real(*arguments, **options)

            with monkeypatch.context() as patch:
                patch.setattr(writing.os, "replace", lambda *a, **o: step(real_replace, *a, **o))
                patch.setattr(Path, "unlink", lambda *a, **o: step(real_unlink, *a, **o))
                try:
                    save(new, place, max_shard_bytes=after)
                except Killed:
                    pass
                else:
                    assert limit > 2
                    break
            try:
                found = load(place, device="cpu", mmap=False)
            except FileNotFoundError as error:
                assert "there is no config.json" in str(error)
            else:
                assert torch.equal(found.lm_head.weight, model.lm_head.weight)
        else:
            pytest.fail("a save has more steps than were tried")
        assert torch.equal(load(place, device="cpu", mmap=False).lm_head.weight, new.lm_head.weight)
        assert len(list(place.glob("*.safetensors"))) == (1 if after == 10**9 else 5)


def test_a_file_of_a_base_model_and_one_with_tables_fit(folder, theirs, tmp_path):
    theirs.model.save_pretrained(tmp_path / "base")
    assert "embed_tokens.weight" in all_tensors(tmp_path / "base")
    base = load(tmp_path / "base", device="cpu")
    assert base.config.head == "none" and base.lm_head is None
    save(base, tmp_path / "again")
    before, after = all_tensors(tmp_path / "base"), all_tensors(tmp_path / "again")
    assert set(before) == set(after) and all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(4)}))
    load(folder, device="cpu")


def test_a_tensor_that_may_be_absent_starts_as_in_a_new_model(folder, monkeypatch):
    llama = FAMILIES["llama"]
    optional = tuple(dataclasses.replace(weight, optional=True) for weight in llama.weights)
    monkeypatch.setitem(FAMILIES, "llama", dataclasses.replace(llama, weights=optional))
    places = ("lm_head.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias")
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in places])
    change_tensors(folder, lambda t: [t.pop(f"model.layers.0.self_attn.{name}_proj.bias") for name in "kv"])
    with pytest.warns(UserWarning, match=r"nothing for lm_head\.weight: started with random values"):
        model = load(folder, device="cpu")
    assert torch.equal(model.model.norm.weight, torch.ones(32))
    assert torch.equal(model.model.layers[0].attention.qkv_proj.bias, torch.zeros(64))
    assert 0.5 < model.lm_head.weight.std() / model.config.initializer_range < 1.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(model, folder)
        load(folder, device="cpu")


def test_our_own_configuration_never_has_a_field_of_theirs():
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert not fields & {"model_type", "architectures", "transformers_version"}


def test_special_tokens_beyond_a_small_vocabulary_are_no_tokens(tmp_path):
    """transformers writes its defaults into the files of any model: GPT-2's end token beside a vocabulary of 40 (5.23.0)."""
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(vocab_size=40, **sizes)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="eos_token_id 50256 is beyond the vocabulary of 40 tokens: ignored"):
        model = load(tmp_path)
    assert model.config.eos_token_ids == () and model.config.bos_token_id is None
    assert model.generate([1, 2, 3], max_new_tokens=3).shape == (6,)
