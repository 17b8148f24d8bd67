"""RoPE in CUDA C++ against the reference: the same bits, what it must not touch, and faults that the sanitizers must see."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pytransformer import extension, reference
from pytransformer.ops import checks
from pytransformer.ops.rope import rope
from tests.kernels.test_rope import LENGTH, Case, by_reference, measure
from tests.support.broken_cuda import run_broken
from tests.support.emulator import in_every_schedule

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
EMULATED = pytest.mark.skipif(
    "PYTRANSFORMER_CUDA_LIBRARY" not in os.environ, reason="a fault would corrupt other tests on a GPU"
)


def rotate(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *, offsets=0, positions=None, cu_seqlens=None, interleaved=False, reverse=False,
    config=None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The extension's op in every schedule."""
    starts, offset = (offsets, 0) if isinstance(offsets, Tensor) else (None, offsets)
    op = extension.op("rope")
    new_q, new_k = in_every_schedule(
        lambda: op(q, k, cos, sin, positions, starts, offset, cu_seqlens, interleaved, reverse)
    )
    return new_q, None if k is None else new_k


def assert_reference_bits(case: Case, device: torch.device, seed: int = 0) -> None:
    tensors, where = case.inputs(device, seed)
    rotated = rotate(*tensors, *case.tables(device), interleaved=case.interleaved, reverse=case.reverse, **where)
    expected = by_reference(case, tensors, where, case.dtype)
    for actual, wanted in zip((tensor for tensor in rotated if tensor is not None), expected, strict=True):
        assert actual.is_contiguous() and torch.equal(actual.cpu(), wanted)


# --- the contract -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
@LAYOUTS
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_contract(dtype, interleaved, reverse, device):
    measure(Case(dtype, interleaved=interleaved, reverse=reverse), device, rotate=rotate).check()


WIDTHS = [(2, 2), (8, 2), (24, 6), (24, 16), (40, 40), (64, 24), (80, 32), (96, 96), (256, 256), (600, 600), (42, 28)]


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), WIDTHS, ids=str)
def test_widths_have_the_bits_of_the_reference(head_dim, rotary_dim, dtype, device):
    for interleaved in (False, True):
        case = Case(dtype, (3,), heads=(2, 1), head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved)
        assert_reference_bits(case, device)


@pytest.mark.parametrize("positions", ["index", "offset", "offsets", "given", "given per sequence"])
@pytest.mark.parametrize("lengths", [(7, 7), (1, 1, 1, 1, 1, 1)], ids=str)
def test_positions(positions, lengths, device):
    assert_reference_bits(Case(BFLOAT16, lengths, positions=positions), device)


@pytest.mark.parametrize("positions", ["index", "offset", "offsets"])
@pytest.mark.parametrize("lengths", [(9,), (0, 3, 0, 0, 8, 1, 0), (1,) * 9], ids=str)
def test_packed_sequences(positions, lengths, device):
    assert_reference_bits(Case(BFLOAT16, lengths, packed=True, positions=positions), device)


@pytest.mark.parametrize("heads", [(1, 1), (4, 0), (5, 4), (9, 3), (1, 8)], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_heads_and_tokens_around_what_a_thread_and_a_block_take(heads, tokens, device):
    assert_reference_bits(Case(BFLOAT16, (tokens,), heads=heads, positions="given"), device)


def test_integer_types_of_positions(device):
    case = Case(BFLOAT16, (5, 5))
    (q, k), _ = case.inputs(device, 0)
    tables = case.tables(device)
    positions, offsets = torch.tensor([3, 0, 9, 9, 1], device=device), torch.tensor([4, 2], device=device)
    for name, values in (("positions", positions), ("offsets", offsets)):
        results = [rotate(q, k, *tables, **{name: values.to(dtype)}) for dtype in (torch.int32, torch.int64)]
        strided = torch.stack([values, values.flip(0)], dim=1)[:, 0]
        results.append(rotate(q, k, *tables, **{name: strided}))
        assert all(torch.equal(result[0], results[0][0]) for result in results[1:])


# --- shapes and memory ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8), (0, 2, 8)], ids=str)
def test_nothing_to_rotate(shape, device):
    cos, sin = (table.to(device) for table in reference.rope_tables(8, 10))
    q = torch.empty(shape, device=device)
    rotated, k = rope(q, q, cos, sin, backend="cuda")
    assert rotated.shape == k.shape == q.shape


@LAYOUTS
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_in_place_has_the_same_bits_and_touches_nothing_else(interleaved, packed, device):
    case = Case(BFLOAT16, (7, 7), packed, head_dim=24, interleaved=interleaved, positions="offsets")
    (q, k), where = case.inputs(device, 0)
    where = {**where, "interleaved": interleaved}
    expected = rotate(q, k, *case.tables(device), **where)
    # q and k inside larger tensors, whose other cells are compared bit by bit.
    holder = torch.randn(*q.shape[:-2], 7, 32, device=device).to(BFLOAT16)

    def run() -> list[Tensor]:
        after = holder.clone()
        inner_q, inner_k = after[..., :3, :24], after[..., 4:6, 8:]
        inner_q.copy_(q)
        inner_k.copy_(k)
        rotated = rope(inner_q, inner_k, *case.tables(device), inplace=True, backend="cuda", **where)
        assert rotated[0] is inner_q and rotated[1] is inner_k
        return [after]

    (after,) = in_every_schedule(run)
    wanted = holder.clone()
    wanted[..., :3, :24], wanted[..., 4:6, 8:] = expected
    assert torch.equal(after, wanted)
    assert torch.equal(after[..., :3, 16:24], q[..., 16:])


def test_in_place_counts_as_a_change(device):
    case = Case()
    (q, k), _ = case.inputs(device, 0)
    before = q._version, k._version
    for offsets in (0, torch.tensor([1, 2], device=device)):  # the short way and the long way
        rope(q, k, *case.tables(device), offsets=offsets, inplace=True, backend="cuda")
        assert q._version > before[0] and k._version > before[1]
        before = q._version, k._version
    with torch.inference_mode():
        rope(q.clone(), k, *case.tables(device), inplace=True, backend="cuda")
    assert k._version > before[1]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@LAYOUTS
def test_strides_are_free_and_holes_are_not_read(interleaved, dtype, device):
    case = Case(dtype, head_dim=24)
    (q, k), _ = case.inputs(device, 0)
    expected = rotate(q, k, *case.tables(device), interleaved=interleaved)
    qkv = torch.full((7, 2, 8, 24), float("nan"), device=device, dtype=dtype).transpose(0, 1)
    qkv[:, :, 1:4], qkv[:, :, 5:7] = q, k
    # Tables as the first columns of something wider, too.
    wide = torch.cat([*case.tables(device), torch.full((LENGTH, 3), float("nan"), device=device)], dim=1)
    cos, sin = wide[:, :16].split(8, dim=1)
    strided = rotate(qkv[:, :, 1:4], qkv[:, :, 5:7], cos, sin, interleaved=interleaved)
    assert torch.equal(strided[0], expected[0]) and torch.equal(strided[1], expected[1])
    for shift in (1, 2):
        flat = torch.cat([q.new_full((shift,), float("nan")), q.flatten()])[shift:].view_as(q)
        assert torch.equal(rotate(flat, None, cos, sin, interleaved=interleaved)[0], expected[0])
    row = q[:, :1].expand_as(q)
    assert torch.equal(rotate(row, None, cos, sin)[0], rotate(row.contiguous(), None, cos, sin)[0])


@LAYOUTS
def test_tokens_lie_beyond_2_to_31_elements(interleaved, device, tmp_path: Path):
    size = 2**31 + 2048
    if device.type == "cuda":
        holder = torch.empty(size, dtype=BFLOAT16, device=device)
    else:  # a file with a hole: only what is touched takes memory
        holder = torch.from_file(str(tmp_path / "hole"), shared=True, size=size, dtype=BFLOAT16)
    case = Case(BFLOAT16, heads=(3, 0), head_dim=24)
    (q, _), _ = case.inputs(device, 0)
    far = holder.as_strided(q.shape, (2**31 + 64, 72, 24, 1)).copy_(q)
    expected = rotate(q, None, *case.tables(device), interleaved=interleaved)[0]
    assert torch.equal(rotate(far, None, *case.tables(device), interleaved=interleaved)[0], expected)
    rope(far, None, *case.tables(device), interleaved=interleaved, inplace=True, backend="cuda")
    assert torch.equal(far, expected)


def test_positions_outside_the_table_do_not_read_outside(device):
    case = Case(heads=(2, 0))
    (q, _), _ = case.inputs(device, 0)
    cos, sin = case.tables(device)
    positions = torch.tensor([-1, -(2**31), 0, LENGTH - 1, LENGTH, 2**31 - 1, 3], device=device)
    expected, _ = rotate(q, None, cos, sin, positions=positions.clamp(0, LENGTH - 1))
    assert torch.equal(rotate(q, None, cos, sin, positions=positions)[0], expected)
    far, _ = rotate(q, None, cos, sin, offsets=torch.tensor([2**40, -(2**40)], device=device))
    ends = torch.tensor([[LENGTH - 1], [0]], device=device).expand(2, 7)
    assert torch.equal(far, rotate(q, None, cos, sin, positions=ends)[0])


def test_bounds_that_make_no_sense_do_not_read_outside(device):
    case = Case(BFLOAT16, (7,), packed=True, heads=(2, 0))
    (q, _), _ = case.inputs(device, 0)
    for bounds in ([5, 3, 90, 1], [-7, 2**31 - 1, -(2**31), 0], [9]):
        bounds = torch.tensor(bounds, dtype=torch.int32, device=device)
        if bounds.shape[0] == 1:
            with pytest.raises(ValueError, match="cu_seqlens names no sequence"):
                rotate(q, None, *case.tables(device), cu_seqlens=bounds)
        else:
            offsets = torch.zeros(3, dtype=torch.int64, device=device)
            assert rotate(q, None, *case.tables(device), cu_seqlens=bounds, offsets=offsets)[0].isfinite().all()


def test_nan_in_padding_stays_there(device):
    case = Case(BFLOAT16, (0, 3, 8), packed=True)
    (q, k), where = case.inputs(device, 0)
    clean = rotate(q, k, *case.tables(device), **where)
    q[3], k[3] = float("nan"), float("inf")
    dirty = rotate(q, k, *case.tables(device), **where)
    kept = [index for index in range(11) if index != 3]
    assert all(torch.equal(a[kept], b[kept]) for a, b in zip(clean, dirty))


# --- the public function ----------------------------------------------------------------------------------------------------------------


@LAYOUTS
def test_gradient_is_the_opposite_rotation(interleaved, device):
    case = Case(BFLOAT16, positions="offsets", interleaved=interleaved)
    (q, k), where = case.inputs(device, 0)
    dq, dk = (torch.randn_like(x) for x in (q, k))
    q.requires_grad_()
    k.requires_grad_()
    options = {**where, "interleaved": interleaved, "backend": "cuda"}
    rotated = rope(q, k, *case.tables(device), inplace=True, **options)  # out of place all the same
    assert rotated[0] is not q
    gradients = torch.autograd.grad(rotated, (q, k), (dq, dk), create_graph=True)
    opposite = by_reference(replace(case, reverse=True), (dq, dk), where, BFLOAT16)
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(gradients, opposite))


def test_the_short_way_and_the_long_way_have_the_same_bits(device, monkeypatch):
    case = Case(BFLOAT16, positions="offset")
    (q, k), where = case.inputs(device, 0)
    short = rope(q, k, *case.tables(device), backend="cuda", **where)
    monkeypatch.setattr(checks, "DEBUG", True)
    long = rope(q, k, *case.tables(device), backend="cuda", **where)
    assert torch.equal(short[0], long[0]) and torch.equal(short[1], long[1])


WRONG = {
    "dtype of q": ({"q": torch.zeros(2, 3, 2, 8, dtype=torch.int32)}, "q must be float32"),
    "rank of q": ({"q": torch.zeros(2, 8)}, "3 or 4 dimensions"),
    "stride of q": ({"q": torch.zeros(2, 3, 8, 2).transpose(2, 3)}, "q must be contiguous in its last dimension"),
    "dtype of k": ({"k": torch.zeros(2, 3, 2, 8, dtype=FLOAT16)}, "k must have the dtype of q"),
    "shape of k": ({"k": torch.zeros(2, 4, 2, 8)}, "k must have the shape of q"),
    "stride of k": ({"k": torch.zeros(2, 3, 8, 2).transpose(2, 3)}, "k must be contiguous in its last dimension"),
    "dtype of cos": ({"cos": torch.zeros(9, 4, dtype=FLOAT16)}, "cos must be float32"),
    "dtype of sin": ({"sin": torch.zeros(9, 4, dtype=torch.float64)}, "sin must be float32"),
    "shape of cos": ({"cos": torch.zeros(9, 5), "sin": torch.zeros(9, 5)}, "rotary_dim from 2 to 8"),
    "shape of sin": ({"sin": torch.zeros(8, 4)}, "sin must have shape"),
    "stride of cos": ({"cos": torch.zeros(4, 9).T}, "cos must be contiguous"),
    "length of cos": ({"cos": torch.zeros(2, 4), "sin": torch.zeros(2, 4)}, "a row for each position"),
    "no rows": ({"cos": torch.zeros(0, 4), "sin": torch.zeros(0, 4)}, "no rows"),
    "offset beyond": ({"offset": 7}, "a row for each position"),
    "offset below 0": ({"offset": -1}, "at least 0"),
    "dtype of positions": ({"positions": torch.zeros(3)}, "positions must be int32 or int64"),
    "shape of positions": ({"positions": torch.zeros(4, dtype=torch.int64)}, "an entry for each token"),
    "positions and offset": ({"positions": torch.zeros(3, dtype=torch.int64), "offset": 1}, "together with positions"),
    "dtype of offsets": ({"starts": torch.zeros(2)}, "offsets must be int32 or int64"),
    "shape of offsets": ({"starts": torch.zeros(3, dtype=torch.int64)}, "offsets must have shape"),
    "cu_seqlens unpacked": ({"cu_seqlens": torch.zeros(2, dtype=torch.int32)}, "needs packed q"),
    "dtype of cu_seqlens": ({"q": torch.zeros(3, 2, 8), "k": None, "cu_seqlens": torch.zeros(2)}, "cu_seqlens must be int32"),
    "in place, expanded": ({"q": torch.zeros(1, 3, 2, 8).expand(2, 3, 2, 8), "inplace": True}, "must not be expanded"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_op_refuses_what_is_wrong(name, device):
    changes, message = WRONG[name]
    zeros = torch.zeros(2, 3, 2, 8)
    given = {
        "q": zeros,
        "k": zeros.clone(),
        "cos": torch.zeros(9, 4),
        "sin": torch.zeros(9, 4),
        "positions": None,
        "starts": None,
        "offset": 0,
    }
    given |= {"cu_seqlens": None, "inplace": False} | changes
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    if changes.get("inplace"):
        given["q"] = changes["q"].to(device)[:1].expand(2, 3, 2, 8)
    op = extension.op("rope_" if given.pop("inplace") else "rope")
    with pytest.raises(ValueError, match=message):
        op(*given.values(), False, False)


def test_the_public_function_says_in_its_own_words_what_is_wrong(device):
    q = torch.zeros(2, 3, 2, 8, device=device)
    cos = torch.zeros(9, 4, device=device)
    with pytest.raises(TypeError, match="q must be of dtype"):
        rope(q.int(), None, cos, cos, backend="cuda")
    with pytest.raises(TypeError, match=r"q must be a torch\.Tensor"):
        rope([1.0], None, cos, cos, backend="cuda")
    with pytest.raises(ValueError, match="sin must have shape of cos"):
        rope(q, None, cos, cos[:8], backend="cuda")
    with pytest.raises(TypeError, match="interleaved must be True or False"):
        rope(q, None, cos, cos, interleaved="yes", backend="cuda")
    with pytest.raises(NotImplementedError, match="no gradient for cos"):
        rope(q, None, cos.clone().requires_grad_(), cos, backend="cuda")
    with pytest.raises(NotImplementedError, match="float64"):
        rope(q.double(), None, cos, cos, backend="cuda")


def test_opcheck(device):
    case = Case(BFLOAT16, head_dim=24, positions="offsets")
    (q, k), where = case.inputs(device, 0)
    where = (None, where["offsets"], 0, None, False, True)
    for op in ("rope", "rope_"):
        torch.library.opcheck(extension.op(op), (q.clone(), k.clone(), *case.tables(device), *where))
        torch.library.opcheck(extension.op(op), (q.clone(), None, *case.tables(device), *where))
    for op in ("rope_at", "rope_at_"):
        torch.library.opcheck(extension.op(op), (q.clone(), k.clone(), *case.tables(device), 3, True))


def test_compiles_whole_with_dynamic_shapes(device):
    def block(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, offsets: int) -> Tensor:
        q, k = rope(2 * q, k, cos, sin, offsets=offsets, backend="cuda")
        return q * k

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen, offset in ((6, 3), (9, 7)):
        case = Case(heads=(2, 2), lengths=(seqlen, seqlen))
        (q, k), _ = case.inputs(device, 0)
        q.requires_grad_()
        k.requires_grad_()
        expected, actual = (function(q, k, *case.tables(device), offset) for function in (block, compiled))
        assert torch.equal(actual, expected)
        for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), (q, k)) for out in (actual, expected))):
            assert torch.equal(ours, theirs)
    torch._dynamo.reset()


def test_in_place_and_packed_compile_whole(device):
    def step(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, offsets: Tensor) -> Tensor:
        q, _ = rope(q, k, cos, sin, cu_seqlens=cu_seqlens, offsets=offsets, inplace=True, backend="cuda")
        return q + 1

    torch._dynamo.reset()
    case = Case(lengths=(5, 1), packed=True)
    tensors, _ = case.inputs(device, 0)
    bounds, offsets = torch.tensor([0, 5, 6], dtype=torch.int32, device=device), torch.tensor([3, 1], device=device)
    copies = [tensor.clone() for tensor in tensors]
    with torch.no_grad():
        expected = step(*tensors, *case.tables(device), bounds, offsets)
        actual = torch.compile(step, fullgraph=True, backend="aot_eager")(
            *copies, *case.tables(device), bounds, offsets
        )
    assert torch.equal(actual, expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(copies, tensors))
    torch._dynamo.reset()


# --- faults -----------------------------------------------------------------------------------------------------------------------------

SCRIPT = """
import torch
from pytransformer import extension
q, k, table = torch.randn(2, 5, 3, 16), torch.randn(2, 5, 1, 16), torch.randn(8, 8)
extension.op("rope")(q, k, table, table, torch.tensor([0, 3, 8, -1, 2]), None, 0, None, False, False)
print("finished")
"""
FAULTS = {
    "a head too many": ("if (h < heads) {\n      a[h] =", "if (h <= heads) {\n      a[h] ="),
    "a token too many": ("token >= call.tokens) return;", "token > call.tokens) return;"),
    "position not clamped": ("return position < 0 ? 0 : position < call.length ? position : call.length - 1;", "return position;"),
}  # fmt: skip


@EMULATED
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_is_reported(fault, tmp_path: Path):
    result = run_broken(tmp_path, "rope/rope.cu", [FAULTS[fault]], SCRIPT)
    assert "finished" not in result.stdout
    assert "AddressSanitizer" in result.stderr and "rope" in result.stderr
