"""linear_attention as people call it: the contract at the borders of chunks, state, autograd, transforms, compilation, bad input."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from torch import Tensor

import pytransformer
from pytransformer import linear_attention, reference, use_backend
from pytransformer.ops.linear_attention.by_torch import CHUNK
from pytransformer.verification import SEEDS, Contract

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
ALL_BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])
OPTIONS = {
    "causal": {},
    "causal, decay": {"decay": torch.tensor([0.95, 0.5])},
    "causal, not normalised": {"normalize": False},
    "causal, given features": {"feature_map": None, "normalize": False},
    "full": {"causal": False},
}
BORDERS = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 1)


def draw(device: torch.device, dtype: torch.dtype = FLOAT32, seqlen: int = 9, heads: tuple[int, int] = (4, 2)) -> list:
    shapes = ((heads[0], 16), (heads[1], 16), (heads[1], 8))
    return [torch.randn(2, seqlen, *shape).to(device, dtype).requires_grad_() for shape in shapes]


def place(options: dict, device: torch.device, dtype: torch.dtype = FLOAT32) -> dict:
    wide = torch.promote_types(dtype, FLOAT32)
    return {name: value.to(device, wide) if isinstance(value, Tensor) else value for name, value in options.items()}


def results(function, tensors: list[Tensor], dtype: torch.dtype, device: torch.device, options: dict) -> tuple:
    """Outputs, and gradients for output gradients that are the same in every dtype. ``tensors``: q, k, v and the initial S and z."""
    wide = torch.promote_types(dtype, FLOAT32)
    leaves = [tensor.detach().to(device, dtype).requires_grad_() for tensor in tensors[:3]]
    leaves += [tensor.detach().to(device, wide).requires_grad_() for tensor in tensors[3:]]
    names = ["q", "k", "v", "S", "z"]
    options = place(options, device, dtype)
    if "decay" in options:
        names.append("decay")
        leaves.append(options["decay"].clone().requires_grad_())
        options["decay"] = leaves[-1]
    out, state = function(*leaves[:3], initial_state=tuple(leaves[3:5]), return_state=True, **options)
    outputs = (out, *state)
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randn(out.shape, generator=generator).to(BFLOAT16).to(device, out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, leaves, drawn, materialize_grads=True)
    return dict(zip(("out", "S", "z"), outputs)), {f"d{name}": found for name, found in zip(names, gradients)}


def draw_with_state(device: torch.device, dtype: torch.dtype, seqlen: int, heads: tuple[int, int] = (4, 2)) -> list:
    inputs = draw(device, dtype, seqlen, heads)
    return [*inputs, torch.randn(2, heads[1], 16, 8, device=device), 0.5 + torch.rand(2, heads[1], 16, device=device)]


def check_contract(
    device: torch.device, dtype: torch.dtype, seqlen: int, heads: tuple[int, int], options: dict
) -> None:
    contract = Contract(dtype)
    cpu = torch.device("cpu")
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        tensors = draw_with_state(device, dtype, seqlen, heads)
        actual = results(functools.partial(linear_attention, backend="torch"), tensors, dtype, device, options)
        plain = results(reference.linear_attention, tensors, dtype, cpu, options)
        golden = results(reference.linear_attention, tensors, torch.float64, cpu, options)
        for values, kind in zip(zip(actual, plain, golden), ("output", "gradient")):
            contract.add_all(*values, kind=kind)
    contract.check()


# --- the contract -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("name", OPTIONS)
def test_contract(name: str, dtype: torch.dtype, device: torch.device) -> None:
    check_contract(device, dtype, CHUNK + 7, (4, 2), OPTIONS[name])


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (3, 1)])
def test_contract_of_heads(heads: tuple[int, int], device: torch.device) -> None:
    check_contract(device, FLOAT32, 5, heads, {"decay": torch.full((heads[1],), 0.75)})


@pytest.mark.parametrize("seqlen", BORDERS)
@pytest.mark.parametrize("name", OPTIONS)
def test_borders_of_chunks(name: str, seqlen: int, device: torch.device) -> None:
    """float64, so that whatever is missing or counted twice is seen."""
    tensors, options = draw_with_state(device, torch.float64, seqlen), OPTIONS[name]
    actual = results(functools.partial(linear_attention, backend="torch"), tensors, torch.float64, device, options)
    golden = results(reference.linear_attention, tensors, torch.float64, device, options)
    torch.testing.assert_close(actual, golden)


def test_more_keys_than_queries(device: torch.device) -> None:
    q, _, _ = draw(device, seqlen=3)
    _, k, v = draw(device, seqlen=CHUNK + 2)
    expected = reference.linear_attention(q, k, v, causal=False)
    torch.testing.assert_close(linear_attention(q, k, v, causal=False), expected)
    nothing = linear_attention(q, k[:, :0], v[:, :0], causal=False)
    assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_ends_of_decay(decay: float, device: torch.device) -> None:
    """1 forgets nothing, 0 all but the token itself, whose value is then the result."""
    q, k, v = draw(device, seqlen=CHUNK + 3, heads=(2, 2))
    factors = torch.full((2,), decay, device=device, requires_grad=True)
    out = linear_attention(q, k, v, decay=factors)
    torch.testing.assert_close(out, v if decay == 0 else linear_attention(q, k, v))
    assert all(bool(gradient.isfinite().all()) for gradient in torch.autograd.grad(out.sum(), (q, k, v, factors)))


def test_large_and_small_features(device: torch.device) -> None:
    """exp(-25) is far below the precision of elu(x) + 1 in float32, and its ratios count all the same."""
    q, k, v = draw(device)
    k = k.detach() - 25
    expected = reference.linear_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(linear_attention(q, k, v), expected.float())
    largest = torch.full_like(q, 60000, dtype=FLOAT16)
    assert bool(linear_attention(largest, k.half(), v.half()).isfinite().all()), "the sums are not in float16"


# --- state ------------------------------------------------------------------------------------------------------------------------------


@ALL_BACKENDS
@pytest.mark.parametrize("name", ["causal", "causal, decay", "causal, not normalised"])
def test_pieces_with_the_state_handed_on_equal_the_whole(name: str, backend: str, device: torch.device) -> None:
    """Prefill, then tokens one at a time; gradients flow back through the state."""
    q, k, v = draw(device, torch.float64, CHUNK + 8)
    options = {**place(OPTIONS[name], device, torch.float64), "backend": backend}
    whole, last = linear_attention(q, k, v, return_state=True, **options)
    state, outputs, start = None, [], 0
    for length in (CHUNK + 2, 1, 0, 1, 4):
        piece = (tensor[:, start : start + length] for tensor in (q, k, v))
        out, state = linear_attention(*piece, initial_state=state, return_state=True, **options)
        outputs.append(out)
        start += length
    pieces = torch.cat(outputs, dim=1)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(state, last)
    for ours, theirs in zip(*(torch.autograd.grad(out.sin().sum(), (q, k, v)) for out in (pieces, whole))):
        torch.testing.assert_close(ours, theirs)


@ALL_BACKENDS
def test_the_state_given_is_not_written_to(backend: str, device: torch.device) -> None:
    *inputs, state, normalizer = draw_with_state(device, BFLOAT16, 3)
    before = state.clone(), normalizer.clone()
    options = {"return_state": True, "backend": backend}
    _, found = linear_attention(*inputs, initial_state=(state, normalizer), **options)
    assert torch.equal(state, before[0]) and torch.equal(normalizer, before[1])
    assert [tensor.dtype for tensor in found] == [FLOAT32, FLOAT32]
    assert all(tensor.is_contiguous() for tensor in found)


# --- autograd, transforms, compilation ---------------------------------------------------------------------------------------------------


def test_memory_grows_with_the_length_alone(device: torch.device) -> None:
    """What autograd keeps: a matrix of a length by a length would make four times the tokens cost sixteen times the memory."""

    def saved(seqlen: int) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = linear_attention(*draw(device, seqlen=seqlen))
        assert out.requires_grad
        return sum(sizes.values())

    assert saved(32 * CHUNK) < 4.5 * saved(8 * CHUNK)


@ALL_BACKENDS
def test_second_derivatives(backend: str, device: torch.device) -> None:
    q, k, v = draw(device, torch.float64, 3, (2, 1))
    assert torch.autograd.gradgradcheck(functools.partial(linear_attention, backend=backend), (q, k, v))


@ALL_BACKENDS
def test_functorch(backend: str, device: torch.device) -> None:
    q, k, v = draw(device)
    decay = torch.tensor([0.9, 0.5], device=device)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, decay=decay, backend=backend).sin().sum()

    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    inputs = [tensor.detach() for tensor in (q, k, v)]
    for ours, theirs in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*inputs), expected):
        torch.testing.assert_close(ours, theirs)
    stacked = [torch.stack([tensor, 2 * tensor]) for tensor in inputs]
    mapped = torch.func.vmap(functools.partial(linear_attention, decay=decay, backend=backend))(*stacked)
    torch.testing.assert_close(mapped[1], linear_attention(*(2 * tensor for tensor in inputs), decay=decay))


def test_forward_mode(device: torch.device) -> None:
    q, k, v = (tensor.detach() for tensor in draw(device, torch.float64))
    _, tangent = torch.func.jvp(lambda v: linear_attention(q, k, v), (v,), (k[..., :8],))
    torch.testing.assert_close(tangent, linear_attention(q, k, k[..., :8].contiguous()))


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_whole(dynamic: bool, device: torch.device) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, normalizer: Tensor) -> tuple:
        options = {"decay": decay, "initial_state": (state, normalizer), "return_state": True}
        out, (state, normalizer) = linear_attention(2 * q, k, v, **options)
        return out + 1, state, normalizer

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    # A graph for each number of chunks, of which those of unknown lengths take the compiler long: there one, without its backward pass.
    for seqlen in (5, 7) if dynamic else (CHUNK + 3,):
        given = (
            *draw(device, seqlen=seqlen),
            torch.tensor([0.9, 0.5], device=device),
            *draw_with_state(device, FLOAT32, 1)[3:],
        )
        with torch.set_grad_enabled(not dynamic):
            expected, actual = step(*given), compiled(*given)
        torch.testing.assert_close(actual, expected)
        if dynamic:
            continue
        for ours, theirs in zip(*(torch.autograd.grad(out[0].square().sum(), given[:3]) for out in (actual, expected))):
            torch.testing.assert_close(ours, theirs)


def test_opcheck(device: torch.device) -> None:
    q, k, v, state, normalizer = (tensor.detach() for tensor in draw_with_state(device, BFLOAT16, 5))
    op, decay = torch.ops.pytransformer.linear_attention, torch.tensor([0.9, 0.5], device=device)
    for backend in ("torch", "reference", "triton"):
        torch.library.opcheck(op, (q, k, v, decay, state, normalizer, "elu", True, True, True, backend))
        torch.library.opcheck(op, (q[:, ::2], k, v, None, None, None, "identity", False, False, False, backend))


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_opcheck_of_the_backward_pass(backend: str, device: torch.device) -> None:
    q, k, v, state, normalizer = (tensor.detach() for tensor in draw_with_state(device, FLOAT32, 5))
    op, decay = torch.ops.pytransformer.linear_attention_backward, torch.tensor([0.9, 0.5], device=device)
    out = torch.randn(2, 5, 4, 8, device=device)
    denominator = 1 + torch.rand(2, 4, 5, device=device)
    given = (out, denominator, out, state, normalizer, q, k, v, decay, state, normalizer)
    torch.library.opcheck(op, (*given, "elu", True, True, True, True, backend))


def test_triton_through_compiler_and_transforms(device: torch.device) -> None:
    """As a whole graph with its gradients, by torch.func, mapped, and under autocast: what torch gives."""
    q, k, v = (tensor.detach() for tensor in draw(device))
    decay = torch.tensor([0.9, 0.5], device=device)

    def loss(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, backend: str = "triton") -> Tensor:
        out, (state, _) = linear_attention(q, k, v, decay=decay, return_state=True, backend=backend)
        return out.sin().sum() + state.square().sum()

    inputs = (q, k, v, decay)
    expected = torch.func.grad(functools.partial(loss, backend="torch"), argnums=(0, 1, 2, 3))(*inputs)
    torch._dynamo.reset()
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    total = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(torch.autograd.grad(total, leaves), expected)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1, 2, 3))(*inputs), expected)
    attend = functools.partial(linear_attention, decay=decay, backend="triton")
    mapped = torch.func.vmap(attend)(*(torch.stack([tensor, 2 * tensor]) for tensor in (q, k, v)))
    torch.testing.assert_close(mapped[1], linear_attention(2 * q, 2 * k, 2 * v, decay=decay, backend="torch"))
    with torch.autocast(device.type, BFLOAT16):
        assert attend(q, k, v).dtype == BFLOAT16


def test_autocast(device: torch.device) -> None:
    q, k, v = draw(device)
    with torch.autocast(device.type, BFLOAT16):
        out, (state, _) = linear_attention(q, k, v, return_state=True)
        again = linear_attention(q, k, v, return_state=True, initial_state=None)[0]
    assert out.dtype == BFLOAT16 and state.dtype == FLOAT32
    expected = linear_attention(*(tensor.to(BFLOAT16) for tensor in (q, k, v)))
    assert torch.equal(out, expected) and torch.equal(again, expected)


# --- choice and bad input ---------------------------------------------------------------------------------------------------------------


def test_choice(device: torch.device) -> None:
    q, k, v = (tensor.detach() for tensor in draw(device))
    torch_result = linear_attention(q, k, v, backend="torch")
    if device.type == "cpu":
        assert torch.equal(linear_attention(q, k, v), torch_result)
    with use_backend("reference"):
        assert torch.equal(linear_attention(q, k, v), reference.linear_attention(q, k, v))
    with pytest.raises(NotImplementedError, match=r"linear_attention: backend 'cuda' cannot serve this call"):
        linear_attention(q, k, v, backend="cuda")
    for given, message in (
        ((q.double(), k.double(), v.double()), "float64"),
        ((q, k, v[..., :0]), "value_dim of at least 1"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            linear_attention(*given, backend="triton")
    assert "linear_attention" in pytransformer.backends()


CPU = torch.device("cpu")
Q, K, V = (tensor.detach() for tensor in draw(CPU, seqlen=6))
S, Z = torch.zeros(2, 2, 16, 8), torch.zeros(2, 2, 16)
HALVES = torch.full((2,), 0.5)
BAD_INPUT: list[tuple[type[Exception], str, dict[str, object]]] = [
    (TypeError, "q must be a torch.Tensor, got 1 (int)", {"q": 1}),
    (TypeError, "q must be of dtype float32 or float16 or bfloat16 or float64, got int64", {"q": Q.long()}),
    (ValueError, "q must have 4 dimensions: (batch, seqlen, num_heads, head_dim), got shape (6, 4, 16)", {"q": Q[0]}),
    (TypeError, "k must have the dtype of q (float32), got float16", {"k": K.half()}),
    (TypeError, "v must have the dtype of q (float32), got float16", {"v": V.half()}),
    (ValueError, "k must be on cpu like the other tensors, got meta", {"k": K.to("meta")}),
    (
        ValueError,
        "k must have shape (batch, seqlen_k, num_kv_heads, head_dim of q) = (2, any, any, 16), got (2, 6, 2, 8)",
        {"k": V},
    ),
    (
        ValueError,
        "v must have shape (batch, seqlen_k, num_kv_heads, value_dim) = (2, 6, 2, any), got (2, 5, 2, 8)",
        {"v": V[:, 1:]},
    ),
    (ValueError, "q must have at least one head, got shape (2, 6, 0, 16)", {"q": Q[:, :, :0]}),
    (ValueError, "the number of heads of q must be a multiple of that of k, got 3 and 2", {"q": Q[:, :, :3]}),
    (
        ValueError,
        "q must be contiguous in its last dimension (stride 1)",
        {"q": Q.transpose(2, 3).contiguous().transpose(2, 3)},
    ),
    (ValueError, "feature_map must be 'elu', or None for q and k that are features already", {"feature_map": "relu"}),
    (ValueError, "feature_map must be 'elu', or None", {"feature_map": torch.relu}),
    (TypeError, "causal must be True or False, got 1 (int)", {"causal": 1}),
    (TypeError, "normalize must be True or False, got None (NoneType)", {"normalize": None}),
    (TypeError, "return_state must be True or False, got 0 (int)", {"return_state": 0}),
    (ValueError, "causal=True needs a query for each key, got seqlen 5 of q and 6 of k", {"q": Q[:, 1:]}),
    (TypeError, "decay must be a torch.Tensor, got 0.5 (float)", {"decay": 0.5}),
    (TypeError, "decay must be of dtype float32, got bfloat16", {"decay": HALVES.bfloat16()}),
    (ValueError, "decay must have shape (num_kv_heads) = (2), got (4,)", {"decay": torch.full((4,), 0.5)}),
    (ValueError, "it needs causal=True", {"decay": HALVES, "causal": False}),
    (ValueError, "decay must hold factors from 0 to 1, got 1.5 of head 1", {"decay": torch.tensor([1.0, 1.5])}),
    (ValueError, "decay must hold factors from 0 to 1, got nan of head 0", {"decay": torch.tensor([torch.nan, 1.0])}),
    (TypeError, "initial_state must be a pair (S, z) as return_state=True returns it, or None", {"initial_state": S}),
    (TypeError, "initial_state's z must be a torch.Tensor, got None (NoneType)", {"initial_state": (S, None)}),
    (TypeError, "initial_state's S must be of dtype float32, got float16", {"initial_state": (S.half(), Z)}),
    (
        ValueError,
        "initial_state's S must have shape (batch, num_kv_heads, head_dim, value_dim) = (2, 2, 16, 8), got (2, 2, 8, 16)",
        {"initial_state": (S.mT, Z)},
    ),
    (ValueError, "initial_state's z must be on cpu like the other", {"initial_state": (S, Z.to("meta"))}),
    (
        ValueError,
        "initial_state's S must be contiguous in its last dimension (stride 1)",
        {"initial_state": (S.mT.contiguous().mT, Z)},
    ),
    (ValueError, "backend must be one of 'cuda', 'triton', 'torch', 'reference', got 'gpu'", {"backend": "gpu"}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), BAD_INPUT, ids=[entry[1][:48] for entry in BAD_INPUT])
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, object]) -> None:
    given = {"q": Q, "k": K, "v": V, **arguments}
    with pytest.raises(error, match=re.escape(message)):
        linear_attention(**given)
