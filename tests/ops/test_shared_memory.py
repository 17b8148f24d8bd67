"""What is written must share no memory with what else is written or read; views of one buffer that share nothing are served."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pytransformer import rope
from pytransformer.ops.overlap import overlap, overlaps_itself
from pytransformer.ops.registered import REGISTERED
from tests.ops.norm_cases import BACKENDS
from tests.ops.shared_memory import LAYOUTS, Layout, apart, run

REFUSED = {name: layout for name, layout in LAYOUTS.items() if layout.pair is not None}
LEGAL = {name: layout for name, layout in LAYOUTS.items() if layout.pair is None}


def _message(layout: Layout) -> str:
    assert layout.pair is not None
    return "{} is written to, so it must not share memory with {}, got".format(*layout.pair)


def _bits(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REFUSED)
def test_tensors_that_share_what_is_written_are_refused_before_anything_is(
    name: str, backend: str, device: torch.device
) -> None:
    layout = REFUSED[name]
    tensors = layout.tensors(device)
    before = _bits(tensors)
    with pytest.raises(ValueError, match=_message(layout)):
        run(layout.op, tensors, backend)
    assert all(torch.equal(tensors[name], bits) for name, bits in before.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_launch_that_was_kept_refuses_them_too(name: str, backend: str, device: torch.device) -> None:
    layout = REFUSED[name]
    tensors = layout.tensors(device)
    try:
        for _ in range(3):
            run(layout.op, apart(tensors), backend)
    except NotImplementedError:
        assert backend == "torch"  # quantised caches, or any on a GPU
    before = _bits(tensors)
    with pytest.raises(ValueError, match=_message(layout)):
        run(layout.op, tensors, backend)
    assert all(torch.equal(tensors[name], bits) for name, bits in before.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LEGAL)
def test_views_of_one_buffer_that_share_no_element_are_served(name: str, backend: str, device: torch.device) -> None:
    layout = LEGAL[name]
    if layout.op == "kv_append" and backend == "torch" and device.type == "cuda":
        backend = "reference"  # torch serves no append on a GPU
    for _ in range(3):  # the last by a launch that was kept
        tensors = layout.tensors(device)
        alone = apart(tensors)
        run(layout.op, tensors, backend)
        run(layout.op, alone, backend)
        assert all(torch.equal(tensors[name], bits) for name, bits in _bits(alone).items())


@pytest.mark.parametrize("name", REFUSED)
def test_torch_ops_refuses_them_inside_a_dispatch_mode(name: str, device: torch.device) -> None:
    layout = REFUSED[name]
    tensors = layout.tensors(device)
    with FlopCounterMode(display=False), pytest.raises(ValueError, match=_message(layout)):
        run(layout.op, tensors, "reference")


def test_the_registered_op_refuses_them(device: torch.device) -> None:
    q = torch.ones(2, 5, 4, 8, device=device)
    cos = torch.ones(8, 4, device=device)
    arguments: tuple[Any, ...] = (q, q, cos, cos, None, None, None, False, False, 0, "reference")
    with pytest.raises(ValueError, match="q is written to, so it must not share memory with k"):
        torch.ops.pytransformer.rope_(*arguments)
    assert bool((q == 1).all())


def test_rotating_aside_reads_one_tensor_twice(device: torch.device) -> None:
    q = torch.ones(2, 5, 4, 8, device=device)
    cos, sin = torch.rand(8, 4, device=device), torch.rand(8, 4, device=device)
    first, second = rope(q, q, cos, sin)
    assert torch.equal(first, second) and bool((q == 1).all())


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "cuda"])
def test_sliding_windows_are_not_rotated_in_place(backend: str, device: torch.device) -> None:
    # No stride is 0, yet each row has half of the row before.
    q = torch.zeros(64, device=device).as_strided((1, 5, 1, 8), (64, 4, 8, 1))
    cos = torch.ones(8, 4, device=device)
    with pytest.raises(ValueError, match="q must not be expanded for inplace=True: elements share memory"):
        rope(q, None, cos, cos, inplace=True, backend=backend)


def test_each_op_that_writes_has_layouts() -> None:
    # kv_append_scaled is kv_append where the scales are made.
    ours = [op for op in REGISTERED if op.written and op.call.__module__.startswith("pytransformer.")]
    written = {op.name.removesuffix("_").removesuffix("_scaled") for op in ours}
    assert written == {layout.op for layout in LAYOUTS.values()}
    assert all(op.refusal is not None for op in ours)


def test_whether_views_overlap_is_what_listing_their_bytes_says() -> None:
    draw = random.Random(0)

    def layout() -> tuple[tuple[int, ...], tuple[int, ...], int]:
        dims = range(draw.randint(1, 3))
        return (
            tuple(draw.randint(1, 4) for _ in dims),
            tuple(draw.choice((0, 1, 2, 3, 5, 6, 8, 12)) for _ in dims),
            draw.choice((1, 2, 4)),
        )

    def offsets(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
        return [sum(i * s for i, s in zip(index, strides)) for index in itertools.product(*map(range, shape))]

    found = 0
    for _ in range(3000):
        (shape, strides, size), (other_shape, other_strides, other_size) = layout(), layout()
        distance = draw.randint(-40, 40)
        mine = {size * offset + byte for offset in offsets(shape, strides) for byte in range(size)}
        others = {
            distance + other_size * offset + byte
            for offset in offsets(other_shape, other_strides)
            for byte in range(other_size)
        }
        assert overlap((shape, strides, size), (other_shape, other_strides, other_size), distance) == bool(
            mine & others
        )
        assert overlaps_itself(shape, strides) == (len(set(offsets(shape, strides))) < len(offsets(shape, strides)))
        found += bool(mine & others)
    assert 500 < found < 2500
