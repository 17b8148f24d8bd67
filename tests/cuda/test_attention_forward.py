"""The forward kernels of attention in CUDA C++ against the contract, what they may touch, and the public function that they serve."""

from __future__ import annotations

import math
import mmap
import os
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pytransformer import extension
from pytransformer.ops import attention as module
from pytransformer.ops.attention import attention
from pytransformer.ops.attention.call import AttentionCall, check_attention
from pytransformer.verification import SEEDS, Contract
from tests.kernels.attention_contract import Case, draw, grid_cases, run_reference
from tests.support.broken_cuda import run_broken
from tests.support.emulator import SCHEDULES, configure, in_every_schedule
from tests.support.memory import surrounded

pytestmark = pytest.mark.usefixtures("poison_empty")

F16, BF16 = torch.float16, torch.bfloat16
EMULATED = "PYTRANSFORMER_CUDA_LIBRARY" in os.environ
# Tiles are 128 queries by 64 keys, of more than 128 features 64 by 64: lengths of one row, a tile and one row less or more, more queries
# than keys, several tiles, and packed sequences, some of a whole tile, some without queries or keys.
GRID: dict[str, list[Any]] = {
    "lengths": [(1, 1), (63, 65), (65, 64), (129, 63), (40, 20), (20, 200), ((5, 0), (64, 64), (0, 3), (1, 70))],
    "dims": [(8, 64), (40, 24), (80, 96), (128, 128), (192, 16), (256, 256)],
    "window": ["none", "causal", "left", "both", "causal, left"],
    "dtype": [BF16, F16],
    "heads": [(1, 1), (3, 1), (4, 2), (2, 2)],
}
PACKED = ((5, 7), (0, 3), (17, 33), (4, 0), (70, 90))


def forward(tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(out, lse) of the public function, served by the CUDA kernels."""
    out, lse = attention(**tensors, **options, return_lse=True, backend="cuda")
    return out, lse


def check_contract(case: Case, device: torch.device, *, every_schedule: bool) -> None:
    """Pools the errors over the seeds, which take turns with the emulator's schedules; on request the first is compared in all of them."""
    contract = Contract(case.dtype)
    for seed in range(SEEDS):
        inputs = draw(case, seed, device)
        golden, _ = run_reference(inputs, torch.float64)
        plain, _ = run_reference(inputs)
        if seed == 0 and every_schedule:
            out, lse = in_every_schedule(lambda inputs=inputs: forward(inputs.tensors, inputs.options))
        else:
            if EMULATED:
                configure(seed % len(SCHEDULES))
            out, lse = forward(inputs.tensors, inputs.options)
        contract.add_all({"out": out, "lse": lse}, plain, golden)
    contract.check()


# --- The contract -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", grid_cases(GRID))
def test_contract_over_shapes(case: Case, device: torch.device) -> None:
    check_contract(case, device, every_schedule=False)


def slopes(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.manual_seed(0))


OPTION_CASES = {
    "softcap": Case((40, 70), dtype=BF16, options={"softcap": 0.8, "causal": True}),
    "softcap-large": Case((40, 33), dtype=F16, options={"softcap": 50.0}),
    "softcap-packed-d128": Case(PACKED, dims=(128, 96), dtype=BF16, options={"softcap": 2.0, "window": (9, 2)}),
    "alibi": Case((20, 140), dtype=BF16, options={"alibi_slopes": torch.tensor([0.5, 0.1]), "causal": True}),
    "alibi-both-ways": Case((40, 20), dtype=F16, options={"alibi_slopes": torch.tensor([0.5, 0.1])}),
    "alibi-per-batch": Case((20, 40), heads=(4, 2), batch=2, dtype=F16, options={"alibi_slopes": slopes(2, 4).half()}),
    "alibi-per-batch-packed": Case(PACKED, dtype=F16, options={"alibi_slopes": slopes(5, 2)}),
    "softcap-alibi-window-d256": Case(
        (70, 40), dims=(136, 256), dtype=BF16, options={"softcap": 5.0, "alibi_slopes": slopes(2), "window": (25, 3)}
    ),
    "scale": Case((20, 70), dtype=F16, options={"softmax_scale": 1.7}),
    "scale-negative": Case((20, 33), dtype=BF16, options={"softmax_scale": -0.3, "causal": True}),
    "scale-zero": Case((20, 33), dtype=BF16, options={"softmax_scale": 0.0, "causal": True}),
    "logits-1e4": Case((20, 33), dtype=BF16, scale_of_q=2500.0, options={"causal": True}),
    "logits-1e4-float16": Case((20, 140), dtype=F16, scale_of_q=2500.0),
    "outlier": Case((20, 33), dtype=BF16, scale_of_q=torch.tensor([1.0] * 15 + [1000.0]), options={"causal": True}),
    "many-tiles": Case((200, 200), heads=(1, 1), dims=(8, 8), dtype=BF16, options={"causal": True, "window": (100, 0)}),
    "many-tiles-d128": Case((200, 200), heads=(1, 1), dims=(128, 128), dtype=F16, options={"causal": True}),
    "many-tiles-d256": Case((65, 260), heads=(1, 1), dims=(256, 256), dtype=BF16),
    "batch": Case((33, 20), heads=(4, 1), batch=3, dtype=F16, options={"window": (7, -1)}),
}


@pytest.mark.parametrize("name", OPTION_CASES)
def test_contract_over_options(name: str, device: torch.device) -> None:
    check_contract(OPTION_CASES[name], device, every_schedule=True)


# --- Promises of bits, and what may be touched --------------------------------------------------------------------------------------------


def assert_same_bits(actual: Any, expected: Any) -> None:
    for left, right in zip(actual, expected, strict=True):
        assert torch.equal(left, right)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="hundreds of runs are for a GPU")
def test_hundreds_of_runs_give_the_same_bits(device: torch.device) -> None:
    for dims in ((64, 64), (128, 128), (256, 256)):
        case = Case((1000, 1100), heads=(8, 2), dims=dims, batch=2, dtype=BF16, options={"causal": True})
        inputs = draw(case, 0, device)
        first = forward(inputs.tensors, inputs.options)
        for _ in range(300):
            assert_same_bits(forward(inputs.tensors, inputs.options), first)


@pytest.mark.parametrize("dims", [(16, 16), (40, 24), (136, 96)], ids=str)
@pytest.mark.parametrize("lengths", [(17, 70), PACKED], ids=["dense", "packed"])
def test_nothing_beside_the_inputs_is_read(lengths: Any, dims: tuple[int, int], device: torch.device) -> None:
    """Rows behind a short tile, features behind head_dim, the space between strided rows: all NaN, and none of it arrives."""
    inputs = draw(Case(lengths, dims=dims, heads=(4, 2), dtype=F16, options={"causal": True}), 0, device)
    expected = forward(inputs.tensors, inputs.options)
    strided = {name: surrounded(tensor) for name, tensor in inputs.tensors.items()}
    assert_same_bits(in_every_schedule(lambda: forward(strided, inputs.options)), expected)


@pytest.mark.parametrize("window", [(30, 0), (10, 20), (-1, 40)], ids=str)
def test_key_tiles_that_no_query_sees_are_not_read(window: tuple[int, int], device: torch.device) -> None:
    """64 queries at the end of 330 keys, or in the middle of them: tiles of 64 keys wholly outside are NaN."""
    inputs = draw(Case((64, 330), dtype=BF16, options={"window": window}), 0, device)
    expected = forward(inputs.tensors, inputs.options)
    first, last = (330 - 64 - window[0], 329) if window[0] >= 0 else (0, 329)
    if window[0] < 0:  # the queries come first instead
        inputs.tensors["q"] = torch.cat((inputs.tensors["q"], torch.zeros(1, 266, 2, 16, device=device, dtype=BF16)), 1)
        expected = [
            result[:, :64] if result.ndim == 4 else result[..., :64]
            for result in forward(inputs.tensors, inputs.options)
        ]
        first, last = 0, 329
    for name in ("k", "v"):
        inputs.tensors[name][:, : first // 64 * 64] = math.nan
        inputs.tensors[name][:, (last // 64 + 1) * 64 :] = math.nan
    actual = forward(inputs.tensors, inputs.options)
    assert_same_bits([result[:, :64] if result.ndim == 4 else result[..., :64] for result in actual], expected)


def test_key_and_value_of_one_head_may_be_expanded(device: torch.device) -> None:
    """A stride of 0 over heads or batch is a stride like any other."""
    inputs = draw(Case((20, 33), heads=(4, 1), dtype=BF16), 0, device)
    expanded = {name: tensor.expand(2, -1, 4, -1) for name, tensor in inputs.tensors.items()}
    copies = {name: tensor.contiguous() for name, tensor in expanded.items()}
    assert_same_bits(forward(expanded, inputs.options), forward(copies, inputs.options))


def test_layout_heads_before_length(device: torch.device) -> None:
    inputs = draw(Case((70, 33), heads=(4, 2), batch=2, dtype=F16), 0, device)
    moved = {name: tensor.transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in inputs.tensors.items()}
    assert_same_bits(forward(moved, inputs.options), forward(inputs.tensors, inputs.options))


def test_a_packed_sequence_has_the_bits_of_the_same_sequence_alone(device: torch.device) -> None:
    inputs = draw(Case(PACKED, heads=(4, 2), dtype=BF16, options={"causal": True, "window": (40, 0)}), 0, device)
    out, lse = forward(inputs.tensors, inputs.options)
    options = {name: value for name, value in inputs.options.items() if "cu_seqlens" not in name}
    first_q = first_k = 0
    for length_q, length_k in PACKED:
        rows, keys = slice(first_q, first_q + length_q), slice(first_k, first_k + length_k)
        alone = {
            "q": inputs.tensors["q"][None, rows],
            "k": inputs.tensors["k"][None, keys],
            "v": inputs.tensors["v"][None, keys],
        }
        alone_out, alone_lse = forward(alone, options)
        assert_same_bits((out[rows], lse[:, rows]), (alone_out[0], alone_lse[0]))
        first_q, first_k = rows.stop, keys.stop


def test_hints_change_nothing(device: torch.device) -> None:
    inputs = draw(Case(PACKED, dtype=F16, options={"causal": True}), 0, device)
    hinted = {**inputs.options, "max_seqlen_q": 70, "max_seqlen_k": 90}
    assert_same_bits(forward(inputs.tensors, hinted), forward(inputs.tensors, inputs.options))


def test_rows_past_the_last_packed_sequence_see_nothing(device: torch.device) -> None:
    """What Python cannot see on a GPU without reading back: cu_seqlens that end before the rows do, and, in one, keys past the end."""
    inputs = draw(Case(((70, 80),), dtype=BF16), 0, device)
    short = torch.tensor([0, 3, 60], dtype=torch.int32, device=device)
    long = torch.tensor([0, 3, 1000], dtype=torch.int32, device=device)
    tensors = [inputs.tensors[name] for name in "qkv"]
    alibi = slopes(2, 2).to(device)
    out, lse = in_every_schedule(lambda: raw_op(*tensors, alibi_slopes=alibi, cu_seqlens_q=short, cu_seqlens_k=long))
    assert bool(out[:60].isfinite().all()) and torch.equal(out[60:], torch.zeros_like(out[60:]))
    assert bool(lse[:, :60].isfinite().all()) and bool((lse[:, 60:] == -torch.inf).all())


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_nothing_to_do(batch: int, seqlen_q: int, seqlen_k: int, device: torch.device) -> None:
    """Of the public function and of the op itself: zeros, and an lse of -inf."""
    q = torch.randn(batch, seqlen_q, 4, 16, device=device).half()
    k = torch.randn(batch, seqlen_k, 2, 16, device=device).half()
    for out, lse in (forward({"q": q, "k": k, "v": k}, {"causal": True}), raw_op(q, k, k)):
        assert torch.equal(out, torch.zeros_like(q)) and lse.shape == (batch, 4, seqlen_q)
        assert bool((lse == -torch.inf).all())


@pytest.mark.parametrize("axis", ["batch", "head", "sequence"])
def test_offsets_beyond_2_to_the_31(axis: str, device: torch.device) -> None:
    """Elements of one tensor, for "sequence" also of one tile, that lie 2^31 elements apart."""
    far = 2**31 + 64
    strides = {"batch": (far, 64, 16, 1), "head": (288, 16, far, 1), "sequence": (16, far // 15 // 8 * 8, 32, 1)}[axis]
    values = draw(Case((18, 18), heads=(2, 2), batch=2, dtype=F16), 0, device).tensors["v"]
    memory = far_memory(sum((size - 1) * step for size, step in zip(values.shape, strides)) + 1, device)
    spread = memory.as_strided(values.shape, strides)
    spread.copy_(values)
    assert_same_bits(
        forward(dict.fromkeys("qkv", spread), {"causal": True}), forward(dict.fromkeys("qkv", values), {"causal": True})
    )


def far_memory(elements: int, device: torch.device) -> Tensor:
    """float16 elements of which only the pages that are touched take memory, where the device can do that."""
    if device.type == "cuda":
        if torch.cuda.mem_get_info()[0] < 8e9:
            pytest.skip("needs a tensor of 2^31 elements")
        return torch.cuda.HalfTensor(elements)
    return torch.frombuffer(mmap.mmap(-1, 2 * elements), dtype=torch.float16)


# --- The op itself ------------------------------------------------------------------------------------------------------------------------


def raw_arguments(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Any, ...]:
    defaults = {
        "alibi_slopes": None, "cu_seqlens_q": None, "cu_seqlens_k": None, "softmax_scale": 0.25, "causal": False, "window_left": -1,
        "window_right": -1, "softcap": 0.0,
    }  # fmt: skip
    assert not options.keys() - defaults.keys()
    return (q, k, v, *(defaults | options).values())


def raw_op(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """torch.ops.pytransformer_cuda.attention_forward, before which no Python checks anything."""
    out, lse = extension.op("attention_forward")(*raw_arguments(q, k, v, **options))
    return out, lse


def H(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=F16)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


VALID = {"q": H(2, 5, 4, 16), "k": H(2, 7, 2, 16), "v": H(2, 7, 2, 24)}
VALID_PACKED = {
    "q": H(5, 4, 16), "k": H(7, 2, 16), "v": H(7, 2, 24), "cu_seqlens_q": int32(0, 2, 5), "cu_seqlens_k": int32(0, 7, 7),
}  # fmt: skip
ERRORS = [
    ({"q": H(2, 5, 4, 16).float()}, "q must be float16 or bfloat16, got float32"),
    ({"k": H(2, 7, 2, 16).bfloat16()}, "k must be float16 like q, got bfloat16"),
    ({"v": H(2, 7, 2, 24).double()}, "v must be float16 like q, got float64"),
    ({"q": H(5, 4, 16)}, "q must have 4 dimensions without cu_seqlens, got shape (5, 4, 16)"),
    ({"k": H(7, 2, 16)}, "k of shape (7, 2, 16) does not go with q of shape (2, 5, 4, 16)"),
    ({"k": H(3, 7, 2, 16)}, "k of shape (3, 7, 2, 16) does not go with q"),
    ({"v": H(1, 7, 2, 24)}, "v of shape (1, 7, 2, 24) does not go with q"),
    ({"k": H(2, 7, 2, 24)}, "k must have the head_dim of q, 16, got 24"),
    ({"v": H(2, 6, 2, 24)}, "v must have the length and the heads of k, shape (2, 7, 2, 16), got (2, 6, 2, 24)"),
    ({"v": H(2, 7, 4, 24)}, "v must have the length and the heads of k"),
    ({"q": H(2, 5, 4, 12), "k": H(2, 7, 2, 12)}, "head_dim of q must be a multiple of 8 from 8 to 256, got 12"),
    ({"q": H(2, 5, 4, 264), "k": H(2, 7, 2, 264)}, "head_dim of q must be a multiple of 8 from 8 to 256, got 264"),
    ({"v": H(2, 7, 2, 0)}, "head_dim of v must be a multiple of 8 from 8 to 256, got 0"),
    ({"q": H(2, 5, 3, 16)}, "num_kv_heads must divide num_heads, got 2 and 3"),
    ({"q": H(2, 5, 0, 16)}, "num_kv_heads must divide num_heads, got 2 and 0"),
    ({"q": H(2, 5, 16, 4).transpose(2, 3)}, "q must be contiguous in its last dimension"),
    ({"k": H(2, 7, 2, 20)[..., :16]}, "k must have strides that are multiples of 8 elements, got 20"),
    ({"v": H(2, 7, 2, 32)[..., 4:28]}, "v must be 16-byte aligned"),
    ({"cu_seqlens_q": int32(0, 2, 5)}, "cu_seqlens_q and cu_seqlens_k go together"),
    ({"cu_seqlens_k": int32(0, 2, 5)}, "cu_seqlens_q and cu_seqlens_k go together"),
    ({**VALID_PACKED, "q": H(2, 5, 4, 16)}, "q must have 3 dimensions with cu_seqlens, got shape (2, 5, 4, 16)"),
    ({**VALID_PACKED, "cu_seqlens_q": int32(0, 2, 5).long()}, "cu_seqlens_q must be int32, got int64"),
    ({**VALID_PACKED, "cu_seqlens_k": int32(0, 7)}, "cu_seqlens_k must have shape (3) like cu_seqlens_q, got (2)"),
    ({**VALID_PACKED, "cu_seqlens_k": int32()}, "cu_seqlens_k must have shape (batch + 1), got (0)"),
    ({**VALID_PACKED, "cu_seqlens_q": int32(0, 0, 2, 2, 5, 5)[::2]}, "cu_seqlens_q must be contiguous"),
    ({"alibi_slopes": torch.ones(3)}, "alibi_slopes must have shape (num_heads) or (batch, num_heads), got (3)"),
    ({"alibi_slopes": torch.ones(1, 4)}, "alibi_slopes must have shape (num_heads) or (batch, num_heads), got (1, 4)"),
    ({"alibi_slopes": torch.ones(())}, "alibi_slopes must have shape (num_heads) or (batch, num_heads), got ()"),
    ({"alibi_slopes": torch.ones(4).half()}, "alibi_slopes must be float32, got float16"),
    ({"window_left": -2}, "window_left must be -1 or more, got -2"),
    ({"window_right": -3, "causal": True}, "window_right must be -1 or more, got -3"),
    ({"softmax_scale": math.nan}, "softmax_scale must be finite, got nan"),
    ({"softcap": -1.0}, "softcap must be 0 or more and finite, got -1"),
    ({"softcap": math.inf}, "softcap must be 0 or more and finite, got inf"),
    ({"q": H(1, 1, 1, 16).expand(2, 2**29 + 1, 4, 16)}, "at most 536870912 rows, sequences and heads are served"),
    ({"q": H(1, 1, 1, 16).expand(2, 2**29, 128, 16)}, "rows times heads are too many for one launch"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[message[:60] for _, message in ERRORS])
def test_the_op_checks_its_arguments(changes: dict[str, Any], message: str, device: torch.device) -> None:
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) and value.numel() < 2**20 else value
        for name, value in (VALID | changes).items()
    }
    if device.type == "cuda" and not arguments["q"].is_cuda:
        arguments["q"] = H(1, 1, 1, 16).to(device).expand(arguments["q"].shape)
    with pytest.raises(ValueError, match=re.escape(message)):
        raw_op(**arguments)


def test_opcheck(device: torch.device) -> None:
    for case in (
        Case((5, 9), heads=(4, 2), dtype=BF16, batch=2, options={"causal": True}),
        Case(((5, 7), (0, 3)), dims=(16, 24), dtype=F16, options={"alibi_slopes": slopes(2)}),
    ):
        inputs = draw(case, 0, device)
        call = check_attention(AttentionCall(**inputs.tensors, **inputs.options))
        torch.library.opcheck(torch.ops.pytransformer.attention_forward.default, (*call, "cuda"))
        options = {name: value for name, value in inputs.options.items() if name != "window"}
        torch.library.opcheck(extension.op("attention_forward"), raw_arguments(**inputs.tensors, **options))


# --- The public function ------------------------------------------------------------------------------------------------------------------

REASONS = [
    ({"mask": torch.ones(5, 7, dtype=torch.bool)}, "the kernels have no mask"),
    ({"bias": torch.ones(5, 7)}, "the kernels have no bias"),
    ({"key_padding_mask": torch.ones(2, 7, dtype=torch.bool)}, "the kernels have no key_padding_mask"),
    ({"sinks": torch.ones(4)}, "the kernels have no sinks"),
    ({"dropout_p": 0.5}, "the kernels have no dropout"),
    ({name: VALID[name].float() for name in VALID}, "the kernels take float16 and bfloat16, got float32"),
    ({name: VALID[name].double() for name in VALID}, "the kernels take float16 and bfloat16, got float64"),
    ({"k": H(2, 7, 2, 20)[..., :16]}, "the rows of k do not all begin at a multiple of 16 bytes"),
    ({"v": H(2, 7, 2, 32)[..., 4:28]}, "the rows of v do not all begin at a multiple of 16 bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), REASONS, ids=[reason for _, reason in REASONS])
def test_what_is_not_served_is_refused_with_a_reason(
    changes: dict[str, Any], reason: str, device: torch.device
) -> None:
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) and value.is_contiguous() else value
        for name, value in (VALID | changes).items()
    }
    for name in ("k", "v"):
        if arguments[name].device != device:
            wide = torch.zeros(2, 7, 2, arguments[name].stride(2), dtype=F16, device=device)
            arguments[name] = wide[..., arguments[name].storage_offset() :][..., : arguments[name].shape[-1]]
    with pytest.raises(
        NotImplementedError, match=f"backend 'cuda' cannot serve this call: {re.escape(reason)}|{reason}"
    ):
        attention(**arguments, backend="cuda")


def test_it_comes_after_triton() -> None:
    """Unmeasured kernels are not preferred."""
    assert [candidate.name for candidate in module.CHOICE.candidates] == ["triton", "cuda", "torch", "reference"]


def test_fullgraph_with_dynamic_lengths(device: torch.device) -> None:
    """One graph for all lengths, forward and backward, with the bits of eager mode; also of rows that only turn out not to be aligned."""
    torch._dynamo.reset()

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, causal=True, return_lse=True, backend="cuda")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ((5, 9), (66, 11)):
        inputs = draw(Case(lengths, heads=(4, 2), dims=(24, 16), dtype=BF16), 0, device)
        leaves = list(inputs.leaves().values())
        results = [call(*leaves) for call in (compiled, function)]
        assert_same_bits(*results)
        assert_same_bits(*(torch.autograd.grad(out.sum() + lse.sum(), leaves) for out, lse in results))
    with torch.no_grad():
        shifted = [
            torch.cat((torch.zeros(1, device=device, dtype=BF16), leaf.flatten()))[1:].view(leaf.shape)
            for leaf in leaves
        ]
        assert_same_bits(compiled(*shifted), compiled(*leaves))


def test_gradients_flow_through_the_public_function(device: torch.device) -> None:
    """q, k, v and lse, packed, against the contract; dout as a sum gives it, expanded."""
    contract = Contract(BF16)
    case = Case(PACKED, heads=(4, 2), dims=(40, 24), dtype=BF16, options={"causal": True})
    for seed in range(SEEDS):
        inputs = draw(case, seed, device)
        inputs = replace(inputs, dout=inputs.dout[:1, :1, :1].expand(inputs.dout.shape))
        golden, golden_gradients = run_reference(inputs, torch.float64)
        plain, plain_gradients = run_reference(inputs)
        leaves = inputs.leaves()
        out, lse = forward(leaves, inputs.options)
        gradients = torch.autograd.grad([out, lse], list(leaves.values()), [inputs.dout, inputs.dlse])
        contract.add_all({"out": out.detach(), "lse": lse.detach()}, plain, golden)
        contract.add_all(dict(zip(("dq", "dk", "dv"), gradients)), plain_gradients, golden_gradients, kind="gradient")
    contract.check()


# --- The tools find what they are meant to find -------------------------------------------------------------------------------------------

SCRIPT = """
import torch
from pytransformer import extension, reference
from tests.support.emulator import in_every_schedule
torch.manual_seed(0)
q, k, v = (torch.randn(1, length, 2, 64).bfloat16() for length in (200, 210, 210))
run = lambda: extension.op("attention_forward")(q, k, v, None, None, None, 0.125, True, 150, -1, 0.0)
out, lse = in_every_schedule(run)
expected = reference.attention(q.float(), k.float(), v.float(), causal=True, window=(150, -1), softmax_scale=0.125)
assert float((out.float() - expected).abs().max()) < 0.03, "wrong result"
"""
VALUES_THERE = "    __syncthreads();  // the values are there, and all are done with the keys\n"
FAULTS = {
    "no wait for the values": (
        "attention/forward.cuh",
        "    ptx::cp_async_wait<0>();\n" + VALUES_THERE,
        VALUES_THERE,
        "wrong result|differs between schedules|never waited for",
    ),
    "no barrier before the keys are overwritten": (
        "attention/forward.cuh",
        VALUES_THERE,
        "",
        "wrong result|differs between schedules",
    ),
    "one row too many is loaded": (
        "attention/tile.cuh",
        "inside && row < rows_left",
        "inside && row <= rows_left",
        "AddressSanitizer: heap-buffer-overflow",
    ),
}


@pytest.mark.skipif(
    os.environ.get("PYTRANSFORMER_TEST_CUDA") != "address", reason="for the address flavor of the emulator"
)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel(fault: str, tmp_path: Any) -> None:
    source, good, bad, report = FAULTS[fault]
    unit = "attention/forward_bfloat16_64.cu"
    result = run_broken(tmp_path, source, [(good, bad)], SCRIPT, recompile=[unit])
    assert result.returncode != 0
    assert re.search(report, result.stdout + result.stderr), result.stderr[-3000:]


def test_a_kept_launch_leaves_unaligned_rows_to_the_checks(device: torch.device) -> None:
    """Two calls that are alike in all but their addresses: only the op sees that, and refuses."""
    q, k, v = (torch.randn(1, 8, 2, 16, device=device).to(BF16) for _ in range(3))
    expected = [attention(q, k, v, causal=True, backend="cuda") for _ in range(3)]
    assert all(torch.equal(out, expected[0]) for out in expected)
    shifted = torch.zeros(q.numel() + 1, dtype=BF16, device=device)[1:].view(q.shape).copy_(q)
    with pytest.raises(NotImplementedError, match="multiple of 16 bytes"):
        attention(shifted, k, v, causal=True, backend="cuda")
    out, lse = attention(q, k, v, causal=True, return_lse=True, backend="cuda")
    again = attention(q, k, v, causal=True, return_lse=True, backend="cuda")
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)
