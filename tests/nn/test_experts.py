"""The mixture of experts: transformers' blocks, a sum written out, both of its ways, routing of every kind, and its losses."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch.testing import assert_close
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral import modeling_mixtral
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from pytransformer import use_backend
from pytransformer.nn import FeedForward, MixtureOfExperts, expert_loop
from pytransformer.nn.experts import load_balancing_loss, router_z_loss
from pytransformer.verification import SEEDS, Contract

HIDDEN, EXPERT, EXPERTS, CHOSEN = 16, 12, 6, 2
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_clamped")
WAYS = ("loop", "grouped")


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """On a CPU one expert after another, or as on a GPU all of them in two grouped products."""
    if request.param == "grouped":
        monkeypatch.setattr(expert_loop, "serves", lambda *tensors: False)
    return request.param


def make(device=None, dtype=None, **options):
    module = MixtureOfExperts(HIDDEN, EXPERT, EXPERTS, CHOSEN, device=device, dtype=dtype, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def draw(device=None, *shape, dtype=None):
    return torch.randn(*(shape or (2, 5)), HIDDEN, device=device, dtype=dtype).requires_grad_()


def written_out(module, x):
    """Each token, each of its experts."""
    out = []
    for token in x.flatten(0, -2):
        logits = module.router(token)
        weights, chosen = logits.softmax(-1).topk(module.experts_per_token)
        if module.norm_topk_prob:
            weights = weights / weights.sum()
        total = torch.zeros_like(token)
        for weight, expert in zip(weights, chosen.tolist()):
            total = total + weight * one_expert(module.experts, expert)(token)
        if module.shared_expert is not None:
            shared = module.shared_expert(token)
            total = total + (
                shared if module.shared_expert_gate is None else shared * module.shared_expert_gate(token).sigmoid()
            )
        out.append(total)
    return torch.stack(out).view(x.shape)


def golden(module, x):
    """Output, and gradients of x and the weights, as they are written out in float64; the module stays as it is."""
    wide = copy.deepcopy(module).double()
    found = with_gradients(lambda x: written_out(wide, x), x.detach().double().requires_grad_(), wide.parameters())
    return results(module, found)


def results(module, found):
    out, (dx, *gradients) = found
    names = [f"grad {name}" for name, _ in module.named_parameters()]
    return {"out": out.detach(), "grad x": dx, **dict(zip(names, gradients))}


def compare(module, actual, plain, x):
    """The contract of what the module made of x, beside another float32 way."""
    contract, exact = Contract(torch.float32), golden(module, x)
    for name, value in actual.items():
        kind = "gradient" if name.startswith("grad") else "output"
        contract.add(name, actual=value, plain=plain[name], golden=exact[name], kind=kind)
    contract.check()


def one_expert(experts, index):
    """An expert as a feed-forward network of its own, with the same weights under autograd."""
    first = "gate_up" if hasattr(experts, "gate_up_proj") else "up"
    biased = experts.down_bias is not None
    network = FeedForward(HIDDEN, EXPERT, activation=experts.activation, bias=biased, dtype=experts.down_proj.dtype)
    state = {
        f"{first}_proj.weight": getattr(experts, f"{first}_proj")[index],
        "down_proj.weight": experts.down_proj[index],
    }
    if experts.down_bias is not None:
        state |= {
            f"{first}_proj.bias": getattr(experts, f"{first}_bias")[index],
            "down_proj.bias": experts.down_bias[index],
        }
    return lambda token: torch.func.functional_call(network, state, (token,))


def with_gradients(function, x, parameters):
    out = function(x)
    return out, torch.autograd.grad(out.square().sum(), [x, *parameters])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_sum_written_out(activation, way):
    module = make(dtype=torch.float64, activation=activation, bias=True, router_bias=True)
    x = draw(dtype=torch.float64)
    assert_close(*(with_gradients(f, x, module.parameters()) for f in (module, lambda x: written_out(module, x))))


@pytest.mark.parametrize(
    "options",
    [
        {"norm_topk_prob": False},
        {"shared_expert_size": 8},
        {"shared_expert_size": 8, "shared_expert_gate": True, "bias": True},
    ],
    ids=str,
)
def test_options_are_the_sum_written_out(options, way):
    module, x = make(dtype=torch.float64, **options), draw(dtype=torch.float64)
    assert_close(*(with_gradients(f, x, module.parameters()) for f in (module, lambda x: written_out(module, x))))


def load(module, theirs, halves_interleaved=False):
    """Our module with the weights of transformers' block."""
    module.load_state_dict(renamed(theirs.state_dict(), halves_interleaved))
    return module


def renamed(tensors, halves_interleaved):
    """Tensors of transformers' block under our names, and in our layout."""
    ours = {}
    for name, value in tensors.items():
        name = name.replace("gate.", "router.", 1) if name.startswith("gate.") else name
        name = name.replace("gate_up_proj_bias", "gate_up_bias").replace("down_proj_bias", "down_bias")
        if halves_interleaved and "experts" in name:  # (experts, in, out), gate and up in turns
            value = value.mT if name.endswith("proj") else value
            if "gate_up" in name:
                value = torch.cat((value[:, ::2], value[:, 1::2]), dim=1)
        ours[name] = value
    return ours


def their_block(kind):
    common = {"hidden_size": HIDDEN, "num_experts_per_tok": CHOSEN, "num_attention_heads": 2}
    if kind == "Mixtral":
        return MixtralSparseMoeBlock(MixtralConfig(**common, intermediate_size=EXPERT, num_local_experts=EXPERTS)), {}
    if kind == "Qwen3-MoE":
        config = Qwen3MoeConfig(**common, moe_intermediate_size=EXPERT, num_experts=EXPERTS, norm_topk_prob=False)
        return Qwen3MoeSparseMoeBlock(config), {"norm_topk_prob": False}
    config = GptOssConfig(**common, intermediate_size=EXPERT, num_local_experts=EXPERTS)
    return GptOssMLP(config), {"activation": "swiglu_clamped", "bias": True, "router_bias": True}


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3-MoE", "GPT-OSS"])
def test_it_is_transformers_block(kind, way):
    theirs, options = their_block(kind)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=1.0)  # GPT-OSS' limits are met, too
    module = load(MixtureOfExperts(HIDDEN, EXPERT, EXPERTS, CHOSEN, **options), theirs, kind == "GPT-OSS")
    contract = Contract(torch.float32)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        x = draw()
        out, gradients = with_gradients(module, x, module.parameters())
        expected, (dx, *weights) = with_gradients(lambda x: _first(theirs(x)), x, theirs.parameters())
        # Their gradients under our names and in our layout, as their weights.
        named = {name: gradient for (name, _), gradient in zip(theirs.named_parameters(), weights)}
        named = {f"grad {name}": value for name, value in renamed(named, kind == "GPT-OSS").items()}
        exact, actual = golden(module, x), results(module, (out, gradients))
        for name, plain in {"out": expected.detach(), "grad x": dx, **named}.items():
            as_kind = "gradient" if name.startswith("grad") else "output"
            contract.add(name, actual=actual[name], plain=plain, golden=exact[name], kind=as_kind)
    contract.check()


def _first(found):
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_one_sided_routing_and_few_tokens(tokens, way, poison_empty):
    """All tokens to the same two experts; the gradients of the others are zeros."""
    module, x = make(router_bias=True), draw(None, tokens)
    with torch.no_grad():
        module.router.bias.copy_(torch.tensor([-99.0, 99, -99, -99, 99, -99]))
    out, (dx, *gradients) = with_gradients(module, x, module.parameters())
    assert out.shape == x.shape and dx.shape == x.shape
    for (name, _), gradient in zip(module.named_parameters(), gradients):
        assert bool(gradient.isfinite().all()), name
        if name.startswith("experts"):
            assert gradient[[0, 2, 3, 5]].eq(0).all() and (tokens == 0 or gradient[[1, 4]].ne(0).any()), name
    if tokens:
        assert_close(out, written_out(module, x))


def test_both_ways_in_bfloat16_keep_the_weights_in_float32(monkeypatch):
    """A weight of 1 - 2⁻¹⁰, which bfloat16 rounds to 1, counts: two experts that cancel but for it leave what it leaves."""
    module = make(dtype=torch.bfloat16, activation="relu")
    with torch.no_grad():
        module.experts.up_proj.fill_(1.0)
        module.experts.down_proj.fill_(1.0)
        module.experts.down_proj[1].fill_(-1.0)
    x = torch.ones(1, HIDDEN, dtype=torch.bfloat16)
    chosen, weights = torch.tensor([[0, 1]]), torch.tensor([[1.0, 1 - 2**-10]])
    size = HIDDEN * EXPERT
    for serves in (expert_loop.serves, lambda *tensors: False):
        monkeypatch.setattr(expert_loop, "serves", serves)
        assert_close(module.experts(x, chosen, weights), torch.full_like(x, size * 2**-10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loop_and_the_grouped_products_agree(dtype, monkeypatch):
    module, x = make(dtype=dtype, bias=True), draw(None, 9, dtype=dtype)
    found = [with_gradients(module, x, module.parameters())]
    monkeypatch.setattr(expert_loop, "serves", lambda *tensors: False)
    found.append(with_gradients(module, x, module.parameters()))
    if dtype == torch.float32:
        compare(module, *(results(module, each) for each in found), x)
    else:
        assert_close(*found)


def test_what_needs_no_gradient_gets_none(way):
    module, x = make(bias=True), draw().detach()
    for frozen in ("router", "experts.gate_up", "experts.down_bias"):
        for name, parameter in module.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(not name.startswith(frozen))
        module(x).sum().backward()
        for name, parameter in module.named_parameters():
            assert (parameter.grad is None) == name.startswith(frozen), (frozen, name)


def test_by_triton(device):
    module, x = make(device), draw(device, 5)
    expected = results(module, with_gradients(module, x, module.parameters()))
    with use_backend("triton"):
        actual = results(module, with_gradients(module, x, module.parameters()))
    compare(module, actual, expected, x)
    with use_backend("cuda"):
        assert_close(module(x), expected["out"])


def test_compiles_whole_and_goes_through_torch_func(device):
    module, x = make(device), draw(device, 6)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = with_gradients(module, x, module.parameters())
    assert_close(with_gradients(compiled, x, module.parameters()), expected)
    weights = dict(module.named_parameters())
    gradients = torch.func.grad(lambda w: torch.func.functional_call(module, w, (x.detach(),)).square().sum())(weights)
    assert_close(list(gradients.values()), list(expected[1][1:]))


def test_under_autocast(device):
    module, x = make(device), draw(device, 6)
    with torch.autocast(device.type, torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())


def test_dropout_is_of_training(device):
    module, x = make(device, dropout=0.5), draw(device, 6)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_a_second_derivative_is_refused(way):
    module, x = make(), draw()
    with pytest.raises(RuntimeError, match=r"double backward|differentiate twice"):
        (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        dx.sum().backward()


def test_names_of_the_weights():
    gated = MixtureOfExperts(8, 4, 3, bias=True, router_bias=True, shared_expert_size=6, shared_expert_gate=True)
    assert {name: tuple(value.shape) for name, value in gated.state_dict().items()} == {
        "router.weight": (3, 8), "router.bias": (3,),
        "experts.gate_up_proj": (3, 8, 8), "experts.gate_up_bias": (3, 8), "experts.down_proj": (3, 8, 4), "experts.down_bias": (3, 8),
        "shared_expert.gate_up_proj.weight": (12, 8), "shared_expert.gate_up_proj.bias": (12,),
        "shared_expert.down_proj.weight": (8, 6), "shared_expert.down_proj.bias": (8,), "shared_expert_gate.weight": (1, 8),
    }  # fmt: skip
    assert set(MixtureOfExperts(8, 4, 3, activation="gelu").state_dict()) == {
        "router.weight",
        "experts.up_proj",
        "experts.down_proj",
    }


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
        ({"experts_per_token": 5}, ValueError, "experts_per_token must be between 1 and 4, got 5"),
        ({"activation": "selu"}, ValueError, "activation must be one of .*, got 'selu'"),
        ({"shared_expert_gate": True}, ValueError, "shared_expert_gate=True needs a shared expert"),
        ({"norm_topk_prob": 1}, TypeError, "norm_topk_prob must be True or False, got 1"),
        ({"activation_limit": 0.0}, ValueError, "activation_limit must be above 0, got 0.0"),
        ({"expert_size": 2.5}, TypeError, "expert_size must be an int, got 2.5"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        MixtureOfExperts(**{"hidden_size": 8, "expert_size": 4, "num_experts": 4, **options})


# --- losses -----------------------------------------------------------------------------------------------------------------------------


def test_logits_are_collected_for_the_losses():
    module, x, logits = make(), draw(), []
    module(x, router_logits=logits)
    module(x, router_logits=logits)
    assert [tuple(each.shape) for each in logits] == [(10, EXPERTS)] * 2
    assert_close(logits[0], module.router(x).flatten(0, 1))
    (load_balancing_loss(logits, CHOSEN) + router_z_loss(logits)).backward()
    assert module.router.weight.grad.ne(0).any()


@pytest.mark.parametrize("masked", [False, True])
def test_of_one_layer_the_loss_is_transformers(masked):
    logits = 3 * torch.randn(10, EXPERTS)
    mask = (torch.rand(2, 5) > 0.3).long() if masked else None
    expected = modeling_mixtral.load_balancing_loss_func((logits,), EXPERTS, CHOSEN, mask)
    assert_close(load_balancing_loss([logits], CHOSEN, mask), expected)
    assert_close(load_balancing_loss([logits] * 3, CHOSEN, mask), expected)


def test_opposite_imbalances_of_two_layers_do_not_cancel():
    """Layer 1 sends every token to expert 0, layer 2 to expert 1: transformers' Mixtral sees two experts chosen equally often."""
    logits = torch.full((2, 8, 2), -10.0)
    logits[0, :, 0] = logits[1, :, 1] = 10.0
    assert_close(load_balancing_loss(list(logits), 1), torch.tensor(2.0))
    assert_close(modeling_mixtral.load_balancing_loss_func(tuple(logits), 2, 1), torch.tensor(1.0))


def test_balance_has_the_least_loss():
    even = torch.zeros(4, 4).fill_diagonal_(1.0)
    assert_close(load_balancing_loss([even], 1), torch.tensor(1.0))
    assert all(
        load_balancing_loss([even[list(rows)]], 1) >= 1.0
        for rows in itertools.islice(itertools.product(range(4), repeat=4), 40)
    )


def test_z_loss_is_the_formula():
    logits = [torch.randn(6, 4), torch.randn(6, 4)]
    mask = torch.tensor([1, 1, 0, 1, 0, 1])
    squares = [[math.log(sum(map(math.exp, row))) ** 2 for row in each.tolist()] for each in logits]
    assert_close(router_z_loss(logits), torch.tensor(sum(map(sum, squares)) / 12))
    kept = sum(value for rows in squares for value, keep in zip(rows, mask.tolist()) if keep)
    assert_close(router_z_loss(logits, mask), torch.tensor(kept / 8))


def test_errors_of_the_losses():
    with pytest.raises(ValueError, match="at least one layer"):
        load_balancing_loss([], 2)
    with pytest.raises(ValueError, match=r"router_logits\[0\] must have 2 dimensions"):
        router_z_loss([torch.zeros(2, 3, 4)])
    with pytest.raises(ValueError, match=r"mask must have an element for each of the 6 tokens"):
        load_balancing_loss([torch.zeros(6, 4)], 2, torch.ones(5))
    with pytest.raises(ValueError, match="experts_per_token must be between 1 and 4, got 5"):
        load_balancing_loss([torch.zeros(6, 4)], 5)
