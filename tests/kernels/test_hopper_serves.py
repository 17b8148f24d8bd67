"""Which calls go to Hopper's kernels: the list of reasons, the switch, and what happens when a kernel does not compile."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import pytransformer
from pytransformer.kernels.hopper import serves
from pytransformer.kernels.hopper.launch import HopperForward
from pytransformer.kernels.hopper.serves import refusal
from pytransformer.ops import backend, overview
from pytransformer.ops.attention.by_triton import hopper
from pytransformer.ops.attention.call import AttentionCall
from tests.conftest import INTERPRETING

BATCH, ROWS, HEADS = 2, 70, 2


def tensor(dim: int = 64, dtype: torch.dtype = torch.bfloat16, heads: int = HEADS) -> torch.Tensor:
    return torch.zeros(BATCH, ROWS, heads, dim, dtype=dtype)


def call(
    dim: int = 64, value_dim: int | None = None, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> AttentionCall:
    q, k, v = tensor(dim, dtype), tensor(dim, dtype), tensor(value_dim or dim, dtype)
    return AttentionCall(**{"q": q, "k": k, "v": v, "softmax_scale": 0.125, **options})


SERVED = {
    "plain": call(),
    "every head_dim": call(256),
    "values of their own": call(192, 128),
    "float16": call(96, dtype=torch.float16),
    "causal": call(causal=True),
    "window": call(window=(3, 5)),
    "softcap": call(softcap=30.0),
    "sinks": call(sinks=torch.zeros(HEADS)),
    "shared keys": call(k=tensor(heads=1), v=tensor(heads=1)),
    "heads first": call(q=torch.zeros(BATCH, HEADS, ROWS, 64, dtype=torch.bfloat16).transpose(1, 2)),
    "one row whose stride is odd": call(q=torch.zeros(64 * 3, dtype=torch.bfloat16).as_strided((1, 1, 2, 64), (5, 3, 64, 1))),
    "packed": call(q=tensor()[0], k=tensor()[0], v=tensor()[0], cu_seqlens_q=torch.tensor([0, ROWS]), cu_seqlens_k=torch.tensor([0, ROWS])),
}  # fmt: skip
# In the order of the list.
REFUSED = {
    "float32 alone": (call(dtype=torch.float32), "float16 and bfloat16 alone, not torch.float32"),
    "float64": (call(dtype=torch.float64), "not torch.float64"),
    "head_dim": (call(80), "head_dim 80 with 80 of v is none of"),
    "values' head_dim": (call(64, 128), "head_dim 64 with 128 of v"),
    "mask": (call(mask=torch.ones(ROWS, ROWS, dtype=torch.bool)), "mask"),
    "bias": (call(bias=torch.zeros(ROWS, ROWS)), "bias"),
    "padding": (call(key_padding_mask=torch.ones(BATCH, ROWS, dtype=torch.bool)), "key_padding_mask"),
    "blocks": (call(block_mask=torch.ones(1, 1, 2, 2, dtype=torch.bool)), "block_mask"),
    "ALiBi": (call(alibi_slopes=torch.zeros(HEADS)), "alibi_slopes"),
    "dropout": (call(dropout_p=0.1), "dropout"),
    "scale of 0": (call(softmax_scale=0.0), "softmax_scale 0.0 is not positive"),
    "negative scale": (call(softmax_scale=-1.0), "softmax_scale -1.0 is not positive"),
    "no keys": (call(k=tensor()[:, :0], v=tensor()[:, :0]), "no queries or no keys"),
    "expanded": (call(k=tensor(heads=1).expand(-1, -1, HEADS, -1)), "of k are none that a descriptor has"),
    "odd strides": (call(v=torch.zeros(BATCH, ROWS, HEADS, 68, dtype=torch.bfloat16)[..., :64]), "of v are no multiples of 16 bytes"),
    "features apart": (call(q=torch.zeros(BATCH, ROWS, HEADS, 128, dtype=torch.bfloat16)[..., ::2]), "features of q do not lie side"),
}  # fmt: skip


@pytest.mark.parametrize("served", SERVED.values(), ids=SERVED)
def test_it_is_served(served: AttentionCall) -> None:
    assert refusal(served, 90) is None


@pytest.mark.parametrize(("refused", "reason"), REFUSED.values(), ids=REFUSED)
def test_it_falls_to_the_portable_kernel(refused: AttentionCall, reason: str) -> None:
    said = refusal(refused, 90)
    assert said is not None and reason in said


@pytest.mark.parametrize("arch", [80, 89, 100, 120])
def test_other_gpus_have_the_portable_kernel(arch: int) -> None:
    assert refusal(call(dtype=torch.float32), arch) == f"the kernels are for sm_90, and this is sm_{arch}"


@pytest.fixture
def new_triton():
    """What is found out about Triton is kept: forgotten before and after."""
    serves.triton_missing.cache_clear()
    yield
    serves.triton_missing.cache_clear()


def test_an_unknown_triton_has_the_portable_kernel(monkeypatch, new_triton) -> None:
    monkeypatch.setattr("triton.__version__", "4.1.0")
    assert "Triton 3.6 and 3.9, and this is 4.1.0" in (refusal(call(), 90) or "")


def test_a_triton_without_what_is_needed_has_the_portable_kernel(monkeypatch, new_triton) -> None:
    monkeypatch.setitem(sys.modules, "pytransformer.kernels.hopper.forward", None)
    assert "lacks what the kernels need" in (refusal(call(), 90) or "")


def test_the_list_needs_no_triton() -> None:
    program = (
        "import sys; from pytransformer.kernels.hopper import serves; serves.status(80); print('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout == b"False\n"


# --- The switch. ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch) -> list[AttentionCall]:
    """The calls that Hopper's kernel was launched for; they still are."""
    seen: list[AttentionCall] = []
    launch = HopperForward.__call__

    def recorded(self: HopperForward, given: AttentionCall) -> Any:
        seen.append(given)
        return launch(self, given)

    monkeypatch.setattr(HopperForward, "__call__", recorded)
    return seen


def attention(q: torch.Tensor, **options: Any) -> Any:
    return pytransformer.attention(q, q, q, backend="triton", **options)


@pytest.fixture
def q() -> torch.Tensor:
    return torch.randn(1, 65, 1, 64).to(torch.bfloat16)


needs_interpreter = pytest.mark.skipif(
    not INTERPRETING, reason="Hopper's kernels run in the interpreter, or on a GPU of theirs"
)


@needs_interpreter
def test_kernels_are_on_inside_of_the_switch_alone(q, launches) -> None:
    portable = attention(q)
    with hopper(True):
        first, again = attention(q, return_lse=True), attention(q, return_lse=True)
        assert len(launches) == 2
        with hopper(False):
            attention(q)
    attention(q)
    assert len(launches) == 2
    assert torch.equal(first[0], again[0])
    torch.testing.assert_close(first[0], portable)


@needs_interpreter
def test_what_falls_is_served_by_the_portable_kernel(q, launches) -> None:
    with hopper(True):
        torch.testing.assert_close(attention(q, bias=torch.zeros(65, 65)), attention(q))
    assert len(launches) == 1


@needs_interpreter
def test_gradients_flow_through_what_it_returns(q, launches) -> None:
    gradients = []
    for on in (False, True):
        with hopper(on):
            leaf = q.clone().requires_grad_()
            out, lse = attention(leaf, causal=True, return_lse=True)
            (out.float().sum() + lse.sum()).backward()
            gradients.append(leaf.grad)
    assert len(launches) == 1
    torch.testing.assert_close(*gradients)


@needs_interpreter
def test_a_compiled_model_uses_it(q, launches) -> None:
    with hopper(True):
        expected = attention(q, causal=True)
        compiled = torch.compile(lambda q: attention(q, causal=True), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q), expected)
    assert len(launches) == 2


@needs_interpreter
def test_a_tensor_at_an_odd_address_has_the_portable_kernel(q, launches) -> None:
    memory = torch.zeros(q.numel() + 8, dtype=q.dtype)
    start = next(start for start in range(1, 8) if memory[start:].data_ptr() % 16)
    odd = memory[start : start + q.numel()].view(q.shape).copy_(q)
    with hopper(True):
        torch.testing.assert_close(attention(odd), attention(q))
    assert len(launches) == 1


def test_a_kernel_that_does_not_compile_leaves_the_portable_one_and_says_so_once(q, monkeypatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr("pytransformer.kernels.hopper.launch.run", fail)
    monkeypatch.setattr(backend, "_given_warnings", set())
    with hopper(True):
        with pytest.warns(RuntimeWarning, match="Hopper's kernels are off, the portable ones serve") as given:
            first, again = attention(q), attention(q)
        assert len(given) == 1
        assert not serves.is_on()
        assert "off: a kernel does not compile: RuntimeError: PassManager::run failed" in overview.hopper_kernels()
    assert torch.equal(first, again)


def test_errors_of_the_call_are_not_swallowed(q, monkeypatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr("pytransformer.kernels.hopper.launch.run", fail)
    with hopper(True), pytest.raises(RuntimeError, match="illegal memory access"):
        attention(q)


def test_the_status_says_why_they_are_off(monkeypatch) -> None:
    with hopper(False):
        assert serves.status(90) == "off: not yet measured on a GPU; PYTRANSFORMER_HOPPER=1 switches them on"
    with hopper(True):
        assert serves.status(90) == "on"
        assert serves.status(80) == "off: the kernels are for sm_90, and this is sm_80"
        assert serves.status(None) == "off: no GPU"
