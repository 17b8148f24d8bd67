"""What rope refuses, and in which words."""

from __future__ import annotations

import re

import pytest
import torch

from pytransformer import reference, rope
from tests.ops.rope_cases import (
    LENGTH,
    draw,
    tables,
)

Q, K = torch.ones(2, 6, 3, 12), torch.ones(2, 6, 1, 12)
COS, SIN = reference.rope_tables(8, LENGTH)
PACKED = {"q": torch.ones(6, 3, 12), "k": None}
INTS = torch.arange(6)
BAD_INPUT = [
    (TypeError, "q must be a torch.Tensor, got None (NoneType)", {"q": None}),
    (TypeError, "q must be of dtype float32 or float16 or bfloat16 or float64, got int64", {"q": Q.long()}),
    (ValueError, "q must have 3 or 4 dimensions: (batch, seqlen, num_heads, head_dim) or packed", {"q": Q[0, 0]}),
    (
        ValueError,
        "q must be contiguous in its last dimension (stride 1)",
        {"q": Q.transpose(2, 3).contiguous().transpose(2, 3)},
    ),
    (TypeError, "k must be of dtype", {"k": K.int()}),
    (ValueError, "k must have 4 dimensions", {"k": K[0]}),
    (ValueError, "k must be on cpu like the other tensors, got meta", {"k": K.to("meta")}),
    (TypeError, "k must have the dtype of q (float32), got float16", {"k": K.half()}),
    (
        ValueError,
        "k must have shape of q, except in the number of heads, = (2, 6, any, 12), got (2, 5, 1, 12)",
        {"k": K[:, 1:]},
    ),
    (
        ValueError,
        "k must have shape of q, except in the number of heads, = (2, 6, any, 12), got (2, 6, 1, 8)",
        {"k": K[..., :8]},
    ),
    (ValueError, "k must be contiguous in its last dimension", {"k": torch.ones(2, 6, 12, 2).transpose(2, 3)}),
    (TypeError, "cos must be a torch.Tensor, got 0.5 (float)", {"cos": 0.5}),
    (TypeError, "cos must be of dtype float32, got bfloat16", {"cos": COS.bfloat16()}),
    (TypeError, "sin must be of dtype float32, got float64", {"sin": SIN.double()}),
    (ValueError, "cos must have 2 dimensions: (length, rotary_dim / 2), got shape (1, 24, 4)", {"cos": COS[None]}),
    (ValueError, "sin must have shape of cos = (24, 4), got (24, 3)", {"sin": SIN[:, :3]}),
    (ValueError, "sin must be contiguous in its last dimension", {"sin": SIN.t().contiguous().t()}),
    (ValueError, "sin must be on cpu like the other tensors, got meta", {"sin": SIN.to("meta")}),
    (
        ValueError,
        "cos must have shape (length, rotary_dim / 2) with rotary_dim from 2 to q's head_dim (12), got (24, 7), that is rotary_dim 14",
        {"cos": torch.ones(24, 7), "sin": torch.ones(24, 7)},
    ),
    (ValueError, "got (24, 0), that is rotary_dim 0", {"cos": torch.ones(24, 0), "sin": torch.ones(24, 0)}),
    (NotImplementedError, "rope has no gradient for cos, which requires grad", {"cos": COS.clone().requires_grad_()}),
    (
        ValueError,
        "cos and sin must have a row for each position: 4 (offsets) + 6 (tokens) rows, got 9",
        {"cos": COS[:9], "sin": SIN[:9], "offsets": 4},
    ),
    (TypeError, "offsets must be an int, got 1.0 (float)", {"offsets": 1.0}),
    (ValueError, "offsets must be at least 0, got -1", {"offsets": -1}),
    (TypeError, "offsets must be of dtype int32 or int64, got float32", {"offsets": torch.ones(2)}),
    (ValueError, "offsets must have shape (batch,) = (2), got (3,)", {"offsets": torch.tensor([0, 1, 2])}),
    (ValueError, "offsets must hold positions from 0 to", {"offsets": torch.tensor([0, -3])}),
    (
        ValueError,
        "offsets must leave room in the 24 rows of cos and sin: sequence 1 ends at position 25 (offset 19)",
        {"offsets": torch.tensor([18, 19])},
    ),
    (TypeError, "positions must be of dtype int32 or int64, got float32", {"positions": torch.ones(6)}),
    (
        ValueError,
        "positions must have shape (seqlen) or (batch, seqlen) = (6,) or (2, 6), got (5,)",
        {"positions": INTS[1:]},
    ),
    (ValueError, "positions must have shape (total) = (6,), got (2, 6)", {**PACKED, "positions": INTS.expand(2, 6)}),
    (ValueError, "positions must hold rows of cos and sin from 0 to 23, got 24 at index [5]", {"positions": INTS + 19}),
    (ValueError, "positions must hold rows of cos and sin from 0 to 23, got -1 at index [0]", {"positions": INTS - 1}),
    (ValueError, "offsets must not be given together with positions, got 2 (int)", {"positions": INTS, "offsets": 2}),
    (ValueError, "cu_seqlens needs packed q and k (total, num_heads, head_dim)", {"cu_seqlens": torch.tensor([0, 6])}),
    (TypeError, "cu_seqlens must be of dtype int32, got int64", {**PACKED, "cu_seqlens": torch.tensor([0, 6])}),
    (ValueError, "cu_seqlens must start at 0", {**PACKED, "cu_seqlens": torch.tensor([0, 4, 2, 6], dtype=torch.int32)}),
    (
        ValueError,
        "cos and sin must have a row for each position: 20 (offsets) + 5 (tokens) rows, got 24",
        {**PACKED, "cu_seqlens": torch.tensor([0, 5, 6], dtype=torch.int32), "offsets": 20},
    ),
    (TypeError, "interleaved must be True or False, got 1 (int)", {"interleaved": 1}),
    (TypeError, "inplace must be True or False, got 'yes' (str)", {"inplace": "yes"}),
    (
        ValueError,
        "q must not be expanded for inplace=True: elements share memory",
        {"q": Q[:1].expand(2, 6, 3, 12), "inplace": True},
    ),
    (ValueError, "backend must be one of 'cuda', 'triton', 'torch', 'reference', got 'gpu'", {"backend": "gpu"}),
]


@pytest.mark.parametrize(
    ("error", "message", "arguments"), BAD_INPUT, ids=[message[:40] for _, message, _ in BAD_INPUT]
)
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, object]) -> None:
    given = {"q": Q, "k": K, "cos": COS, "sin": SIN, **arguments}
    with pytest.raises(error, match=re.escape(message)):
        rope(**given)


def test_a_call_like_one_that_was_checked_is_checked_where_it_differs(device: torch.device) -> None:
    """Checked calls go straight to the launch that was kept for them; an int offset is no part of what they have in common."""
    (q, k), (cos, sin) = (tensor.detach() for tensor in draw(device)), tables(device)
    options: dict[str, object] = {"backend": "triton"}
    for offsets in (0, 1, 0, LENGTH - 6, 5):
        rotated = rope(q, k, cos, sin, offsets=offsets, **options)  # type: ignore[arg-type]
        expected = rope(q, k, cos, sin, offsets=torch.full((2,), offsets, device=device), **options)  # type: ignore[arg-type]
        assert all(torch.equal(found, wanted) for found, wanted in zip(rotated, expected))
    with pytest.raises(ValueError, match="cos and sin must have a row for each position"):
        rope(q, k, cos, sin, offsets=LENGTH - 5, **options)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="no gradient for cos"):
        rope(q, k, cos.clone().requires_grad_(), sin, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="offsets must be at least 0"):
        rope(q, k, cos, sin, offsets=-1, **options)  # type: ignore[arg-type]
    for changes in ({"interleaved": 0}, {"inplace": 0}, {"offsets": True}, {"offsets": 1.0}):
        with pytest.raises(TypeError):
            rope(q, k, cos, sin, **{**options, **changes})  # type: ignore[arg-type]
    for wrong in (k[..., :8], k[:, :5], k.half(), k.to("meta")):
        with pytest.raises((ValueError, TypeError)):
            rope(q, wrong, cos, sin, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="q must be contiguous in its last dimension"):
        rope(q.transpose(2, 3).contiguous().transpose(2, 3), k, cos, sin, **options)  # type: ignore[arg-type]
    positions = torch.arange(6, device=device)
    for _ in range(2):
        rope(q, k, cos, sin, positions=positions, **options)  # type: ignore[arg-type]
    if device.type == "cpu":  # values on a GPU are not read
        with pytest.raises(ValueError, match="positions must hold rows of cos and sin"):
            rope(q, k, cos, sin, positions=positions + LENGTH, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="offsets must not be given together with positions"):
        rope(q, k, cos, sin, positions=positions, offsets=1, **options)  # type: ignore[arg-type]
    first, before = q.clone(), q._version
    rope(first, None, cos, sin, inplace=True, **options)  # type: ignore[arg-type]
    version = first._version
    rope(first, None, cos, sin, inplace=True, **options)  # type: ignore[arg-type]
    assert first._version > version and q._version == before
