"""Decode attention in CUDA C++ against the reference, and its promises of bits: batch, capacity, paging and schedule change nothing."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace

import pytest
import torch

from pytransformer import use_backend
from pytransformer.ops.decode_attention import CHOICE, decode_attention
from pytransformer.verification import SEEDS, Contract
from tests.cuda.decode_op import raw_op
from tests.kernels.decode_contract import EDGE_LENGTHS, Decode, Inputs, draw, golden
from tests.support.emulator import SCHEDULES, blocks_of_last_launch, configure, in_every_schedule

pytestmark = pytest.mark.usefixtures("poison_empty")

F16, BF16 = torch.float16, torch.bfloat16
EMULATED = "PYTRANSFORMER_CUDA_LIBRARY" in os.environ
# Each seed its own pair, so that eight seeds meet every edge.
EDGE_PAIRS = tuple(zip(EDGE_LENGTHS[::2], EDGE_LENGTHS[1::2]))


def call(inputs: Inputs, **changes):
    """(out, lse) of the public function on the poisoned inputs."""
    options = {**inputs.tensors, **inputs.options, **changes}
    return decode_attention(**options, backend="cuda", return_lse=True)


def check_contract(case: Decode, device, lengths=(), seeds: int = SEEDS, **changes) -> None:
    """Pools the errors over the seeds: the first seed runs in every schedule, the others take turns."""
    contract = Contract(case.dtype)
    for seed in range(seeds):
        drawn = replace(case, lengths=lengths[seed % len(lengths)]) if lengths else case
        inputs = draw(drawn, seed, device)
        if seed == 0:
            actual = in_every_schedule(lambda inputs=inputs: call(inputs, **changes))
        else:
            if EMULATED:
                configure(seed % len(SCHEDULES))
            actual = call(inputs, **changes)
        exact, plain = golden(inputs, drawn, torch.float64), golden(inputs, drawn, drawn.dtype)
        for place, name in enumerate(("out", "lse")):
            contract.add(name, actual=actual[place], plain=plain[place], golden=exact[place])
    contract.check()


def assert_same_bits(actual, expected) -> None:
    for left, right in zip(actual, expected, strict=True):
        assert torch.equal(left, right)


# --- The contract -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "page_size"), [(F16, 0), (BF16, 0), (F16, 3), (BF16, 16), (BF16, 1)], ids=str)
def test_one_query(dtype, page_size, device):
    check_contract(Decode(dtype=dtype, page_size=page_size), device, EDGE_PAIRS)


@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("options", [{"causal": False, "window": (7, 2)}, {"window": (20, -1)}], ids=str)
def test_kinds_of_window(options, seqlen_q, device):
    check_contract(Decode(seqlen_q=seqlen_q, dims=(24, 8), dtype=BF16, options=options), device, EDGE_PAIRS)


def test_without_causality(device):
    check_contract(Decode(lengths=(40, 2), seqlen_q=3, capacity=40, dtype=F16, options={"causal": False}), device)


@pytest.mark.parametrize("heads", [(3, 3), (8, 2), (7, 1), (16, 1), (17, 1), (40, 2)], ids=str)
def test_query_groups(heads, device):
    check_contract(Decode(heads=heads, dims=(16, 24), lengths=(50,), capacity=50, dtype=BF16), device)


@pytest.mark.parametrize("dims", [(8, 8), (40, 80), (96, 64), (128, 128), (256, 192), (64, 256)], ids=str)
def test_head_dims(dims, device):
    check_contract(Decode(dims=dims, lengths=(100,), capacity=110, dtype=F16), device)


@pytest.mark.parametrize(
    ("seqlen_q", "dims"), [(5, (16, 16)), (19, (16, 16)), (35, (16, 16)), (35, (136, 200))], ids=str
)
def test_many_rows(seqlen_q, dims, device):
    """20 and 76 rows are of the second class (one tile of 64, and two), 140 of the third, whose causal tiles end at different keys."""
    case = Decode(seqlen_q=seqlen_q, heads=(4, 1), dims=dims, dtype=BF16, lengths=(150,), capacity=150)
    check_contract(case, device)


def test_splits_of_the_policy(device):
    """700 keys are eleven splits."""
    check_contract(
        Decode(lengths=(700, 256), capacity=700, heads=(4, 1), dims=(64, 64), dtype=BF16), device, seeds=SEEDS
    )


def test_splits_of_many_rows(device):
    """1100 keys are sixteen splits of the second class."""
    check_contract(Decode(lengths=(1100,), capacity=1100, heads=(20, 1), dtype=F16), device)


def test_logits_far_apart(device):
    """Scores of hundreds, in which a later chunk dwarfs the ones before it: a dropped rescale would be plain to see."""
    case = Decode(seqlen_q=2, lengths=(100, 64), dtype=BF16, options={"softmax_scale": 40.0})
    check_contract(case, device)


@pytest.mark.parametrize("num_splits", [1, 2, 1000])
def test_number_of_splits(num_splits, device):
    check_contract(Decode(lengths=(130, 65), capacity=140, dtype=F16), device, num_splits=num_splits)


def test_more_splits_than_a_warp_has_lanes(device):
    """Scores grow along the keys, so later splits find a new maximum."""
    keys = 34 * 64
    bias = torch.linspace(0.0, 9.0, keys).view(1, 1, 1, keys)
    case = Decode(lengths=(keys,), heads=(1, 1), capacity=keys, dtype=F16, dims=(8, 8), options={"bias": bias})
    check_contract(case, device, num_splits=34, seeds=2)


def _draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=generator)


OPTIONS = {
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": torch.tensor([0.3, -4.0, 2.0, 9.0])},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.0, 1.0])},
    "alibi of each sequence": {"alibi_slopes": lambda g: _draw(g, 2, 4).bfloat16()},
    "mask": {"mask": lambda g: _draw(g, 2, 4, 3, 140) < 0.2},
    "mask of keys": {"mask": lambda g: (_draw(g, 2, 1, 1, 140) < 0.7).int()},
    "bias": {"bias": lambda g: torch.randn(2, 1, 3, 140, generator=g)},
    "hiding bias": {"bias": lambda g: torch.randn(4, 1, 140, generator=g).half().masked_fill_(_draw(g, 4, 1, 140) < 0.5, -torch.inf)},
    "bias of a number": {"bias": torch.full((1, 1, 1, 1), torch.finfo(BF16).min)},
    "leftpad": {"cache_leftpad": torch.tensor([7, 40], dtype=torch.int32)},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, device):
    check_contract(Decode(seqlen_q=3, heads=(4, 2), dtype=BF16, options=OPTIONS[name], lengths=(100, 33)), device)


@pytest.mark.parametrize("page_size", [0, 7])
def test_every_option_at_once(page_size, device):
    options = {"window": (50, -1), "num_splits": 2}
    for name in ("softcap", "sinks", "alibi", "mask", "bias", "leftpad"):
        options |= OPTIONS[name]
    case = Decode(seqlen_q=3, heads=(4, 2), lengths=(100, 33), dtype=F16, page_size=page_size, options=options)
    check_contract(case, device)


@pytest.mark.parametrize("scale_per_token", [False, True])
@pytest.mark.parametrize(("dtype", "page_size", "dims"), [(F16, 0, (16, 48)), (BF16, 5, (24, 136))], ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_caches(cache_dtype, dtype, page_size, dims, scale_per_token, device):
    case = Decode(dtype=dtype, dims=dims, cache_dtype=cache_dtype, scale_per_token=scale_per_token, page_size=page_size)
    check_contract(case, device, EDGE_PAIRS)


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_caches_of_many_rows(cache_dtype, device):
    """Warps read tiles that other warps have widened."""
    case = Decode(
        seqlen_q=7,
        heads=(4, 1),
        dtype=BF16,
        cache_dtype=cache_dtype,
        scale_per_token=True,
        lengths=(200,),
        capacity=210,
    )
    check_contract(case, device)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_every_code(cache_dtype, dtype, device):
    """The hand-made conversions are exact for all 256 codes; NaN stays NaN."""
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(cache_dtype)
    k_cache = torch.zeros(1, 1, 1, 16, dtype=torch.uint8, device=device).view(cache_dtype)
    one, lengths = torch.ones(1, device=device), torch.ones(1, dtype=torch.int32, device=device)
    q = torch.zeros(1, 1, 1, 16, dtype=dtype, device=device)
    out = decode_attention(q, k_cache, codes.view(1, 1, 1, 256), lengths, k_scale=one, v_scale=one, backend="cuda")
    assert torch.equal(out.flatten().float().nan_to_num(nan=1e9), codes.float().nan_to_num(nan=1e9))


@pytest.mark.parametrize("hint", [None, 35])
def test_packed_queries_have_the_bits_of_separate_ones(hint, device):
    """Sequences of every row class in one call, and rows behind the last sequence."""
    queries = (1, 0, 5, 35)
    case = Decode(lengths=(100, 12, 33, 90), queries=queries, heads=(4, 1), dtype=BF16)
    inputs = draw(case, 7, device)
    out, lse = in_every_schedule(lambda: call(inputs, max_seqlen_q=hint))
    start = 0
    for sequence, count in enumerate(queries):
        if count:
            tensors = {
                name: inputs.tensors[name][sequence : sequence + 1] for name in ("k_cache", "v_cache", "cache_seqlens")
            }
            tensors["q"] = inputs.tensors["q"][None, start : start + count]
            alone_out, alone_lse = call(Inputs(tensors, {}, {}))
            assert torch.equal(alone_out[0], out[start : start + count])
            assert torch.equal(alone_lse[0], lse[:, start : start + count])
        start += count


def test_packed_contract(device):
    options = {"window": (60, -1), "bias": lambda g: torch.randn(3, 4, 6, 140, generator=g)}
    check_contract(
        Decode(lengths=(100, 5, 33), queries=(2, 6, 1), heads=(4, 2), dtype=F16, page_size=8, options=options), device
    )


# --- Promises of bits ---------------------------------------------------------------------------------------------------------------------


def test_batch_and_capacity_do_not_change_a_result(device):
    """Each sequence alone, in another capacity, has the bits it has in the batch; so it has in one split and in two."""
    lengths = (0, 1, 64, 65, 255, 256, 257, 300)
    for case in (
        Decode(lengths=lengths, capacity=310, dtype=F16),
        Decode(lengths=(70, 300), capacity=310, heads=(4, 1), seqlen_q=6, dtype=BF16),
    ):
        inputs = draw(case, 1, device)
        out, lse = call(inputs)
        for sequence, length in enumerate(case.lengths):
            alone = {name: value[sequence : sequence + 1] for name, value in inputs.tensors.items()}
            for name in ("k_cache", "v_cache"):
                alone[name] = alone[name][:, : max(length, 1)]
            alone_out, alone_lse = call(replace(inputs, tensors=alone))
            assert torch.equal(alone_out[0], out[sequence]), length
            assert torch.equal(alone_lse[0], lse[sequence]), length


@pytest.mark.parametrize("seqlen_q", [1, 9])
def test_number_of_blocks_does_not_change_a_result(seqlen_q, device):
    """Blocks that compute many tasks, that share one with several others, and that have nothing to do."""
    inputs = draw(
        Decode(lengths=(500, 0, 130, 64), capacity=500, seqlen_q=seqlen_q, heads=(4, 2), dtype=BF16), 1, device
    )
    expected = in_every_schedule(lambda: call(inputs), num_sms=1)
    for num_sms in (2, 5, 132):
        assert_same_bits(in_every_schedule(lambda: call(inputs), num_sms=num_sms), expected)


@pytest.mark.skipif(not EMULATED, reason="asks the emulator")
@pytest.mark.parametrize("batch", [64, 256])
def test_a_long_table_costs_nothing(batch, device):
    """With a table for 128k tokens, what runs and what is allocated follow from the GPU: grids are the same for all lengths."""
    cache = torch.empty(8, 16, 8, 128, dtype=BF16)
    q, lengths = torch.empty(batch, 1, 32, 128, dtype=BF16), torch.zeros(batch, dtype=torch.int32)
    table = torch.zeros(1, dtype=torch.int32).expand(batch, 2**17 // 16).contiguous()
    configure(0, num_sms=132)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out, lse = raw_op(q, cache, cache, lengths, block_table=table)
    events = profile.profiler.kineto_results.events()
    allocated = sum(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)
    assert blocks_of_last_launch() <= 3 * 132
    assert 0 < allocated - out.nbytes - lse.nbytes <= 17e6


@pytest.mark.parametrize("num_splits", [0, 3])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_pages_do_not_change_a_result(page_size, num_splits, device):
    case = Decode(lengths=(0, 1, 33, 140), capacity=144, seqlen_q=5, dtype=BF16)
    paged_case = replace(case, page_size=page_size)
    contiguous, paged = (call(draw(c, 2, device), num_splits=num_splits) for c in (case, paged_case))
    assert_same_bits(paged, contiguous)


def test_table_width_does_not_change_a_result(device):
    inputs = draw(Decode(lengths=(20, 90), page_size=16, dtype=F16), 3, device)
    table = inputs.tensors["block_table"]
    wider = torch.full((2, table.shape[1] + 30), -1, dtype=torch.int32, device=device)[:, 5:]
    wider[:, : table.shape[1]] = table
    assert_same_bits(call(replace(inputs, tensors={**inputs.tensors, "block_table": wider})), call(inputs))


@pytest.mark.parametrize("page_size", [3, 16])
def test_pages_before_the_window_are_not_read(page_size, device):
    case = Decode(lengths=(100, 50), seqlen_q=2, page_size=page_size, dtype=BF16, options={"window": (9, -1)})
    inputs = draw(case, 4, device)
    expected = call(inputs)
    table = inputs.tensors["block_table"].clone()
    for sequence, length in enumerate(case.lengths):
        freed = (length - case.seqlen_q - 9) // case.page_size
        assert freed > 0
        for name in ("k_cache", "v_cache"):
            inputs.tensors[name][table[sequence, :freed].long()] = float("nan")
        table[sequence, :freed] = -1
    assert_same_bits(call(replace(inputs, tensors={**inputs.tensors, "block_table": table})), expected)


def test_cache_rows_do_not_change_a_result(device):
    inputs = draw(Decode(lengths=(100, 33), dtype=F16), 5, device)
    rows = torch.tensor([3, 1], dtype=torch.int32, device=device)
    moved = dict(inputs.tensors)
    for name in ("k_cache", "v_cache"):
        cache = torch.full((5, *moved[name].shape[1:]), float("nan"), device=device, dtype=F16)
        cache[rows.long()] = moved[name]
        moved[name] = cache
    assert_same_bits(call(replace(inputs, tensors=moved), cache_batch_idx=rows), call(inputs))


@pytest.mark.parametrize("cache_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("offset", [1, 3, 4, 8])
def test_strides_and_alignment_do_not_change_a_result(offset, cache_dtype, device):
    """Every tensor cut from a wider one at an offset; caches laid out (batch, heads, capacity, dim)."""
    inputs = draw(
        Decode(seqlen_q=2, heads=(4, 2), dims=(24, 40), cache_dtype=cache_dtype, scale_per_token=True, dtype=BF16),
        8,
        device,
    )
    expected = call(inputs)
    strided = dict(inputs.tensors)
    for name in ("q", "k_cache", "v_cache"):
        value = strided[name].transpose(1, 2)
        wide = value.new_zeros((*value.shape[:-1], value.shape[-1] + 16))
        wide[..., offset : offset + value.shape[-1]] = value
        strided[name] = wide[..., offset : offset + value.shape[-1]].transpose(1, 2)
    assert_same_bits(in_every_schedule(lambda: call(replace(inputs, tensors=strided))), expected)


def test_lengths_past_the_capacity_are_cut(device):
    """What Python cannot see on a GPU without reading back: the op keeps to the cache all the same."""
    inputs = draw(Decode(lengths=(20, 20), capacity=20, dtype=BF16), 9, device)
    tensors = [inputs.tensors[name] for name in ("q", "k_cache", "v_cache")]
    for leftpad, length in ((None, 1000), (5, 25)):
        lengths = torch.tensor([length, -3], dtype=torch.int32, device=device)
        pads = None if leftpad is None else torch.full((2,), leftpad, dtype=torch.int32, device=device)
        out, lse = raw_op(*tensors, lengths, cache_leftpad=pads)
        assert bool(out[0].isfinite().all()) and torch.equal(out[1], torch.zeros_like(out[1]))
        assert bool((lse[1] == -torch.inf).all())


@pytest.mark.parametrize(("batch", "seqlen_q", "capacity"), [(0, 1, 4), (2, 0, 4), (2, 1, 0)])
def test_nothing_to_do(batch, seqlen_q, capacity, device):
    q = torch.randn(batch, seqlen_q, 4, 16, device=device).half()
    cache = torch.randn(batch, capacity, 2, 16, device=device).half()
    lengths = torch.zeros(batch, dtype=torch.int32, device=device)
    out, lse = decode_attention(q, cache, cache, lengths, backend="cuda", return_lse=True)
    assert torch.equal(out, torch.zeros_like(q))
    assert lse.shape == (batch, 4, seqlen_q)
    assert bool((lse == -torch.inf).all())


def test_offsets_past_32_bits(device):
    """A cache whose second row begins beyond 2^31 elements; only the pages that are touched take memory."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GB of GPU memory")
    stride = 2**31 + 64
    with _uninitialised_as_it_is():
        storage = torch.empty(stride + 256, dtype=torch.int8, device=device)
    k_cache, v_cache = (storage.as_strided((2, 4, 1, 16), (stride, 32, 16, 1), offset) for offset in (0, 16))
    k_cache.copy_(torch.randint(-9, 9, k_cache.shape))
    v_cache.copy_(torch.randint(-9, 9, v_cache.shape))
    q, scale = torch.randn(2, 1, 2, 16, device=device).half(), torch.full((1,), 0.1, device=device)
    lengths = torch.tensor([3, 4], dtype=torch.int32, device=device)
    options = {"k_scale": scale, "v_scale": scale, "backend": "cuda"}
    far = decode_attention(q, k_cache, v_cache, lengths, **options)
    assert torch.equal(far, decode_attention(q, k_cache.contiguous(), v_cache.contiguous(), lengths, **options))


@contextlib.contextmanager
def _uninitialised_as_it_is():
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before


def test_backend(device):
    """Served on request, never by itself; other dtypes are refused with a reason."""
    inputs = draw(Decode(dtype=BF16), 0, device)
    with use_backend("cuda"):
        assert torch.equal(decode_attention(**inputs.tensors), call(inputs)[0])
    served = "serves, except float32 and float64, head_dim above 256 or no multiple of 8"
    assert CHOICE.report(device.type)["cuda"] == served
    with pytest.raises(
        NotImplementedError,
        match="'cuda' cannot serve this call: the kernels are for float16 and bfloat16 queries, got float32",
    ):
        call(draw(Decode(), 0, device))


def test_autocast_follows_the_cache(device):
    inputs = draw(Decode(dtype=BF16), 0, device)
    wide = replace(inputs, tensors={**inputs.tensors, "q": inputs.tensors["q"].float()})
    with torch.autocast(device.type, dtype=BF16):
        assert_same_bits(call(wide), call(inputs))


def test_compile(device):
    """One graph for changing batch, query and cache sizes; the same bits as eager."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(q, k_cache, v_cache, cache_seqlens):
        return decode_attention(q * 2, k_cache, v_cache, cache_seqlens, window=(9, -1), backend="cuda")

    for batch, seqlen_q, capacity in ((3, 5, 20), (5, 3, 31)):
        q, cache = (
            torch.randn(batch, seqlen_q, 4, 16, device=device).half(),
            torch.randn(batch, capacity, 2, 16, device=device).half(),
        )
        lengths = torch.arange(batch, dtype=torch.int32, device=device) + 10
        expected = decode_attention(q * 2, cache, cache, lengths, window=(9, -1), backend="cuda")
        assert torch.equal(compiled(q, cache, cache, lengths), expected)
    torch._dynamo.reset()
