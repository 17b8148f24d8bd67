"""patch and unpatch: what is replaced, what is left and why, and that nothing else changes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import pytransformer.nn as ptnn
from pytransformer.nn import patch, unpatch
from pytransformer.verification import SEEDS, Contract


class LlamaRMSNorm(nn.Module):
    """As libraries write it: rounded before the weight."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


class GemmaRMSNorm(LlamaRMSNorm):
    """The weight is a difference from 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class OddRMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * gate


class BrokenRMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("no")


class NoEpsilonRMSNorm(LlamaRMSNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        del self.variance_epsilon


class QuietLayerNorm(nn.LayerNorm):
    """A subclass that keeps torch's forward."""


class LoudLayerNorm(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class LibraryAttention(nn.Module):
    pass


class Block(nn.Module):
    """Every kind that is served, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LayerNorm(16)
        self.second = nn.RMSNorm(16)
        self.third = LlamaRMSNorm(16)
        self.fourth = GemmaRMSNorm(16)
        self.fifth = QuietLayerNorm((4, 4), elementwise_affine=False)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.tied = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm in (self.first, self.second, self.third, self.fourth, self.tied):
            x = x + norm(x)
        x = x + self.fifth(x.unflatten(-1, (4, 4))).flatten(-2)
        return x + self.attention(x, x, x, need_weights=False)[0]


def model(device, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(Block(), nn.Linear(16, 16), Block()).to(device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def snapshot(module):
    modules = {name: (each, type(each), set(each.__dict__)) for name, each in module.named_modules()}
    return (
        modules,
        dict(module.named_parameters()),
        {name: tensor.clone() for name, tensor in module.state_dict().items()},
    )


def same(one, other):
    return (
        one[0] == other[0]
        and all(parameter is other[1][name] for name, parameter in one[1].items())
        and list(one[2]) == list(other[2])
        and all(torch.equal(tensor, other[2][name]) for name, tensor in one[2].items())
    )


def test_results_and_gradients(device):
    contract = Contract(torch.float32)
    for seed in range(SEEDS):
        network = model(device, seed)
        x = torch.randn(2, 5, 16, device=device)
        results = []
        golden_network = copy.deepcopy(network)
        for block in (golden_network[0], golden_network[2]):
            block.third.__class__ = block.fourth.__class__ = WideRMSNorm
            block.fourth.weight.data += 1.0
            block.second.eps = torch.finfo(torch.float32).eps
        for step, each in (("golden", golden_network.double()), ("plain", network), ("actual", network)):
            if step == "actual":
                patch(network)
            dtype = next(each.parameters()).dtype
            out = each(x.to(dtype))
            results.append((out, torch.autograd.grad(out.square().sum(), list(each.parameters()))))
        (golden, golden_gradients), (plain, plain_gradients), (actual, gradients) = results
        contract.add("out", actual=actual, plain=plain, golden=golden)
        for index, three in enumerate(zip(gradients, plain_gradients, golden_gradients)):
            contract.add(f"gradient {index}", actual=three[0], plain=three[1], golden=three[2], kind="gradient")
    contract.check()


class WideRMSNorm(LlamaRMSNorm):
    """In the dtype of its input, for golden results."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


def test_report(device):
    network = model(device)
    report = patch(network)
    assert len(report.replaced) == 12 and not report.left
    assert {(row.was, row.now) for row in report.rows} == {
        ("LayerNorm", "pytransformer.nn.LayerNorm"),
        ("RMSNorm", "pytransformer.nn.RMSNorm"),
        ("LlamaRMSNorm", "pytransformer.rms_norm"),
        ("GemmaRMSNorm", "pytransformer.rms_norm"),
        ("QuietLayerNorm", "pytransformer.nn.LayerNorm"),
        ("MultiheadAttention", "pytransformer.nn.MultiheadAttention"),
    }
    lines = str(report).splitlines()
    assert lines[0] == "12 replaced, 0 left" and len(lines) == 8
    assert any(
        line.split() == ["2", "LlamaRMSNorm", "pytransformer.rms_norm", "0.third", "…", "2.third"] for line in lines
    )
    again = patch(network)
    assert not again.rows


def test_everything_is_given_back_exactly(device):
    network = model(device)
    x = torch.randn(2, 5, 16, device=device)
    before, expected = snapshot(network), network(x)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    patch(network)
    names, parameters, state = snapshot(network)
    assert isinstance(network[0].first, ptnn.LayerNorm) and isinstance(network[0].fifth, QuietLayerNorm)
    assert {name: each[0] for name, each in names.items()} == {name: each[0] for name, each in before[0].items()}
    assert same(({}, parameters, state), ({}, *before[1:]))
    network(x).sum().backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in optimizer.param_groups[0]["params"])
    assert unpatch(network) == 12
    assert same(snapshot(network), before) and torch.equal(network(x), expected)
    assert unpatch(network) == 0


def test_a_model_that_is_itself_a_norm(device):
    norm = nn.LayerNorm(8).to(device)
    report = patch(norm)
    assert type(norm) is ptnn.LayerNorm and "(the model)" in str(report)
    assert unpatch(norm) == 1 and type(norm) is nn.LayerNorm


def test_our_own_modules_are_not_touched(device):
    network = nn.Sequential(ptnn.LayerNorm(8), ptnn.Attention(8, 1)).to(device)
    assert not patch(network).rows and unpatch(network) == 0
    assert type(network[0]) is ptnn.LayerNorm


def replaced_forward():
    norm = nn.LayerNorm(8)
    norm.forward = lambda x: x
    return norm


def compiled():
    norm = nn.LayerNorm(8)
    norm.compile(backend="eager")
    return norm


class Wrapped(torch.Tensor):
    pass


def sharded():
    norm = nn.LayerNorm(8)
    norm.weight = nn.Parameter(torch.ones(8).as_subclass(Wrapped))
    return norm


def with_bias():
    norm = LlamaRMSNorm(8)
    norm.bias = nn.Parameter(torch.zeros(8))
    return norm


LEFT = {
    "a subclass of LayerNorm with a forward of its own": lambda: LoudLayerNorm(8),
    "its forward has been replaced on the instance": replaced_forward,
    "compiled by module.compile(): patch first": compiled,
    "its weight is a Wrapped": sharded,
    "another kind of norm": lambda: nn.GroupNorm(2, 8),
    "attention of another library (transformers' takes attn_implementation='pytransformer')": LibraryAttention,
    "its forward takes (x, gate)": lambda: GatedRMSNorm(8),
    "its forward could not be tried: KeyError: 'no'": lambda: BrokenRMSNorm(8),
    "its forward computes neither norm(x) · weight nor norm(x) · (1 + weight)": lambda: OddRMSNorm(8),
    "its epsilon is not found": lambda: NoEpsilonRMSNorm(8),
    "not a norm with one weight: it has weight (8,), bias (8,)": with_bias,
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_is_left_and_why(reason):
    module = LEFT[reason]()
    kind = type(module)
    report = patch(nn.Sequential(module))
    assert [(row.name, row.now, row.reason) for row in report.rows] == [("0", None, reason)]
    assert type(module) is kind and f"left  0      {reason}" in str(report)
    assert report.left == report.rows and not report.replaced


def test_hooks_stay_and_run(device):
    network = model(device)
    x = torch.randn(2, 5, 16, device=device)
    seen = []
    handle = network[0].third.register_forward_hook(lambda module, args, output: seen.append(output))
    network[0].attention.register_full_backward_hook(lambda module, *gradients: seen.append(gradients))
    patch(network)
    network(x).sum().backward()
    assert len(seen) == 2
    handle.remove()
    network(x)
    assert len(seen) == 2


def test_copies_and_files(device):
    network = model(device)
    x = torch.randn(2, 5, 16, device=device)
    plain = network(x)
    patch(network)
    expected = network(x)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    for twin in (copy.deepcopy(network), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), expected)
        assert unpatch(twin) == 12 and torch.equal(twin(x), plain)


def test_a_weight_of_another_dtype_is_left_to_its_own_forward(device):
    """Llama's norm promotes to the weight's dtype, Gemma's returns the input's."""
    for kind in (LlamaRMSNorm, GemmaRMSNorm):
        norm = kind(16).to(device)
        x = torch.randn(3, 16, device=device, dtype=torch.bfloat16)
        expected = norm(x)
        assert patch(norm).replaced
        actual = norm(x)
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
def test_other_libraries_norms_in_bfloat16(kind, device):
    contract = Contract(torch.bfloat16)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        norm = kind(16)
        nn.init.normal_(norm.weight)
        norm = norm.to(device, torch.bfloat16)
        x = torch.randn(64, 16, device=device, dtype=torch.bfloat16)
        plain = norm(x)
        patch(norm)
        wide = x.double()
        offset = 1.0 if kind is GemmaRMSNorm else 0.0
        golden = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * (norm.weight.double() + offset)
        contract.add("y", actual=norm(x), plain=plain, golden=golden)
    contract.check()


def test_recognising_draws_no_random_numbers():
    state = torch.get_rng_state()
    patch(LlamaRMSNorm(16))
    assert torch.equal(torch.get_rng_state(), state)


def test_modules_on_the_meta_device():
    with torch.device("meta"):
        network = nn.Sequential(LlamaRMSNorm(16), GemmaRMSNorm(16))
    assert len(patch(network).replaced) == 2


def test_a_class_that_changed_since(device):
    network = model(device)
    patch(network)
    network[0].first.__class__ = LoudLayerNorm
    with pytest.raises(RuntimeError, match=r"0\.first has become a LoudLayerNorm since it was patched"):
        unpatch(network)
    network[0].first.__class__ = ptnn.LayerNorm
    assert unpatch(network) == 12


def test_only_modules():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        patch({})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_encoder_takes_no_nested_tensors_while_patched(device):
    """In eval mode torch's encoder would hand nested tensors to a function that goes past the layers' attention."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).to(device).eval()
    x = torch.randn(2, 5, 16, device=device)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2], device=device)
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        patch(encoder)
        torch.testing.assert_close(encoder(x, src_key_padding_mask=padding)[~padding], expected[~padding])
        unpatch(encoder)
        assert encoder.use_nested_tensor and torch.equal(encoder(x, src_key_padding_mask=padding), expected)


def test_fullgraph(device):
    torch._dynamo.reset()
    network = Block().to(device)
    patch(network)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    x = torch.randn(2, 5, 16, device=device)
    torch.testing.assert_close(compiled(x), network(x))


def test_transformers_norms(device):
    pytest.importorskip("transformers")
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
    from transformers.models.llama import modeling_llama
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    offsets = {modeling_llama.LlamaRMSNorm: 0.0, Gemma2RMSNorm: 1.0, GptOssRMSNorm: 0.0, T5LayerNorm: 0.0}
    for kind, offset in offsets.items():
        contract = Contract(torch.float32)
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            norm = kind(16).to(device)
            nn.init.normal_(norm.weight)
            x = torch.randn(64, 16, device=device)
            plain = norm(x)
            assert [row.now for row in patch(norm).rows] == ["pytransformer.rms_norm"] and isinstance(norm, kind)
            golden = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
            contract.add("y", actual=norm(x), plain=plain, golden=golden * (norm.weight.double() + offset))
        contract.check()
