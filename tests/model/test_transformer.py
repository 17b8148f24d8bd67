"""The model as a module: initial weights, dropout, moving, compiling, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pytransformer import Transformer, TransformerConfig, use_backend
from pytransformer.verification import SEEDS, Contract
from tests.model.configs import CONFIGS, TINY_CONFIGS, gradients, make_model, make_twin, random_ids

WIDE = TransformerConfig.gpt2(vocab_size=500, hidden_size=128, num_layers=8, num_heads=4, max_seqlen=32)


def test_names_of_the_state_dict():
    names = set(Transformer(CONFIGS["llama-qk-norm-head-dim"]).state_dict())
    layer = "model.layers.1."
    assert {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        layer + "attention_norm.weight",
        layer + "attention.qkv_proj.weight",
        layer + "attention.q_norm.weight",
        layer + "attention.k_norm.weight",
        layer + "attention.out_proj.weight",
        layer + "feed_forward_norm.weight",
        layer + "feed_forward.gate_up_proj.weight",
        layer + "feed_forward.down_proj.weight",
    } == {name for name in names if ".0." not in name}
    gpt2 = set(Transformer(CONFIGS["gpt2"]).state_dict())
    assert {"model.embed_positions.weight", layer + "feed_forward.up_proj.bias", "model.norm.bias"} <= gpt2
    post_norm = set(Transformer(CONFIGS["original-post-norm-sinusoidal"]).state_dict())
    assert not {"model.norm.weight", "model.embed_positions.weight"} & post_norm


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_those_of_the_twin(name):
    model = Transformer(CONFIGS[name])
    twin = make_twin(model)
    expected = {key: value.shape for key, value in twin.state_dict().items()}
    actual = {key: value.shape for key, value in model.state_dict().items()}
    if model.config.tie_embeddings:
        del actual["lm_head.weight"]
    assert actual == expected


def test_initial_weights_are_gpt2s(device):
    model = Transformer(WIDE, device=device)
    block = model.model.layers[3]
    for weight, spread in (
        (model.model.embed_tokens.weight, 0.02),
        (model.model.embed_positions.weight, 0.02),
        (block.attention.qkv_proj.weight, 0.02),
        (block.feed_forward.up_proj.weight, 0.02),
        (block.attention.out_proj.weight, 0.02 / math.sqrt(16)),
        (block.feed_forward.down_proj.weight, 0.02 / math.sqrt(16)),
    ):
        # The standard error of a standard deviation of n normal numbers is σ / sqrt(2n); five of them.
        assert abs(float(weight.detach().std()) - spread) < 5 * spread / math.sqrt(2 * weight.numel())
    assert not bool(block.attention.qkv_proj.bias.any()) and bool((block.attention_norm.weight == 1).all())
    assert bool((Transformer(CONFIGS["gemma"]).model.norm.weight == 0).all())


def test_an_untrained_model_knows_nothing(device):
    ids = random_ids(WIDE, (4, 32), 0, device)
    targets = random_ids(WIDE, (4, 32), 1, device)
    loss = torch.nn.functional.cross_entropy(Transformer(WIDE, device=device)(ids).flatten(0, 1), targets.flatten())
    assert abs(loss.item() - math.log(WIDE.vocab_size)) < 0.5


def test_tied_weights_are_one_parameter(device):
    model = make_model(CONFIGS["gpt2"], 0, device)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == sum(p.numel() for p in set(model.parameters()))
    for moved in (
        copy.deepcopy(model),
        model.to(torch.float64),
        Transformer(CONFIGS["gpt2"], device="meta").to_empty(device="cpu"),
    ):
        assert moved.lm_head.weight is moved.model.embed_tokens.weight
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tables_of_positions_stay_float32(device):
    for name in ("llama", "alibi-window-geglu", "original-post-norm-sinusoidal"):
        model = make_model(CONFIGS[name], 0, device)
        before = {key: buffer.clone() for key, buffer in model.named_buffers()}
        assert before
        model.to(torch.bfloat16).float()
        for key, buffer in model.named_buffers():
            assert torch.equal(buffer, before[key])


def test_a_model_from_the_meta_device_computes_the_same(device):
    for name in ("llama", "alibi-window-geglu", "original-post-norm-sinusoidal"):
        model = make_model(CONFIGS[name], 0, device)
        other = Transformer(CONFIGS[name], device="meta").to_empty(device=device).eval()
        other.load_state_dict(model.state_dict())
        ids = random_ids(model.config, (2, 7), 0, device)
        assert torch.equal(model(ids), other(ids))


RATES = ("embedding_dropout", "attention_dropout", "residual_dropout", "feed_forward_dropout")


@pytest.mark.filterwarnings("ignore:.*the reference.*:RuntimeWarning")
@pytest.mark.parametrize("rate", RATES)
def test_each_dropout_acts_in_training_only(rate, device):
    config = TransformerConfig.gpt2(
        vocab_size=67, hidden_size=32, num_layers=1, num_heads=4, max_seqlen=24, **{rate: 0.4}
    )
    model = make_model(config, 0, device)
    plain = make_model(CONFIGS["gpt2"].__class__.from_dict({**config.to_dict(), rate: 0.0}), 0, device)
    ids = random_ids(config, (2, 11), 0, device)
    assert torch.equal(model(ids), plain(ids))
    model.train()
    torch.manual_seed(5)
    first, second = model(ids), model(ids)
    torch.manual_seed(5)
    assert torch.equal(model(ids), first) and not torch.equal(first, second)
    assert not torch.equal(first, plain(ids))


@pytest.mark.parametrize("rate", ["embedding_dropout", "residual_dropout", "feed_forward_dropout"])
def test_dropout_drops_the_rate_where_it_belongs(rate, device):
    config = TransformerConfig.gpt2(
        vocab_size=67, hidden_size=64, num_layers=1, num_heads=4, max_seqlen=64, **{rate: 0.4}
    )
    model = make_model(config, 0, device).train()
    block = model.model.layers[0]
    # What is looked at is the input of the module that follows the dropout.
    follower = {
        "embedding_dropout": block.attention_norm,
        "residual_dropout": block.feed_forward_norm,
        "feed_forward_dropout": block.feed_forward.down_proj,
    }[rate]
    seen = []
    follower.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(random_ids(config, (4, 64), 0, device))
    dropped = (seen[0] == 0).double().mean().item()
    assert abs(dropped - 0.4) < 5 * math.sqrt(0.4 * 0.6 / seen[0].numel())


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama-qk-norm-head-dim", "eager"),
        pytest.param("llama-qk-norm-head-dim", "aot_eager", marks=pytest.mark.slow),
        pytest.param("gpt2", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_compiles_whole_within_the_contract(name, backend, device):
    contract = Contract(torch.float32)
    config = dataclasses.replace(CONFIGS[name], num_layers=1, layer_types=None)  # tracing takes ten seconds a layer
    model = make_model(config, 0, device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for seed in range(SEEDS):
        ids = random_ids(model.config, (2 + seed % 2, 7 + seed), seed, device)
        plain, golden = make_twin(model), make_twin(model, torch.float64)
        contract.add("logits", actual=compiled(ids), plain=plain(ids), golden=golden(ids))
        actual = {name.removeprefix("_orig_mod."): grad for name, grad in gradients(compiled, ids).items()}
        contract.add_all(actual, gradients(plain, ids), gradients(golden, ids), kind="gradient")
    contract.check()


def test_compiles_whole_over_the_triton_kernels(device):
    """Through AOTAutograd, with the backward pass."""
    model = make_model(TINY_CONFIGS["llama-qk-norm-window"], 0, device)
    ids = random_ids(model.config, (1, 4), 0, device)
    with use_backend("triton"):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(ids), model(ids))
        expected = {name: grad.clone() for name, grad in gradients(model, ids).items()}
        actual = {name.removeprefix("_orig_mod."): grad for name, grad in gradients(compiled, ids).items()}
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, msg=lambda text, name=name: f"{name}: {text}")


REFUSED = [
    ([[1, 2]], TypeError, r"input_ids must be a torch.Tensor of shape \(batch, seqlen\), got list"),
    (torch.zeros(1, 3), TypeError, "input_ids must be int64 or int32, got torch.float32"),
    (torch.zeros(3, dtype=torch.int64), ValueError, r"input_ids must have shape \(batch, seqlen\), got \(3,\)"),
    (torch.zeros(1, 25, dtype=torch.int64), ValueError, "input_ids must have at most max_seqlen = 24 tokens, got 25"),
    (torch.tensor([[1, 67]]), ValueError, r"input_ids must hold token ids from 0 to 66, got 67 at index \[0, 1\]"),
]


@pytest.mark.parametrize(("ids", "error", "message"), REFUSED)
def test_bad_input_is_refused_by_name(ids, error, message):
    with pytest.raises(error, match=message):
        Transformer(CONFIGS["gpt2"])(ids)


def test_a_config_of_another_class_is_refused():
    with pytest.raises(TypeError, match="config must be a TransformerConfig, got dict"):
        Transformer({"vocab_size": 3})


def test_int32_ids_and_empty_batches(device):
    model = make_model(CONFIGS["llama"], 0, device)
    ids = random_ids(model.config, (2, 7), 0, device)
    assert torch.equal(model(ids), model(ids.int()))
    assert model(ids[:0]).shape == (0, 7, model.config.vocab_size)
    assert model(ids[:, :0]).shape == (2, 0, model.config.vocab_size)


ALONE = """
import sys, torch
from pytransformer.model.config import TransformerConfig
from pytransformer.model.transformer import Transformer
assert "pytransformer.generation" not in sys.modules
model = Transformer(TransformerConfig(vocab_size=16, hidden_size=16, num_layers=1, num_heads=2))
assert model.generate(torch.tensor([[1, 2]]), 3).shape == (1, 5)
"""


def test_the_class_generates_wherever_it_was_imported_from():
    """Nothing of generation, which stands above the model, is loaded before it is asked for."""
    subprocess.run([sys.executable, "-c", ALONE], check=True, cwd=Path(__file__).parents[2])
