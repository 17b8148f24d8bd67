"""The decode-attention kernels against the reference, and their promises of bits: batch, capacity and paging change nothing."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from pytransformer.kernels.decode_attention.launcher import DecodeLaunch
from pytransformer.kernels.decode_attention.policy import UNLIMITED, decode_configs, row_classes
from tests.conftest import INTERPRETING
from tests.kernels.decode_contract import EDGE_LENGTHS, Decode, call_of, check_contract, draw, run, small_configs

pytestmark = pytest.mark.usefixtures("poison_empty")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Each seed its own pair, so that eight seeds meet every edge.
EDGE_PAIRS = tuple(zip(EDGE_LENGTHS[::2], EDGE_LENGTHS[1::2]))


@pytest.mark.parametrize(("dtype", "page_size"), [(torch.float32, 0), (torch.float16, 3), (torch.bfloat16, 0)], ids=str)
def test_one_query(dtype, page_size, device):
    check_contract(Decode(dtype=dtype, page_size=page_size), device, EDGE_PAIRS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_queries_in_a_window(dtype, device):
    case = Decode(seqlen_q=3, dims=(24, 8), dtype=dtype, options={"window": (20, -1)})
    check_contract(case, device, EDGE_PAIRS)


@pytest.mark.parametrize("seqlen_q", [1, 2])
@pytest.mark.parametrize("options", [{"causal": False, "window": (7, 2)}, {"window": (20, -1)}], ids=str)
def test_kinds_of_window(options, seqlen_q, device):
    check_contract(Decode(seqlen_q=seqlen_q, options=options), device, EDGE_PAIRS)


def test_without_causality(device):
    check_contract(Decode(lengths=(40, 2), seqlen_q=3, capacity=40, options={"causal": False}), device)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (8, 2), (7, 1), (20, 1)], ids=str)
def test_query_groups(heads, device):
    check_contract(Decode(heads=heads, dims=(16, 24), lengths=(50,), capacity=50), device, least=1)


@pytest.mark.parametrize("dims", [(8, 8), (40, 80), (96, 64), (256, 192)], ids=str)
def test_head_dims(dims, device):
    check_contract(Decode(dims=dims, lengths=(50,), capacity=50), device, least=1)


@pytest.mark.parametrize(("seqlen_q", "dtype"), [(5, torch.float32), (35, torch.bfloat16), (35, torch.float32)])
def test_wide_row_classes(seqlen_q, dtype, device):
    # 20 rows are split in the second class, 140 rows are not split at all.
    case = Decode(seqlen_q=seqlen_q, heads=(4, 1), dtype=dtype, lengths=(50,), capacity=50)
    rows = seqlen_q * 4
    assert next(c for c in small_configs() if c.rows_above < rows <= c.rows_up_to) is not small_configs()[0]
    check_contract(case, device, least=1)


def test_shipped_configuration(device):
    """Tiles and splits as on a GPU: 700 keys are eleven splits."""
    case = Decode(lengths=(700, 256), capacity=700, heads=(4, 1), dims=(64, 64), dtype=torch.bfloat16)
    check_contract(case, device, configs=None)


def test_logits_far_apart(device):
    """Scores of hundreds, in which a later tile dwarfs the ones before it: a dropped rescale would be plain to see."""
    case = Decode(seqlen_q=2, lengths=(100, 64), options={"softmax_scale": 40.0})
    check_contract(case, device, softmax_scale=40.0)


def test_batch_does_not_change_a_result(device):
    """Each sequence alone, in another capacity, has the bits it has in the batch."""
    for case in (Decode(lengths=EDGE_LENGTHS), Decode(lengths=EDGE_LENGTHS[6:8], seqlen_q=6, heads=(4, 1))):
        inputs = draw(case, 1, device)
        out, lse = run(inputs, case)
        for sequence, length in enumerate(case.lengths):
            alone = {name: value[sequence : sequence + 1] for name, value in inputs.tensors.items()}
            for name in ("k_cache", "v_cache"):
                # Just room enough: with up to one split nothing is merged, with more there are fewer than in the batch.
                alone[name] = alone[name][:, : max(length, 1)]
            alone_out, alone_lse = run(replace_tensors(inputs, alone), case)
            assert torch.equal(alone_out[0], out[sequence]), length
            assert torch.equal(alone_lse[0], lse[sequence]), length


def replace_tensors(inputs, tensors):
    return type(inputs)(tensors, inputs.options, inputs.clean)


@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_pages_do_not_change_a_result(seqlen_q, device):
    case = Decode(lengths=(0, 1, 33, 140), seqlen_q=seqlen_q, dtype=torch.bfloat16)
    contiguous = run(draw(case, 2, device), case)
    for page_size in (1, 3, 16, 48):
        paged_case = replace(case, page_size=page_size)
        paged = run(draw(paged_case, 2, device), paged_case)
        assert torch.equal(paged[0], contiguous[0]), page_size
        assert torch.equal(paged[1], contiguous[1]), page_size


def test_table_width_does_not_change_a_result(device):
    case = Decode(lengths=(20, 90), page_size=16)
    inputs = draw(case, 3, device)
    out, lse = run(inputs, case)
    table = inputs.tensors["block_table"]
    wider = torch.full((2, table.shape[1] + 7), -1, dtype=torch.int32, device=device)
    wider[:, : table.shape[1]] = table
    again = run(replace_tensors(inputs, {**inputs.tensors, "block_table": wider}), case)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], lse)


@pytest.mark.parametrize("page_size", [3, 16])
def test_pages_before_the_window_are_not_read(page_size, device):
    case = Decode(lengths=(100, 50), seqlen_q=2, page_size=page_size, options={"window": (9, -1)})
    inputs = draw(case, 4, device)
    out, lse = run(inputs, case)
    table = inputs.tensors["block_table"].clone()
    for sequence, length in enumerate(case.lengths):
        freed = (length - case.seqlen_q - 9) // case.page_size
        assert freed > 0
        for name in ("k_cache", "v_cache"):
            inputs.tensors[name][table[sequence, :freed].long()] = float("nan")
        table[sequence, :freed] = -1
    again = run(replace_tensors(inputs, {**inputs.tensors, "block_table": table}), case)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], lse)


def test_cache_rows_do_not_change_a_result(device):
    case = Decode(lengths=(100, 33))
    inputs = draw(case, 5, device)
    out, lse = run(inputs, case)
    rows = torch.tensor([3, 1], dtype=torch.int32, device=device)
    moved = dict(inputs.tensors)
    for name in ("k_cache", "v_cache"):
        cache = torch.full((5, *moved[name].shape[1:]), float("nan"), device=device)
        cache[rows.long()] = moved[name]
        moved[name] = cache
    again = run(replace_tensors(inputs, moved), case, cache_batch_idx=rows)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], lse)


@pytest.mark.parametrize("num_splits", [1, 3, 1000])
def test_number_of_splits(num_splits, device):
    check_contract(Decode(lengths=(70,), capacity=90), device, least=1, num_splits=num_splits)


def test_more_splits_than_one_step_of_the_merge(device):
    """Scores grow along the keys, so the second step of the merge finds a new maximum."""
    configs = tuple(replace(config, max_splits=9) for config in small_configs())
    bias = torch.linspace(0.0, 9.0, 150).view(1, 1, 1, 150)
    case = Decode(lengths=(150,), heads=(1, 1), capacity=150, options={"bias": bias})
    check_contract(case, device, configs=configs)


def test_one_split_has_the_bits_of_merged_splits(device):
    """16 keys are one split, so that it does not matter whether there might have been more."""
    case = Decode(lengths=(16, 1), options={"sinks": torch.tensor([0.5, -1.0])})
    inputs = draw(case, 6, device)
    merged, direct = run(inputs, case), run(inputs, case, num_splits=1)
    assert torch.equal(merged[0], direct[0])
    assert torch.equal(merged[1], direct[1])


def test_packed_queries_have_the_bits_of_separate_ones(device):
    """Sequences of every row class in one call, and rows behind the last sequence; whether the longest is told or not."""
    queries = (1, 0, 5, 35)
    case = Decode(lengths=(100, 12, 33, 90), queries=queries, heads=(4, 1))
    inputs = draw(case, 7, device)
    stray = torch.cat([inputs.tensors["q"], torch.full((2, 4, 16), float("nan"), device=device)])
    packed = replace_tensors(inputs, {**inputs.tensors, "q": stray})
    out, lse = run(packed, case)
    hinted = run(packed, case, max_seqlen_q=max(queries))
    assert torch.equal(hinted[0], out)
    assert torch.equal(hinted[1], lse)
    start = 0
    for sequence, count in enumerate(queries):
        if count:
            tensors = {
                name: inputs.tensors[name][sequence : sequence + 1] for name in ("k_cache", "v_cache", "cache_seqlens")
            }
            tensors["q"] = stray[None, start : start + count]
            one = replace(case, queries=None, seqlen_q=count, lengths=case.lengths[sequence : sequence + 1])
            alone_out, alone_lse = run(type(inputs)(tensors, {}, {}), one)
            assert torch.equal(out[start : start + count], alone_out[0])
            assert torch.equal(lse[:, start : start + count], alone_lse[0])
        start += count
    assert torch.equal(out[start:], torch.zeros_like(out[start:]))
    assert bool((lse[:, start:] == -torch.inf).all())


def test_packed_queries(device):
    case = Decode(lengths=(40, 12), queries=(1, 9), options={"window": (15, -1)}, capacity=40)
    check_contract(case, device, max_seqlen_q=9)


OPTIONS = {
    "softcap": {"softcap": 1.5},
    "large-softcap": {"softcap": 50.0},
    "alibi": {"alibi_slopes": lambda generator: torch.rand(2, generator=generator)},
    "alibi-per-sequence": {"alibi_slopes": lambda generator: torch.rand(2, 2, generator=generator)},
    "sinks": {"sinks": lambda generator: torch.randn(2, generator=generator)},
    "mask": {"mask": lambda generator: torch.rand(2, 2, 2, 110, generator=generator) < 0.5},
    "mask-per-key": {"mask": lambda generator: (torch.rand(1, 1, 1, 110, generator=generator) < 0.2).to(torch.uint8)},
    "bias": {"bias": lambda generator: torch.randn(2, 2, 2, 110, generator=generator).to(torch.float16)},
    "bias-hides": {"bias": lambda generator: torch.where(torch.rand(1, 2, 1, 110, generator=generator) < 0.5, -torch.inf, 1.0)},
    "leftpad": {"cache_leftpad": torch.tensor([7, 40], dtype=torch.int32)},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, device):
    lengths = [(70, 33), (1, 65), (0, 32)]
    # What is done to single scores needs no merge to be seen.
    num_splits = 0 if name in ("sinks", "leftpad") else 1
    case = Decode(seqlen_q=2, capacity=110, options=OPTIONS[name])
    check_contract(case, device, lengths, least=len(lengths), num_splits=num_splits)


@pytest.mark.parametrize("page_size", [0, 16])
def test_all_options_at_once(page_size, device):
    options = {
        name: value
        for key in ("large-softcap", "alibi", "sinks", "mask", "bias", "leftpad")
        for name, value in OPTIONS[key].items()
    }
    options["window"] = (50, -1)
    case = Decode(
        lengths=(70, 33), seqlen_q=2, capacity=110, dtype=torch.bfloat16, page_size=page_size, options=options
    )
    check_contract(case, device)


@pytest.mark.parametrize(
    ("dtype", "page_size", "scale_per_token"), [(torch.float32, 0, False), (torch.bfloat16, 5, True)]
)
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_caches(cache_dtype, dtype, page_size, scale_per_token, device):
    case = Decode(dtype=dtype, cache_dtype=cache_dtype, scale_per_token=scale_per_token, page_size=page_size)
    check_contract(case, device, ((0, 100), (1, 33)), num_splits=1)


ALIKE = {
    **{name: Decode(seqlen_q=2, options=options) for name, options in OPTIONS.items()},
    "plain": Decode(),
    "paged": Decode(page_size=16),
    "packed": Decode(queries=(1, 9), heads=(4, 1)),
    "int8": Decode(cache_dtype=torch.int8),
    "float8": Decode(cache_dtype=torch.float8_e4m3fn, scale_per_token=True),
    "narrow-mask-behind-padding": Decode(options={**OPTIONS["leftpad"], **OPTIONS["mask-per-key"]}),
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_launch_serves_all_calls_alike(name, device):
    """Nothing of the values that it was prepared with is kept: lengths, places, scales and terms of the scores are the call's."""
    case = replace(ALIKE[name], lengths=(50, 9))
    first, other = draw(case, 11, device), draw(replace(case, lengths=(17, 33)), 12, device)
    configs = small_configs(*case.dims)
    launch = DecodeLaunch(call_of(**first.tensors, **first.options), configs=configs)
    for inputs in (other, first):
        out, lse = launch(call_of(**inputs.tensors, **inputs.options))
        expected = run(inputs, case)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


def test_strides(device):
    """Caches laid out (batch, heads, capacity, dim) and q cut from a wider projection, at an odd offset."""
    case = Decode(seqlen_q=2)
    inputs = draw(case, 8, device)
    out, lse = run(inputs, case)
    strided = dict(inputs.tensors)
    for name in ("k_cache", "v_cache"):
        strided[name] = strided[name].transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((2, 2, 2, 37), float("nan"), device=device)
    wide[..., 5:21] = strided["q"]
    strided["q"] = wide[..., 5:21]
    again = run(replace_tensors(inputs, strided), case)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], lse)


@pytest.mark.parametrize(("batch", "seqlen_q", "capacity"), [(0, 1, 4), (2, 0, 4), (2, 1, 0)])
def test_nothing_to_do(batch, seqlen_q, capacity, device):
    q = torch.randn(batch, seqlen_q, 4, 16, device=device)
    cache = torch.randn(batch, capacity, 2, 16, device=device)
    lengths = torch.zeros(batch, dtype=torch.int32, device=device)
    inputs = {"q": q, "k_cache": cache, "v_cache": cache, "cache_seqlens": lengths}
    out, lse = run(type("Call", (), {"tensors": inputs, "options": {}}), Decode())
    assert torch.equal(out, torch.zeros_like(q))
    assert lse.shape == (batch, 4, seqlen_q)
    assert bool((lse == -torch.inf).all())


@pytest.mark.skipif(not INTERPRETING, reason="a GPU chooses its own order of programs")
def test_order_of_programs_does_not_matter(device):
    from pytransformer.triton_interpreter import program_order

    for case in (Decode(lengths=(100, 33)), Decode(lengths=(70, 30), queries=(1, 5), heads=(4, 1))):
        inputs = draw(case, 9, device)
        natural = run(inputs, case)
        with program_order(0):
            shuffled = run(inputs, case)
        assert torch.equal(natural[0], shuffled[0])
        assert torch.equal(natural[1], shuffled[1])


def test_same_bits_again(device):
    case = Decode(lengths=(100, 33), seqlen_q=2, dtype=torch.bfloat16)
    inputs = draw(case, 10, device)
    first = run(inputs, case)
    for _ in range(2 if device.type == "cpu" else 200):
        again = run(inputs, case)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


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
    scale = torch.full((1,), 0.1, device=device)
    q = torch.randn(2, 1, 2, 16, device=device)
    lengths = torch.tensor([3, 4], dtype=torch.int32, device=device)
    tensors = {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "cache_seqlens": lengths,
        "k_scale": scale,
        "v_scale": scale,
    }
    far = run(type("Call", (), {"tensors": tensors, "options": {}}), Decode())
    near = {**tensors, "k_cache": k_cache.contiguous(), "v_cache": v_cache.contiguous()}
    expected = run(type("Call", (), {"tensors": near, "options": {}}), Decode())
    assert torch.equal(far[0], expected[0])


@contextlib.contextmanager
def _uninitialised_as_it_is():
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize("arch_dims", [(64, 2), (128, 2), (256, 2), (64, 4), (128, 4), (256, 4), (128, 1)], ids=str)
def test_row_classes_leave_no_gap(arch_dims, device):
    dim, itemsize = arch_dims
    configs = decode_configs(dim, dim, itemsize, device)
    assert [config.rows_above for config in configs] == [0, *(config.rows_up_to for config in configs[:-1])]
    assert configs[-1].rows_up_to == UNLIMITED
    assert configs[-1].max_splits == 1


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8, 32])
def test_one_sequence_of_1k_fills_a_gpu(num_kv_heads, device):
    config = decode_configs(128, 128, 2, device, num_kv_heads=num_kv_heads)[0]
    (config,) = row_classes((config,), 1, False, 4096, 0)
    splits = min(config.max_splits, 1024 // config.block_n)
    assert num_kv_heads * splits >= min(128, num_kv_heads * 1024 // config.block_n)
