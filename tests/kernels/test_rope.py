"""The RoPE kernel against the reference: layouts, positions, what it must not touch, and faults that must be seen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pytransformer import reference, triton_interpreter
from pytransformer.kernels.rope import RopeConfig, rope_config
from pytransformer.verification import ContractError
from tests.kernels.rope_contract import BFLOAT16, FLOAT16, FLOAT32, LENGTH, SMALL, Case, measure
from tests.support.broken_kernel import load_broken
from tests.support.launchers import rope_by, rope_rotate

# --- the contract -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_contract(
    dtype: torch.dtype, interleaved: bool, reverse: bool, device: torch.device, poison_empty: None
) -> None:
    measure(Case(dtype, interleaved=interleaved, reverse=reverse), device).check()


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "interleaved"),
    [
        (8, 2, False),
        (24, 16, True),
        (40, 40, False),
        (64, 24, False),
        (80, 32, True),
        (96, 96, True),
        (256, 256, False),
    ],
)
def test_every_width_and_partial_rotation(
    head_dim: int, rotary_dim: int, interleaved: bool, device, poison_empty: None
) -> None:
    case = Case(
        BFLOAT16, (3,), heads=(2, 1), head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved, config=None
    )
    measure(case, device, least=1).check()


@pytest.mark.parametrize("positions", ["index", "offset", "offsets", "given", "given per sequence"])
@pytest.mark.parametrize("lengths", [(7, 7), (1, 1, 1, 1, 1, 1)], ids=str)
def test_positions(positions: str, lengths: tuple[int, ...], device: torch.device) -> None:
    measure(Case(BFLOAT16, lengths, positions=positions), device, least=1).check()


@pytest.mark.parametrize("positions", ["index", "offsets"])
@pytest.mark.parametrize("lengths", [(9,), (0, 3, 0, 0, 8, 1, 0), (4, 4), (1,) * 9], ids=str)
def test_packed_sequences(positions: str, lengths: tuple[int, ...], device: torch.device) -> None:
    measure(Case(BFLOAT16, lengths, packed=True, positions=positions), device, least=1).check()


def test_more_packed_sequences_than_one_block_of_bounds(device: torch.device) -> None:
    lengths = tuple(1 + index % 2 for index in range(300))
    case = Case(lengths=lengths, packed=True, heads=(1, 0), head_dim=2, rotary_dim=2, positions="offsets", config=None)
    measure(case, device, seeds=2).check()


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (5, 0), (7, 6)], ids=str)
@pytest.mark.parametrize("config", [None, SMALL], ids=["shipped", "small"])
def test_heads(heads: tuple[int, int], config: RopeConfig | None, device: torch.device, poison_empty: None) -> None:
    measure(Case(BFLOAT16, heads=heads, config=config), device, least=1).check()


@pytest.mark.parametrize("seqlen", [1, 3, 4, 5])
def test_tokens_around_a_tile(seqlen: int, device: torch.device, poison_empty: None) -> None:
    measure(Case(lengths=(seqlen,)), device, least=1).check()


def test_inner_products_depend_on_distance_alone(device: torch.device) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 64, device=device).expand(1, 20, 1, 64).contiguous() for _ in range(2))
    cos, sin = (table.to(device) for table in reference.rope_tables(64, 20))
    q, k = rope_rotate(q, k, cos, sin)
    scores = q[0, :, 0] @ k[0, :, 0].T
    for distance in range(-19, 20):
        band = scores.diagonal(distance)
        torch.testing.assert_close(band, band[:1].expand_as(band), atol=1e-4, rtol=1e-4)


# --- shapes and memory ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8), (0, 2, 8)])
def test_nothing_to_rotate(shape: tuple[int, ...], device: torch.device) -> None:
    cos, sin = (table.to(device) for table in reference.rope_tables(8, 10))
    q = torch.empty(shape, device=device)
    rotated, k = rope_rotate(q, q, cos, sin)
    assert rotated.shape == k.shape == q.shape


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_in_place_has_the_same_bits_and_touches_nothing_else(
    interleaved: bool, packed: bool, device: torch.device
) -> None:
    case = Case(BFLOAT16, (7, 7), packed, head_dim=24, interleaved=interleaved, positions="offsets")
    (q, k), where = case.inputs(device, 0)
    options = {"interleaved": interleaved, "config": SMALL, **where}
    expected = rope_rotate(q, k, *case.tables(device), **options)
    # q and k inside larger tensors, whose other cells are compared bit by bit.
    holder = torch.randn(*q.shape[:-2], 7, 32, device=device).to(BFLOAT16)
    before = holder.clone()
    inner_q, inner_k = holder[..., :3, :24], holder[..., 4:6, 8:]
    inner_q.copy_(q)
    inner_k.copy_(k)
    rotated = rope_rotate(inner_q, inner_k, *case.tables(device), inplace=True, **options)
    assert rotated[0] is inner_q and rotated[1] is inner_k
    before[..., :3, :24], before[..., 4:6, 8:] = expected
    assert torch.equal(holder, before)
    assert torch.equal(inner_q[..., 16:], q[..., 16:])


def test_strides_are_free_and_holes_are_not_read(device: torch.device) -> None:
    case = Case(BFLOAT16, head_dim=24)
    (q, k), _ = case.inputs(device, 0)
    expected = rope_rotate(q, k, *case.tables(device), config=SMALL)
    qkv = torch.full((7, 2, 8, 24), float("nan"), device=device, dtype=BFLOAT16).transpose(0, 1)
    qkv[:, :, 1:4], qkv[:, :, 5:7] = q, k
    # Tables as the first columns of something wider, too.
    cos, sin = torch.cat([*case.tables(device), torch.full((LENGTH, 3), float("nan"), device=device)], dim=1)[
        :, :16
    ].split(8, dim=1)
    strided = rope_rotate(qkv[:, :, 1:4], qkv[:, :, 5:7], cos, sin, config=SMALL)
    assert torch.equal(strided[0], expected[0]) and torch.equal(strided[1], expected[1])
    flat = torch.cat([q.new_full((1,), float("nan")), q.flatten()])[1:].view_as(q)
    assert torch.equal(rope_rotate(flat, None, cos, sin, config=SMALL)[0], expected[0])
    row = q[:, :1].expand_as(q)
    assert torch.equal(rope_rotate(row, None, cos, sin)[0], rope_rotate(row.contiguous(), None, cos, sin)[0])


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_tokens_lie_beyond_2_to_31_elements(interleaved: bool, device: torch.device) -> None:
    # Of the 4 GB only the pages at its ends are ever touched.
    holder = torch.empty(2**31 + 2048, dtype=BFLOAT16, device=device)
    case = Case(BFLOAT16, heads=(3, 0), head_dim=24)
    (q, _), _ = case.inputs(device, 0)
    far = holder.as_strided(q.shape, (2**31 + 64, 72, 24, 1)).copy_(q)
    options = {"interleaved": interleaved, "config": SMALL}
    expected = rope_rotate(q, None, *case.tables(device), **options)[0]
    assert torch.equal(rope_rotate(far, None, *case.tables(device), **options)[0], expected)
    rope_rotate(far, None, *case.tables(device), inplace=True, **options)
    assert torch.equal(far, expected)


def test_positions_outside_the_table_do_not_read_outside(device: torch.device) -> None:
    case = Case(heads=(2, 0))
    (q, _), _ = case.inputs(device, 0)
    cos, sin = case.tables(device)
    positions = torch.tensor([-1, -(2**31), 0, LENGTH - 1, LENGTH, 2**31 - 1, 3], device=device)
    rotated, _ = rope_rotate(q, None, cos, sin, positions=positions)
    assert torch.equal(rotated, rope_rotate(q, None, cos, sin, positions=positions.clamp(0, LENGTH - 1))[0])
    far, _ = rope_rotate(q, None, cos, sin, offsets=torch.tensor([2**40, -(2**40)], device=device))
    ends = torch.tensor([[LENGTH - 1], [0]], device=device).expand(2, 7)
    assert torch.equal(far, rope_rotate(q, None, cos, sin, positions=ends)[0])


def test_nan_in_padding_stays_there(device: torch.device) -> None:
    case = Case(BFLOAT16, (0, 3, 8), packed=True)
    (q, k), where = case.inputs(device, 0)
    clean = rope_rotate(q, k, *case.tables(device), config=SMALL, **where)
    q[3], k[3] = float("nan"), float("inf")
    dirty = rope_rotate(q, k, *case.tables(device), config=SMALL, **where)
    kept = [index for index in range(11) if index != 3]
    assert all(torch.equal(a[kept], b[kept]) for a, b in zip(clean, dirty))


def test_same_bits_each_run_in_any_order_of_programs(device: torch.device) -> None:
    case = Case(BFLOAT16, (5, 0, 12), packed=True, interleaved=True)
    (q, k), where = case.inputs(device, 0)
    first = rope_rotate(q, k, *case.tables(device), interleaved=True, config=SMALL, **where)
    for seed in range(200 if device.type == "cuda" else 1):
        order = triton_interpreter.program_order(seed) if triton_interpreter.installed() else contextlib.nullcontext()
        with order:
            again = rope_rotate(q, k, *case.tables(device), interleaved=True, config=SMALL, **where)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("rotary_dim", [2, 16, 32, 64, 80, 128, 256])
@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (32, 8), (64, 64)], ids=str)
def test_tiles_keep_loads_wide(rotary_dim: int, heads: tuple[int, int]) -> None:
    config = rope_config(rotary_dim, *heads)
    half = 1 << (rotary_dim // 2 - 1).bit_length()
    pairs = config.block_tokens * config.block_heads * half
    assert pairs <= 2048, "more than 16 pairs a thread need too many registers"
    # 8 elements of 16 bits a thread are one 128-bit access.
    assert pairs >= 1024 or config.block_tokens == 16


# --- faults -----------------------------------------------------------------------------------------------------------------------------

# Faults write and read out of bounds: the interpreter sees that, a GPU would let it corrupt the other tests.
INTERPRETED = pytest.mark.skipif(
    not triton_interpreter.installed(), reason="faulty kernels run in the interpreter only"
)

FAULTS = {
    "no mask at the row's end": [
        (
            "cols = tl.arange(0, BLOCK_HALF)[None, None, :]\n            mask = head_mask & (cols < HALF)",
            "cols = tl.arange(0, BLOCK_HALF)[None, None, :]\n            mask = head_mask & (cols < BLOCK_HALF)",
        )
    ],
    "no mask at the last head": [("(heads < num_heads)[None, :, None]", "(heads < num_heads + 1)[None, :, None]")],
    "no mask at the last token": [("token_mask = tokens < num_tokens", "token_mask = tokens <= num_tokens")],
    "wrong head stride": [
        ("rows = token_offsets[:, None, None] + tl.multiple_of(heads.to(tl.int64) * stride_head,",
         "rows = token_offsets[:, None, None] + tl.multiple_of(heads.to(tl.int64) * (stride_head - 1),")
    ],
    "token stride of the batch": [
        ("tl.multiple_of(batch * stride_q_batch + index * stride_q_seqlen, ALIGNMENT)",
         "tl.multiple_of(batch * stride_q_seqlen + index * stride_q_seqlen, ALIGNMENT)")
    ],
    "angle of the wrong sign": [("new_first, new_second = first * cos - second", "new_first, new_second = first * cos + second")],
    "position of the batch, not of the sequence": [("positions = index - start + offset", "positions = tokens + offset")],
    "first head of each tile only": [("for first_head in range(0, num_heads, BLOCK_HEADS)", "for first_head in range(0, 1, BLOCK_HEADS)")],
    "first heads again": [("token_mask, first_head + BLOCK_HEADS, num_heads", "token_mask, 0, num_heads")],
    "rest not copied": [("tl.store(out_ptr + out_rows + cols, tl.load(x_ptr + rows + cols, mask=mask, other=0.0), mask=mask)", "pass")],
    "position not clamped": [("positions = tl.minimum(tl.maximum(positions, 0), table_length - 1)", "pass")],
    "next sequence's start": [("begun = starts[None, :] <= index[:, None]", "begun = starts[None, :] < index[:, None]")],
}  # fmt: skip


def _is_caught(device: torch.device, rotate: Callable[..., tuple[Tensor, Tensor | None]]) -> bool:
    """Whether the checks that the good kernel passes say no: by the contract, or by an error of the interpreter."""
    case = Case(BFLOAT16, (5, 5), heads=(3, 1), head_dim=24, rotary_dim=20)
    try:
        measure(case, device, 1, rotate).check()
        measure(replace(case, lengths=(3, 0, 6), packed=True), device, 1, rotate).check()
        (q, k), _ = case.inputs(device, 0)
        outside = torch.tensor([0, LENGTH, 2, -1, 3], device=device)
        rotated = rotate(q, k, *case.tables(device), positions=outside)[0]
        return not torch.equal(rotated, rotate(q, k, *case.tables(device), positions=outside.clamp(0, LENGTH - 1))[0])
    except (ContractError, triton_interpreter.KernelFault):
        return True


def test_the_check_for_faults_passes_a_faithful_copy(device: torch.device, tmp_path: Path, poison_empty: None) -> None:
    assert not _is_caught(device, rope_by(load_broken(tmp_path, "rope")))


@INTERPRETED
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_is_caught(fault: str, device: torch.device, tmp_path: Path, poison_empty: None) -> None:
    assert _is_caught(device, rope_by(load_broken(tmp_path, "rope", *FAULTS[fault])))
