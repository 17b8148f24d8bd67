"""The naive transformer against transformers' models, torch's own layer, and what each choice of the configuration means."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pytransformer import TransformerConfig
from pytransformer.reference import EncoderDecoder, Transformer
from pytransformer.reference.blocks import Block, Inputs, Norm
from pytransformer.reference.feed_forward import activate

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, MAX_SEQLEN = 50, 32, 2, 4, 2, 8, 48, 24


def make_config(**changes):
    """Llama's choices unless changed."""
    choices = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": INTERMEDIATE,
        "max_seqlen": MAX_SEQLEN,
        "positions": "rope",
        "rope_base": 10000.0,
        "rope_scaling": None,
        "rotary_dim": HEAD_DIM,
        "rope_interleaved": False,
        "norm": "rms_norm",
        "norm_eps": 1e-6,
        "norm_bias": True,
        "norm_weight_offset": 0.0,
        "norm_placement": "pre",
        "qk_norm": False,
        "activation": "swiglu",
        "attention_bias": False,
        "mlp_bias": False,
        "softmax_scale": None,
        "attention_softcap": 0.0,
        "logit_softcap": 0.0,
        "sliding_window": None,
        "embedding_dropout": 0.0,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "feed_forward_dropout": 0.0,
        "tie_embeddings": False,
        "scale_embeddings": False,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return TransformerConfig(**{**choices, **changes})


GPT2 = {
    "num_kv_heads": HEADS,
    "positions": "learned",
    "norm": "layer_norm",
    "norm_eps": 1e-5,
    "activation": "gelu_tanh",
    "attention_bias": True,
    "mlp_bias": True,
    "tie_embeddings": True,
}


def make_ids(device, batch=2, seqlen=11):
    return torch.randint(VOCAB, (batch, seqlen), device=device)


def randomise(model):
    """Weights large enough that every part matters, norms and biases included; biases of zero would hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.add_(1.0)
    return model


# ---- against transformers ------------------------------------------------------------------------------------------


def weights_of_gpt2(theirs):
    """GPT-2 stores (in, out) matrices, and q, k, v already in one."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        name = name.replace("transformer.wte", "model.embed_tokens").replace("transformer.wpe", "model.embed_positions")
        name = name.replace("transformer.h.", "model.layers.").replace("transformer.ln_f", "model.norm")
        name = name.replace(".ln_1", ".attention_norm").replace(".ln_2", ".feed_forward_norm")
        name = name.replace(".attn.c_attn", ".attention.qkv_proj").replace(".attn.c_proj", ".attention.out_proj")
        name = name.replace(".mlp.c_fc", ".feed_forward.up_proj").replace(".mlp.c_proj", ".feed_forward.down_proj")
        state[name] = tensor.T if "proj.weight" in name else tensor
    return state


def weights_of_llama(theirs):
    """Llama and its relatives: only names differ, and separate projections are stacked."""
    their_state, state = theirs.state_dict(), {}
    for name in their_state:
        if any(part in name for part in ("k_proj", "v_proj", "up_proj")):
            continue  # taken together with q_proj and gate_proj
        new = name.replace("input_layernorm", "attention_norm").replace("post_attention_layernorm", "feed_forward_norm")
        new = new.replace("self_attn.o_proj", "attention.out_proj").replace("self_attn", "attention")
        new = new.replace("mlp.", "feed_forward.")
        parts = [name]
        if "q_proj" in name:
            new, parts = new.replace("q_proj", "qkv_proj"), [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if "gate_proj" in name:
            new, parts = new.replace("gate_proj", "gate_up_proj"), [name, name.replace("gate_proj", "up_proj")]
        state[new] = torch.cat([their_state[part] for part in parts])
    if theirs.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


LLAMA_LIKE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": INTERMEDIATE,
    "vocab_size": VOCAB,
    "max_position_embeddings": MAX_SEQLEN,
    "attn_implementation": "eager",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT2_SHAPE = {
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_inner": INTERMEDIATE,
    "vocab_size": VOCAB,
    "n_positions": MAX_SEQLEN,
    "attn_implementation": "eager",
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SHAPE)), weights_of_gpt2, GPT2),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE)), weights_of_llama, {}),
    "llama3": (
        lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE, rope_parameters=LLAMA3_ROPE)),
        weights_of_llama,
        {"rope_scaling": LLAMA3_ROPE},
    ),
    "llama_biases": (
        lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE, attention_bias=True, mlp_bias=True)),
        weights_of_llama,
        {"attention_bias": True, "mlp_bias": True},
    ),
    "mistral": (
        lambda: MistralForCausalLM(MistralConfig(**LLAMA_LIKE, sliding_window=4)),
        weights_of_llama,
        {"sliding_window": 4},
    ),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA_LIKE)), weights_of_llama, {"qk_norm": True}),
    "gemma": (
        lambda: GemmaForCausalLM(GemmaConfig(**LLAMA_LIKE)),
        weights_of_llama,
        {"norm_weight_offset": 1.0, "activation": "geglu_tanh", "scale_embeddings": True, "tie_embeddings": True},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_transformers(family, device):
    make_theirs, convert, choices = FAMILIES[family]
    theirs = randomise(make_theirs()).to(device).eval()
    ours = Transformer(make_config(**choices)).to(device).eval()
    ours.load_state_dict(convert(theirs))
    ids = make_ids(device)
    golden = copy.deepcopy(ours).double()
    results = [loss_gradient(model, ids) for model in (golden, ours, theirs)]
    for exact, plain, other in zip(*results, strict=True):
        # float32 rounding as our own float32 run shows it, times the factor of the contract, and its allowance
        rounding = (plain - exact).abs().max().item()
        allowed = 4 * rounding + 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()
        assert (other - exact).abs().max().item() <= allowed


def loss_gradient(model, ids):
    """Logits of a model, and the gradient of the next-token loss with respect to its token embedding."""
    output = model(ids)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    embedding = model.model.embed_tokens if isinstance(model, Transformer) else model.get_input_embeddings()
    return logits.detach(), embedding.weight.grad


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_greedy_tokens_equal_transformers(family, device):
    make_theirs, convert, choices = FAMILIES[family]
    theirs = randomise(make_theirs()).to(device).eval()
    ours = Transformer(make_config(**choices)).to(device).eval()
    ours.load_state_dict(convert(theirs))
    ids = make_ids(device, seqlen=4)
    expected = theirs.generate(
        ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0
    )
    assert torch.equal(ours.generate(ids, max_new_tokens=8), expected)


# ---- against torch's layer: the post-norm of 2017 ------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_block_equals_torch_encoder_layer(placement, activation, device):
    config = make_config(
        num_kv_heads=HEADS,
        positions="none",
        norm="layer_norm",
        norm_eps=1e-5,
        norm_placement=placement,
        activation=activation,
        attention_bias=True,
        mlp_bias=True,
    )
    block = randomise(Block(config, 0)).double().to(device)
    theirs = nn.TransformerEncoderLayer(
        HIDDEN, HEADS, INTERMEDIATE, 0.0, activation, batch_first=True, norm_first=placement == "pre"
    )
    theirs = theirs.double().to(device)
    names = {
        "self_attn.in_proj_": "attention.qkv_proj.",
        "self_attn.out_proj": "attention.out_proj",
        "linear1": "feed_forward.up_proj",
        "linear2": "feed_forward.down_proj",
        "norm1": "attention_norm",
        "norm2": "feed_forward_norm",
    }
    ours, state = block.state_dict(), {}
    for name in theirs.state_dict():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        state[name] = ours[name.replace(prefix, names[prefix])]
    theirs.load_state_dict(state)
    x = torch.randn(2, 7, HIDDEN, dtype=torch.float64, device=device)
    causal = nn.Transformer.generate_square_subsequent_mask(7, device=device, dtype=torch.float64)
    positions = torch.arange(7, device=device).expand(2, 7)
    assert_close(block(x, Inputs(positions, lengths=[7, 7])), theirs(x, src_mask=causal))


# ---- what the choices mean -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope", "alibi", "none"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_logit_does_not_depend_on_later_tokens(positions, placement, device):
    model = randomise(Transformer(make_config(positions=positions, norm_placement=placement))).double().to(device)
    ids = make_ids(device)
    changed = ids.clone()
    changed[:, 6:] = (ids[:, 6:] + 1) % VOCAB
    logits, logits_of_changed = model(ids), model(changed)
    assert torch.equal(logits[:, :6], logits_of_changed[:, :6])
    assert not torch.isclose(logits[:, 6:], logits_of_changed[:, 6:]).any(dim=-1).all()
    assert ("model.norm.weight" in model.state_dict()) == (placement == "pre")


@pytest.mark.parametrize(
    ("positions", "matters"),
    [("none", False), ("sinusoidal", True), ("learned", True), ("rope", True), ("alibi", True)],
)
def test_order_of_earlier_tokens_matters_through_positions_only(positions, matters, device):
    """Seen by the last token of a single layer, the tokens before it are a set unless positions tell them apart."""
    model = randomise(Transformer(make_config(positions=positions, num_layers=1))).double().to(device)
    ids = torch.tensor([[3, 8, 5, 1, 9]], device=device)
    swapped = ids[:, [2, 1, 0, 3, 4]]
    same = torch.allclose(model(ids)[:, -1], model(swapped)[:, -1])
    assert same != matters


def test_sliding_window_counts_the_token_itself(device):
    model = randomise(Transformer(make_config(sliding_window=3, num_layers=1))).double().to(device)
    ids = make_ids(device)
    for changed_at in range(11):
        changed = ids.clone()
        changed[:, changed_at] = (ids[:, changed_at] + 1) % VOCAB
        differs = (model(ids) - model(changed)).abs().amax(dim=(0, 2)) > 0
        expected = [changed_at <= t < changed_at + 3 for t in range(11)]
        assert differs.tolist() == expected


def test_partial_and_interleaved_rope_change_the_model(device):
    """Same weights, other meaning: a configuration that is not passed on would not be seen otherwise."""
    ids = make_ids(device)
    plain = randomise(Transformer(make_config())).double().to(device)
    for change in (
        {"rotary_dim": 4},
        {"rope_interleaved": True},
        {"rope_base": 50.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        {"softmax_scale": 0.1},
        {"attention_softcap": 0.5},
        {"norm_weight_offset": 1.0},
        {"scale_embeddings": True},
    ):
        other = Transformer(make_config(**change)).double().to(device)
        other.load_state_dict(plain.state_dict())
        assert not torch.allclose(other(ids), plain(ids)), change


def test_weight_offset_applies_to_every_norm(device):
    """Weights stored as differences from 1 give the model that has the sums as its weights, QK-norm included."""
    plain = randomise(Transformer(make_config(qk_norm=True))).double().to(device)
    offset = Transformer(make_config(qk_norm=True, norm_weight_offset=1.0)).double().to(device)
    state = plain.state_dict()
    offset.load_state_dict({name: value - 1 if "norm" in name else value for name, value in state.items()})
    ids = make_ids(device)
    assert_close(offset(ids), plain(ids))


def test_logit_softcap(device):
    plain = randomise(Transformer(make_config())).double().to(device)
    capped = Transformer(make_config(logit_softcap=2.0)).double().to(device)
    capped.load_state_dict(plain.state_dict())
    ids = make_ids(device)
    assert_close(capped(ids), 2 * torch.tanh(plain(ids) / 2))


def test_model_and_head_are_the_two_halves(device):
    model = Transformer(make_config()).to(device)
    ids = make_ids(device)
    hidden = model.model(ids)
    assert hidden.shape == (2, 11, HIDDEN)
    assert torch.equal(model.lm_head(hidden), model(ids)) and model(ids).shape == (2, 11, VOCAB)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu", F.relu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("swiglu", lambda x: F.silu(x[..., :4]) * x[..., 4:]),
        ("geglu", lambda x: F.gelu(x[..., :4]) * x[..., 4:]),
        ("geglu_tanh", lambda x: F.gelu(x[..., :4], approximate="tanh") * x[..., 4:]),
        ("silu", F.silu),
        ("reglu", lambda x: F.relu(x[..., :4]) * x[..., 4:]),
    ],
)
def test_activations_equal_torch(name, expected, device):
    x = torch.randn(5, 8, dtype=torch.float64, device=device) * 3
    assert_close(activate(name, x), expected(x))


@pytest.mark.parametrize("rate", ["embedding_dropout", "attention_dropout", "residual_dropout", "feed_forward_dropout"])
def test_each_dropout_acts_in_training_only_and_follows_the_seed(rate, device):
    plain = randomise(Transformer(make_config())).double().to(device)
    model = Transformer(make_config(**{rate: 0.5})).double().to(device)
    model.load_state_dict(plain.state_dict())
    ids = make_ids(device)
    assert torch.equal(model.eval()(ids), plain(ids))
    model.train()
    torch.manual_seed(1)
    first, second = model(ids), model(ids)
    torch.manual_seed(1)
    assert torch.equal(model(ids), first)
    assert not torch.equal(first, second) and not torch.equal(first, plain(ids))


# ---- weights -------------------------------------------------------------------------------------------------------


def test_state_dict_names_of_both_styles():
    block = "model.layers.0."
    llama = set(Transformer(make_config(num_layers=1, qk_norm=True)).state_dict())
    assert llama == {
        "model.embed_tokens.weight",
        f"{block}attention_norm.weight",
        f"{block}attention.qkv_proj.weight",
        f"{block}attention.q_norm.weight",
        f"{block}attention.k_norm.weight",
        f"{block}attention.out_proj.weight",
        f"{block}feed_forward_norm.weight",
        f"{block}feed_forward.gate_up_proj.weight",
        f"{block}feed_forward.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    gpt2 = set(Transformer(make_config(num_layers=1, **GPT2)).state_dict())
    both = {"attention_norm", "attention.qkv_proj", "attention.out_proj"}
    both |= {"feed_forward_norm", "feed_forward.up_proj", "feed_forward.down_proj"}
    expected = {f"{block}{name}.{part}" for name in both for part in ("weight", "bias")}
    expected |= {"model.embed_tokens.weight", "model.embed_positions.weight", "model.norm.weight", "model.norm.bias"}
    assert gpt2 == expected


def test_tied_head_follows_the_embedding(device):
    model = Transformer(make_config(tie_embeddings=True)).to(device)
    ids = make_ids(device)
    copied = copy.deepcopy(model).double()
    with torch.no_grad():
        copied.model.embed_tokens.weight.mul_(2.0)
    hidden = copied.model(ids)
    assert torch.equal(copied.lm_head(hidden), hidden @ copied.model.embed_tokens.weight.T)
    assert sum(parameter.numel() for parameter in model.lm_head.parameters()) == 0


def test_tied_weight_in_a_state_dict_must_be_the_embedding(device):
    model = Transformer(make_config(tie_embeddings=True)).to(device)
    state = model.state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    twin = Transformer(make_config(tie_embeddings=True)).double().to(device)
    twin.load_state_dict(state)
    assert torch.equal(twin.model.embed_tokens.weight, model.model.embed_tokens.weight.double())
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(RuntimeError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        twin.load_state_dict(state)


# ---- generation and refusals ---------------------------------------------------------------------------------------


def test_generate_appends_the_most_probable_token(device):
    model = randomise(Transformer(make_config())).to(device).eval()
    ids = make_ids(device, seqlen=3)
    generated = model.generate(ids, max_new_tokens=4)
    assert generated.shape == (2, 7) and torch.equal(generated[:, :3], ids)
    for t in range(3, 7):
        assert torch.equal(generated[:, t], model(generated[:, :t])[:, -1].argmax(-1))
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)
    assert model.generate(ids, max_new_tokens=1000).shape == (2, MAX_SEQLEN)


def test_generate_stops_at_the_end_token_and_pads(device):
    model = randomise(Transformer(make_config(pad_token_id=VOCAB - 1))).to(device).eval()
    ids = make_ids(device, seqlen=3)
    free = model.generate(ids, max_new_tokens=8)
    end = int(free[0, 5])  # produced by the first sequence as its third token, at the latest
    generated = model.generate(ids, max_new_tokens=8, eos_token_id=end)
    for row, free_row in zip(generated.tolist(), free.tolist(), strict=True):
        stop = free_row.index(end, 3) + 1 if end in free_row[3:] else len(free_row)
        assert row[: min(stop, len(row))] == free_row[: min(stop, len(row))]
        assert set(row[stop:]) <= {VOCAB - 1}
    alone = model.generate(ids[:1], max_new_tokens=8, eos_token_id=end)
    assert alone[0, -1] == end and alone.shape[1] <= 6


def test_refusals(device):
    with pytest.raises(ValueError, match="'batch_norm'"):
        Norm("batch_norm", 4, eps=1e-5)
    with pytest.raises(ValueError, match="'tanh'"):
        activate("tanh", torch.ones(4))
    with pytest.raises(ValueError, match="that is EncoderDecoder"):
        Transformer(make_config(architecture="encoder-decoder"))
    with pytest.raises(ValueError, match="got 'decoder'"):
        EncoderDecoder(make_config())
    model = Transformer(make_config()).to(device)
    with pytest.raises(ValueError, match="25 tokens, but max_seqlen is 24"):
        model(make_ids(device, seqlen=MAX_SEQLEN + 1))
