"""Naive attention against torch's own, finite differences, brute-force loops and worked examples."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.testing import assert_close

from pytransformer.reference import attention, standard_alibi_slopes
from pytransformer.reference.philox import dropout_keep

BATCH, SEQLEN_Q, SEQLEN_K, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VALUE_DIM = 2, 5, 7, 4, 2, 8, 6


def make_qkv(device, *, seqlen_q=SEQLEN_Q, seqlen_k=SEQLEN_K, num_kv_heads=NUM_KV_HEADS, dtype=torch.float64):
    q = torch.randn(BATCH, seqlen_q, NUM_HEADS, HEAD_DIM, dtype=dtype, device=device, requires_grad=True)
    k = torch.randn(BATCH, seqlen_k, num_kv_heads, HEAD_DIM, dtype=dtype, device=device, requires_grad=True)
    v = torch.randn(BATCH, seqlen_k, num_kv_heads, VALUE_DIM, dtype=dtype, device=device, requires_grad=True)
    return q, k, v


def torch_attention(q, k, v, **options):
    heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    return F.scaled_dot_product_attention(*heads_first, enable_gqa=True, **options).transpose(1, 2)


def assert_same_with_gradients(ours, theirs, inputs):
    assert_close(ours, theirs)
    output_gradient = torch.randn_like(ours)
    for gradient, expected in zip(
        torch.autograd.grad(ours, inputs, output_gradient, retain_graph=True),
        torch.autograd.grad(theirs, inputs, output_gradient, retain_graph=True),
        strict=True,
    ):
        assert_close(gradient, expected)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_equals_torch_with_grouped_queries(num_kv_heads, device):
    inputs = make_qkv(device, num_kv_heads=num_kv_heads)
    assert_same_with_gradients(attention(*inputs), torch_attention(*inputs), inputs)


def test_equals_torch_with_scale(device):
    inputs = make_qkv(device)
    assert_same_with_gradients(attention(*inputs, softmax_scale=0.3), torch_attention(*inputs, scale=0.3), inputs)


def test_equals_torch_causal_square(device):
    inputs = make_qkv(device, seqlen_q=6, seqlen_k=6)
    assert_same_with_gradients(attention(*inputs, causal=True), torch_attention(*inputs, is_causal=True), inputs)


@pytest.mark.parametrize(
    "shape", [(SEQLEN_K,), (SEQLEN_Q, SEQLEN_K), (NUM_HEADS, SEQLEN_Q, 1), (BATCH, 1, SEQLEN_Q, SEQLEN_K)]
)
def test_equals_torch_with_boolean_mask(shape, device):
    inputs = make_qkv(device)
    mask = torch.rand(shape, device=device) > 0.3
    mask[..., 0] = True  # nothing is fully masked: torch gives NaN there
    ours = attention(*inputs, mask=mask)
    assert_same_with_gradients(
        ours, torch_attention(*inputs, attn_mask=mask.expand(BATCH, NUM_HEADS, SEQLEN_Q, SEQLEN_K)), inputs
    )
    assert torch.equal(attention(*inputs, mask=mask.to(torch.int32) * 5), ours)


@pytest.mark.parametrize(
    "shape", [(SEQLEN_Q, SEQLEN_K), (1, NUM_HEADS, 1, SEQLEN_K), (BATCH, NUM_HEADS, SEQLEN_Q, SEQLEN_K)]
)
def test_equals_torch_with_bias_and_its_gradient(shape, device):
    q, k, v = make_qkv(device)
    bias = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    expected = torch_attention(q, k, v, attn_mask=bias.expand(BATCH, NUM_HEADS, SEQLEN_Q, SEQLEN_K))
    assert_same_with_gradients(attention(q, k, v, bias=bias), expected, (q, k, v, bias))


def test_equals_torch_with_key_padding(device):
    inputs = make_qkv(device)
    padding = torch.ones(BATCH, SEQLEN_K, dtype=torch.bool, device=device)
    padding[0, 4:], padding[1, :2] = False, False
    expected = torch_attention(*inputs, attn_mask=padding[:, None, None, :])
    assert_same_with_gradients(attention(*inputs, key_padding_mask=padding), expected, inputs)


def test_softcap_alibi_and_sinks_equal_their_formulas(device):
    q, k, v = make_qkv(device, num_kv_heads=NUM_HEADS)
    slopes = torch.rand(BATCH, NUM_HEADS, device=device)
    sinks = torch.randn(NUM_HEADS, dtype=torch.float64, device=device, requires_grad=True)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(HEAD_DIM)
    scores = 2.5 * torch.tanh(scores / 2.5)
    distance = torch.arange(SEQLEN_Q)[:, None] + SEQLEN_K - SEQLEN_Q - torch.arange(SEQLEN_K)[None, :]
    scores = scores - slopes.double()[:, :, None, None] * distance.abs().to(device)
    denominator = scores.exp().sum(-1) + sinks.exp()[None, :, None]
    expected = torch.einsum("bhij,bjhd->bihd", scores.exp() / denominator[..., None], v)
    output, lse = attention(q, k, v, softcap=2.5, alibi_slopes=slopes, sinks=sinks, return_lse=True)
    assert_same_with_gradients(output, expected, (q, k, v, sinks))
    assert_same_with_gradients(lse, denominator.log(), (q, k, sinks))


def test_alibi_worked_by_hand(device):
    """One head, slope 1/2, scores all 0: the last query weighs keys at distances 2, 1, 0 as e^-1, e^-1/2, 1."""
    zeros = torch.zeros(1, 3, 1, 8, dtype=torch.float64, device=device)
    v = torch.eye(3, dtype=torch.float64, device=device)[None, :, None, :]
    output = attention(zeros, zeros, v, causal=True, alibi_slopes=torch.tensor([0.5], device=device))
    weights = torch.tensor([math.exp(-1), math.exp(-0.5), 1.0], dtype=torch.float64, device=device)
    assert_close(output[0, 2, 0], weights / weights.sum())


def test_standard_alibi_slopes():
    assert_close(standard_alibi_slopes(8), torch.tensor([2.0**-power for power in range(1, 9)]))
    # 12 heads, from the paper's code: those of 8, then the first four of every other one of 16.
    assert_close(standard_alibi_slopes(12)[8:], torch.tensor([2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]))


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(4, 4), (3, 6), (6, 3), (1, 5), (5, 1)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (1, -1), (-1, 2), (2, 0), (0, 1)])
def test_visible_keys_by_brute_force(seqlen_q, seqlen_k, causal, window, device):
    """With equal scores and one-hot values, the output row is the visible keys, each with weight 1 / count."""
    zeros_q = torch.zeros(1, seqlen_q, 1, 8, dtype=torch.float64, device=device)
    zeros_k = torch.zeros(1, seqlen_k, 1, 8, dtype=torch.float64, device=device)
    v = torch.eye(seqlen_k, dtype=torch.float64, device=device)[None, :, None, :]
    output = attention(zeros_q, zeros_k, v, causal=causal, window=window)
    left, right = window
    for i in range(seqlen_q):
        visible = []
        for j in range(seqlen_k):
            position = i + (seqlen_k - seqlen_q)
            future = causal and j > position
            too_old = left >= 0 and j < position - left
            too_new = right >= 0 and j > position + right
            visible.append(not (future or too_old or too_new))
        expected = torch.tensor(
            [float(sees) / max(sum(visible), 1) for sees in visible], dtype=torch.float64, device=device
        )
        assert_close(output[0, i, 0], expected)


def options_for_gradcheck(device):
    """Every option that touches a gradient; in each some row sees no key, by one means or another."""
    mask = torch.rand(BATCH, 1, 3, 4, device=device) > 0.4
    mask[0, :, 1] = False
    bias = torch.randn(1, NUM_HEADS, 3, 4, dtype=torch.float64, device=device)
    hidden = bias.clone()
    hidden[:, 1, 2] = -math.inf
    hidden[:, 0, :, 3] = -math.inf
    padding = torch.ones(BATCH, 4, dtype=torch.bool, device=device)
    padding[1] = False
    return {
        "plain": {},
        "mask": {"mask": mask},
        "mask_sinks": {"mask": mask, "sinks": torch.randn(NUM_HEADS, dtype=torch.float64, device=device)},
        "bias": {"bias": bias},
        "bias_minus_infinity": {"bias": hidden},
        "key_padding": {"key_padding_mask": padding, "softcap": 1.5},
        "window": {"window": (0, 0), "alibi_slopes": torch.rand(NUM_HEADS, device=device)},
        "dropout": {"dropout_p": 0.4, "dropout_seed": 7, "softcap": 2.0},
    }


@pytest.mark.parametrize("name", list(options_for_gradcheck("cpu")))
def test_gradients_of_output_and_lse(name, device):
    options = options_for_gradcheck(device)[name]
    q = torch.randn(BATCH, 3, NUM_HEADS, 4, dtype=torch.float64, device=device, requires_grad=True)
    k = torch.randn(BATCH, 4, NUM_KV_HEADS, 4, dtype=torch.float64, device=device, requires_grad=True)
    v = torch.randn(BATCH, 4, NUM_KV_HEADS, 3, dtype=torch.float64, device=device, requires_grad=True)
    names = [option for option in ("bias", "sinks") if option in options]
    extra = [options.pop(option).requires_grad_() for option in names]
    hides = torch.isinf(extra[0]) if name == "bias_minus_infinity" else None

    def run(q, k, v, *extra):
        extra = [value if hides is None else value.masked_fill(hides, -math.inf) for value in extra]
        output, lse = attention(q, k, v, return_lse=True, **options, **dict(zip(names, extra, strict=True)))
        return output, lse.masked_fill(torch.isinf(lse), 0.0)

    extra = [value.detach().masked_fill(torch.isinf(value), 0.0).requires_grad_() for value in extra]
    assert gradcheck(run, (q, k, v, *extra), fast_mode=True)


def test_row_that_sees_nothing_gives_zero_and_no_gradient(device):
    q, k, v = make_qkv(device, seqlen_q=6, seqlen_k=3)  # causal: the first three queries come before every key
    output, lse = attention(q, k, v, causal=True, return_lse=True)
    (output.sum() + lse[:, :, 3:].sum()).backward()
    assert torch.equal(output[:, :3], torch.zeros_like(output[:, :3]))
    assert torch.equal(lse[:, :, :3], torch.full_like(lse[:, :, :3], -math.inf))
    assert torch.equal(q.grad[:, :3], torch.zeros_like(q.grad[:, :3]))
    for tensor in (q, k, v):
        assert tensor.grad.isfinite().all()
    assert output[:, 3:].abs().min() > 0 and lse[:, :, 3:].isfinite().all()


def test_row_that_sees_only_the_sink_gives_zero_and_its_logit(device):
    q, k, v = make_qkv(device)
    sinks = torch.randn(NUM_HEADS, dtype=torch.float64, device=device)
    hidden = torch.zeros(SEQLEN_Q, SEQLEN_K, dtype=torch.bool, device=device)
    output, lse = attention(q, k, v, mask=hidden, sinks=sinks, return_lse=True)
    assert not output.any()
    assert torch.equal(lse, sinks[None, :, None].expand_as(lse))


def test_a_row_of_large_finite_bias_averages_uniformly(device):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        zeros = torch.zeros(1, 2, 1, 8, dtype=dtype, device=device)
        v = torch.tensor([1.0, 3.0], dtype=dtype, device=device).view(1, 2, 1, 1)
        bias = torch.full((2, 2), torch.finfo(torch.float32).min, device=device)
        assert_close(attention(zeros, zeros, v, bias=bias), torch.full_like(v, 2.0))


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("sinks", [False, True])
def test_empty_sequences(seqlen_q, seqlen_k, sinks, device):
    inputs = make_qkv(device, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    options = {"sinks": torch.zeros(NUM_HEADS, device=device)} if sinks else {}
    output, lse = attention(*inputs, causal=True, return_lse=True, **options)
    output.sum().backward()
    assert output.shape == (BATCH, seqlen_q, NUM_HEADS, VALUE_DIM) and not output.any()
    assert torch.equal(
        lse, torch.full((BATCH, NUM_HEADS, seqlen_q), 0.0 if sinks else -math.inf, device=device).double()
    )
    assert not inputs[0].grad.any()


def test_empty_batch(device):
    q, k, v = make_qkv(device)
    output, lse = attention(q[:0], k[:0], v[:0], return_lse=True)
    assert output.shape == (0, SEQLEN_Q, NUM_HEADS, VALUE_DIM)
    assert lse.shape == (0, NUM_HEADS, SEQLEN_Q)


def test_dropout_keeps_what_philox_says(device):
    q, k, v = make_qkv(device, num_kv_heads=NUM_HEADS)
    weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(HEAD_DIM), dim=-1)
    keep = torch.stack([dropout_keep(0.25, 42, b, NUM_HEADS, SEQLEN_Q, SEQLEN_K, device) for b in range(BATCH)])
    expected = torch.einsum("bhij,bjhd->bihd", weights * keep / 0.75, v)
    output, lse = attention(q, k, v, dropout_p=0.25, dropout_seed=42, return_lse=True)
    assert_close(output, expected)
    assert torch.equal(lse, attention(q, k, v, return_lse=True)[1])
    assert torch.equal(output, attention(q, k, v, dropout_p=0.25, dropout_seed=torch.tensor([42, 0], device=device)))
    assert not attention(q, k, v, dropout_p=1.0, dropout_seed=42).any()


def test_dropout_without_seed_follows_torch(device):
    inputs = make_qkv(device)
    torch.manual_seed(5)
    first, second = (attention(*inputs, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, attention(*inputs, dropout_p=0.5))
    assert not torch.equal(first, second)


def packed_example(device):
    lengths_q, lengths_k = [3, 0, 5, 1], [4, 2, 5, 0]
    cu_seqlens_q = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32, device=device)
    cu_seqlens_k = torch.tensor([0, 4, 6, 11, 11], dtype=torch.int32, device=device)
    q = torch.randn(9, NUM_HEADS, HEAD_DIM, dtype=torch.float64, device=device)
    k = torch.randn(11, NUM_KV_HEADS, HEAD_DIM, dtype=torch.float64, device=device)
    v = torch.randn(11, NUM_KV_HEADS, VALUE_DIM, dtype=torch.float64, device=device)
    options = {
        "mask": torch.rand(4, 1, 5, 5, device=device) > 0.2,
        "bias": torch.randn(1, NUM_HEADS, 5, 5, dtype=torch.float64, device=device),
        "key_padding_mask": torch.rand(4, 5, device=device) > 0.2,
        "alibi_slopes": torch.rand(4, NUM_HEADS, device=device),
        "block_mask": torch.rand(4, 1, 3, 3, device=device) > 0.3,
    }
    return q, k, v, cu_seqlens_q, cu_seqlens_k, lengths_q, lengths_k, options


def test_packed_equals_separate_sequences(device):
    q, k, v, cu_seqlens_q, cu_seqlens_k, lengths_q, lengths_k, options = packed_example(device)
    packed = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    output, lse = attention(q, k, v, causal=True, block_size=2, return_lse=True, **packed, **options)
    sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    for b, (q_alone, k_alone, v_alone) in enumerate(sequences):
        seqlen_q, seqlen_k = len(q_alone), len(k_alone)
        alone, lse_alone = attention(
            q_alone[None],
            k_alone[None],
            v_alone[None],
            causal=True,
            mask=options["mask"][b : b + 1, :, :seqlen_q, :seqlen_k],
            bias=options["bias"][:, :, :seqlen_q, :seqlen_k],
            key_padding_mask=options["key_padding_mask"][b : b + 1, :seqlen_k],
            alibi_slopes=options["alibi_slopes"][b],
            block_mask=options["block_mask"][b : b + 1, :, : -(-seqlen_q // 2), : -(-seqlen_k // 2)],
            block_size=2,
            return_lse=True,
        )
        rows = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
        assert torch.equal(output[rows], alone[0])
        assert torch.equal(lse[:, rows], lse_alone[0])


def test_packed_dropout_drops_what_the_padded_batch_drops(device):
    q, k, v = (tensor.detach() for tensor in make_qkv(device))
    cu_seqlens_q = torch.arange(BATCH + 1, dtype=torch.int32, device=device) * SEQLEN_Q
    cu_seqlens_k = torch.arange(BATCH + 1, dtype=torch.int32, device=device) * SEQLEN_K
    packed = attention(
        *(tensor.flatten(0, 1) for tensor in (q, k, v)),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        dropout_p=0.5,
        dropout_seed=1,
    )
    assert torch.equal(packed, attention(q, k, v, dropout_p=0.5, dropout_seed=1).flatten(0, 1))


def test_packed_rows_outside_every_sequence_give_nothing(device):
    q, k, v, cu_seqlens_q, cu_seqlens_k, *_ = packed_example(device)
    padded = torch.cat([q, torch.full_like(q[:2], math.nan)])
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "return_lse": True}
    output, lse = attention(padded, k, v, **lengths)
    expected, expected_lse = attention(q, k, v, **lengths)
    assert torch.equal(output[:9], expected) and torch.equal(lse[:, :9], expected_lse)
    assert not output[9:].any() and torch.equal(lse[:, 9:], torch.full_like(lse[:, 9:], -math.inf))


def test_low_precision_returns_its_dtype_and_float32_lse(device):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        output, lse = attention(*make_qkv(device, dtype=dtype), return_lse=True)
        assert output.dtype == dtype and lse.dtype == torch.float32


def test_floating_mask_is_refused(device):
    with pytest.raises(TypeError, match=r"pass an additive mask as bias .*one of ones and zeros .* as mask\.bool\(\)"):
        attention(*make_qkv(device), mask=torch.zeros(SEQLEN_Q, SEQLEN_K, device=device))
    q, k, v = make_qkv(device)
    padding = torch.zeros(k.shape[:2], device=device)
    with pytest.raises(
        TypeError, match=r"an additive one as bias=key_padding_mask\[:, None, None, :\] .* as key_padding_mask\.bool"
    ):
        attention(q, k, v, key_padding_mask=padding)


def test_half_given_cu_seqlens_are_refused(device):
    q, k, v, cu_seqlens_q, *_ = packed_example(device)
    with pytest.raises(ValueError, match="together"):
        attention(q, k, v, cu_seqlens_q=cu_seqlens_q)


@pytest.mark.parametrize("block_size", [2, (2, 3)], ids=str)
def test_a_block_mask_says_of_each_block_of_scores_whether_it_counts(block_size, device):
    """By the position in the tensors, whatever causality is aligned to; the last blocks are short."""
    rows, cols = (block_size, block_size) if isinstance(block_size, int) else block_size
    inputs = make_qkv(device)
    blocks = torch.rand(BATCH, NUM_HEADS, -(-SEQLEN_Q // rows), -(-SEQLEN_K // cols), device=device) < 0.5
    blocks[0, 1, 0] = False
    mask = torch.zeros(BATCH, NUM_HEADS, SEQLEN_Q, SEQLEN_K, dtype=torch.bool, device=device)
    for i in range(SEQLEN_Q):
        for j in range(SEQLEN_K):
            mask[:, :, i, j] = blocks[:, :, i // rows, j // cols]
    for options in ({}, {"causal": True, "key_padding_mask": torch.arange(SEQLEN_K, device=device).expand(2, -1) > 1}):
        by_blocks = attention(*inputs, block_mask=blocks, block_size=block_size, **options)
        assert_same_with_gradients(by_blocks, attention(*inputs, mask=mask, **options), inputs)
        assert by_blocks[0, :rows, 1].eq(0).all()
