"""RoPE: closed forms, layouts, positions, and the frequency tables against Hugging Face's."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pytransformer.reference import rope, rope_frequencies, rope_tables

HEAD_DIM, ROTARY_DIM, LENGTH = 16, 8, 40


@pytest.fixture
def tables(device):
    return rope_tables(ROTARY_DIM, LENGTH, device=device)


def make_qk(device, dtype=torch.float64):
    q = torch.randn(2, 5, 4, HEAD_DIM, dtype=dtype, device=device)
    return q, torch.randn(2, 5, 2, HEAD_DIM, dtype=dtype, device=device)


def test_table_is_cos_and_sin_of_position_times_frequency(device):
    cos, sin = rope_tables(6, 50, base=100.0, device=device)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (50, 3)
    for position in (0, 1, 7, 49):
        for pair in range(3):
            angle = position * 100.0 ** (-2 * pair / 6)
            assert cos[position, pair].item() == torch.tensor(math.cos(angle), dtype=torch.float32).item()
            assert sin[position, pair].item() == torch.tensor(math.sin(angle), dtype=torch.float32).item()


@pytest.mark.parametrize("interleaved", [False, True])
def test_inner_product_depends_on_the_distance_only(interleaved, device):
    cos, sin = rope_tables(HEAD_DIM, 200, device=device)
    cos, sin = cos.double(), sin.double()
    q, k = torch.randn(2, 1, 1, 1, HEAD_DIM, dtype=torch.float64, device=device)

    def product(position_q, position_k):
        rotated_q, _ = rope(q, None, cos, sin, offsets=position_q, interleaved=interleaved)
        rotated_k, _ = rope(k, None, cos, sin, offsets=position_k, interleaved=interleaved)
        return (rotated_q * rotated_k).sum()

    for distance in (0, 1, 17):
        expected = product(distance, 0)
        for shift in (1, 50, 150):  # the tables are float32, hence that precision
            assert_close(product(distance + shift, shift).float(), expected.float())
    assert not torch.isclose(product(17, 0), product(0, 17))


def test_interleaved_is_a_permutation_of_half(tables, device):
    """GPT-J's layout with feature 2i, 2i+1 is Llama's with i, i + d/2: permute, rotate, permute back."""
    q, _ = make_qk(device)
    permutation = torch.arange(ROTARY_DIM, device=device).view(-1, 2).T.flatten()  # 0 2 4 … 1 3 5 …
    rest = torch.arange(ROTARY_DIM, HEAD_DIM, device=device)
    order = torch.cat([permutation, rest])
    half, _ = rope(q[..., order], None, *tables)
    interleaved, _ = rope(q, None, *tables, interleaved=True)
    assert torch.equal(half, interleaved[..., order])


def test_each_pair_turns_as_a_complex_number(tables, device):
    q, k = make_qk(device)
    rotated = rope(q, k, *tables, interleaved=True)
    turn = torch.complex(*(table.double() for table in tables))[:5]
    for x, y in zip((q, k), rotated, strict=True):
        pairs = torch.view_as_complex(x[..., :ROTARY_DIM].unflatten(-1, (-1, 2)))
        expected = torch.view_as_real(pairs * turn[None, :, None, :]).flatten(-2)
        assert_close(y[..., :ROTARY_DIM], expected)
        assert torch.equal(y[..., ROTARY_DIM:], x[..., ROTARY_DIM:])


def test_opposite_angle_undoes_the_rotation(tables, device):
    q, k = make_qk(device, torch.float32)
    cos, sin = tables
    for x, y in zip((q, k), rope(*rope(q, k, cos, sin), cos, -sin), strict=True):
        assert_close(x, y)


def test_positions_and_offsets(tables, device):
    q, k = make_qk(device)
    whole = rope(q, k, *tables, offsets=3)[0]
    for index in range(5):
        assert torch.equal(
            whole[:, index : index + 1], rope(q[:, index : index + 1], None, *tables, offsets=3 + index)[0]
        )
    positions = torch.arange(3, 8, device=device)
    assert torch.equal(whole, rope(q, k, *tables, positions=positions)[0])
    assert torch.equal(whole, rope(q, k, *tables, positions=positions.expand(2, 5), offsets=99)[0])
    per_sequence = rope(q, k, *tables, offsets=torch.tensor([3, 11], device=device))[1]
    assert torch.equal(per_sequence[1:], rope(q[1:], k[1:], *tables, offsets=11)[1])
    assert torch.equal(per_sequence[:1], rope(q[:1], k[:1], *tables, offsets=3)[1])


def test_packed_equals_separate_sequences(tables, device):
    lengths = [4, 0, 1, 5]
    cu_seqlens = torch.tensor([0, 4, 4, 5, 10], dtype=torch.int32, device=device)
    q, k = (tensor.flatten(0, 1) for tensor in make_qk(device))
    offsets = torch.tensor([0, 7, 30, 2], dtype=torch.int32, device=device)
    packed = rope(q, k, *tables, cu_seqlens=cu_seqlens, offsets=offsets)
    for x, y in zip((q, k), packed, strict=True):
        alone = [
            rope(part[None], None, *tables, offsets=offset)[0][0]
            for part, offset in zip(x.split(lengths), offsets.tolist(), strict=True)
        ]
        assert torch.equal(y, torch.cat(alone))
    as_one = rope(q, None, *tables)[0]
    assert torch.equal(as_one, rope(q[None], None, *tables)[0][0])


def test_inplace_writes_and_returns_the_inputs_but_not_under_grad(tables, device):
    q, k = make_qk(device)
    expected = rope(q, k, *tables)
    tracked = q.clone().requires_grad_()
    rotated, _ = rope(tracked, k.clone(), *tables, inplace=True)
    assert torch.equal(tracked, q) and torch.equal(rotated, expected[0])
    rotated_q, rotated_k = rope(q, k, *tables, inplace=True)
    assert rotated_q is q and rotated_k is k
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])
    assert rope(q, None, *tables, inplace=True)[1] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_rounds_once(dtype, tables, device):
    q, k = make_qk(device, dtype)
    for x, y in zip(rope(q, k, *tables), rope(q.float(), k.float(), *tables), strict=True):
        assert torch.equal(x, y.to(dtype))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient_against_finite_differences(interleaved, tables, device):
    q, k = (tensor[:1, :2, :2].requires_grad_() for tensor in make_qk(device))
    assert gradcheck(lambda q, k: rope(q, k, *tables, offsets=4, interleaved=interleaved), (q, k))


PAIRS = 32
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0},
    "yarn_ratio": {"rope_type": "yarn", "factor": None},
    "yarn_betas": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 24.0, "beta_slow": 2.0, "attention_factor": 0.9},
    "yarn_exact_borders": {"rope_type": "yarn", "factor": 8.0, "truncate": False},
    "yarn_mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.01 * pair for pair in range(PAIRS)],
        "long_factor": [1.0 + pair for pair in range(PAIRS)],
    },
    "longrope_factors": {
        "rope_type": "longrope",
        "factor": 16.0,
        "attention_factor": 1.19,
        "short_factor": [1.0] * PAIRS,
        "long_factor": [2.0] * PAIRS,
    },
}


@pytest.mark.parametrize("length", [1024, 8192])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(name, base, length):
    """Context of 2048 in training; tables for a shorter and a longer sequence."""
    scaling = {**SCALINGS[name], "original_max_position_embeddings": 2048}
    # transformers' "dynamic" takes the original length from max_position_embeddings; for the others that is the table's length
    max_positions = 2048 if name == "dynamic" else length
    config = LlamaConfig(
        hidden_size=2 * PAIRS,
        num_attention_heads=1,
        max_position_embeddings=max_positions,
        rope_parameters={**scaling, "rope_theta": base},
    )
    if name == "default":
        expected = 1.0 / base ** (torch.arange(0, 2 * PAIRS, 2).float() / (2 * PAIRS))
        expected_factor = 1.0
    else:
        expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](
            config, torch.device("cpu"), seq_len=length
        )
    frequencies, attention_factor = rope_frequencies(2 * PAIRS, length, base=base, scaling=scaling)
    assert_close(frequencies.float(), expected, rtol=1.3e-6, atol=0)
    assert attention_factor == pytest.approx(expected_factor, rel=1e-12)


def test_attention_factor_multiplies_the_tables(device):
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
    cos, sin = rope_tables(8, 20, scaling=scaling, device=device)
    expected = (0.1 * math.log(8.0) + 1) ** 2
    assert_close(cos**2 + sin**2, torch.full_like(cos, expected))


def test_ntk_stretches_the_slowest_pair_by_the_factor_and_the_fastest_not_at_all():
    plain, _ = rope_frequencies(16, 100)
    stretched, _ = rope_frequencies(16, 100, scaling={"type": "ntk", "factor": 4.0})
    assert_close(stretched[0], plain[0])
    assert_close(stretched[-1], plain[-1] / 4)


def test_rope_theta_in_scaling_is_the_base(device):
    with_key = rope_tables(8, 9, scaling={"rope_type": "default", "rope_theta": 500.0}, device=device)
    for table, expected in zip(with_key, rope_tables(8, 9, base=500.0, device=device), strict=True):
        assert torch.equal(table, expected)


@pytest.mark.parametrize(
    ("rotary_dim", "scaling", "message"),
    [
        (7, None, "rotary_dim must be a positive even number, got 7"),
        (0, None, "rotary_dim must be a positive even number, got 0"),
        (8, {"rope_type": "su"}, "rope_type must be one of .*'llama3'.* got 'su'"),
        (8, {"rope_type": "linear"}, "'linear' needs the keys .'factor'."),
        (8, {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings"),
        (
            8,
            {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "original_max_position_embeddings": 4},
            "longrope needs 4 factors",
        ),
    ],
)
def test_bad_tables_are_refused(rotary_dim, scaling, message):
    with pytest.raises(ValueError, match=message):
        rope_tables(rotary_dim, 10, scaling=scaling)
