"""The KV-append kernel: exact copies to the right cells and no others, and the fused steps against the separate ones."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.kernels.kv_append import AppendConfig, AppendLaunch, append_config, kv_append_forward
from pytransformer.verification import SEEDS, Contract
from tests.conftest import INTERPRETING
from tests.kernels.append_contract import (
    PLACES,
    SENTINEL,
    Append,
    assert_same,
    call_of,
    copies,
    draw,
    results_of,
    run_reference,
)
from tests.support.draws import pool

pytestmark = pytest.mark.usefixtures("poison_empty")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILE = AppendConfig(4, 2, 4)


def run(arguments: dict[str, Any], config: AppendConfig | None = TILE) -> dict[str, Tensor]:
    """Results of the launcher on copies: the caches, per-token scales and the new q."""
    arguments = {**arguments, **copies(arguments)}
    new_q = kv_append_forward(call_of(**arguments), config=config)
    return results_of(arguments, new_q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_copies_are_exact_and_nothing_else_is_written(place, dtype, device):
    arguments = draw(replace(PLACES[place], dtype=dtype), 0, device)
    results = run(arguments)
    assert_same(results, run_reference(arguments))
    written = sum(int((results[name] != SENTINEL).any(-1).any(-1).sum()) for name in ("k_cache", "v_cache"))
    tokens = arguments["k"].shape[:-2].numel()
    skipped = int((arguments["slot_mapping"] < 0).sum()) if "slot_mapping" in arguments else 0
    assert written == 2 * (tokens - skipped)


def test_any_bits_are_copied(device):
    """NaN with its payload, infinities, subnormals and -0 arrive as they are."""
    arguments = draw(
        Append(dtype=torch.bfloat16, lengths=(2,), seqlen=8, heads=(1, 256), dims=(32, 32), capacity=10), 0, device
    )
    bits = torch.arange(2**16, dtype=torch.int32, device=device).to(torch.int16).view(1, 8, 256, 32)
    results = run(
        {**arguments, "k": bits.view(torch.bfloat16), "v": bits.view(torch.bfloat16)}, AppendConfig(8, 256, 4)
    )
    for name in ("k_cache", "v_cache"):
        assert torch.equal(results[name][:, 2:].contiguous().view(torch.int16), bits)


OUTSIDE = {
    "behind-the-cache": Append(lengths=(11, 12, 3)),
    "negative-length": Append(lengths=(-2, -9, 3)),
    "behind-the-table": Append(lengths=(10, 13, 3), page_size=4),
    "slots": Append(page_size=4, slots=(3, 0, 40, 10**12, -(10**12), 39, 41, 7, 8)),
    "rows": Append(options={"cache_batch_idx": torch.tensor([2, 3, -1], dtype=torch.int32)}),
}


@pytest.mark.parametrize("place", OUTSIDE)
def test_writes_outside_are_dropped(place, device):
    """The interpreter raises on any access outside of a tensor, so nothing else was touched either."""
    case = replace(OUTSIDE[place], with_q=True)
    arguments = draw(case, 1, device)
    assert_same(run(arguments), run_reference(arguments))
    # Positions beyond the table of 30 rows take its last row.
    rotated = run(draw(replace(case, rotary_dim=16), 1, device))
    assert bool(rotated["new_q"].isfinite().all())


def test_pages_that_do_not_exist_are_dropped(device):
    arguments = draw(Append(page_size=4), 1, device)
    arguments["block_table"][:, 1] = torch.tensor([-1, 999, -(2**31)], device=device)
    assert_same(run(arguments), run_reference(arguments))


def test_tokens_of_no_sequence_are_dropped(device):
    """Rows behind the last packed sequence are not written; their q is rotated as at position 0."""
    arguments = draw(Append(counts=(2, 1, 3), with_q=True), 2, device)
    arguments["cu_seqlens"] = torch.tensor([0, 2, 3, 4], dtype=torch.int32, device=device)
    assert_same(run(arguments), run_reference(arguments))
    arguments["cos"], arguments["sin"] = (table.to(device) for table in reference.rope_tables(16, 30))
    assert torch.equal(run(arguments)["new_q"][4:], arguments["q"][4:])  # cos 1, sin 0


def check_contract(case: Append, device: torch.device, config: AppendConfig | None = TILE, least: int = SEEDS) -> None:
    """``least``: draws that are pooled in any case; fewer than the contract's where what is asked is which cells are read."""
    contract = Contract(case.dtype)

    def add(seed: int) -> None:
        arguments = draw(case, seed, device)
        actual = run(arguments, config)
        contract.add_all(actual, run_reference(arguments), run_reference(arguments, torch.float64))
        untouched = run_reference(arguments)["k_cache"] == SENTINEL
        assert bool((actual["k_cache"][untouched] == SENTINEL).all())

    pool(contract, add, least).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_rope_and_norm(norm, interleaved, dtype, device):
    case = Append(seqlen=2, dtype=dtype, rotary_dim=16, interleaved=interleaved, norm=norm, with_q=True)
    check_contract(case, device)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(("rotary_dim", "head_dim"), [(4, 16), (24, 40), (80, 80)])
def test_partial_rotation(rotary_dim, head_dim, interleaved, device):
    case = Append(seqlen=2, dims=(head_dim, 8), rotary_dim=rotary_dim, interleaved=interleaved, with_q=True)
    check_contract(case, device, least=1)
    arguments = draw(case, 0, device)
    assert torch.equal(run(arguments)["new_q"][..., rotary_dim:], arguments["q"][..., rotary_dim:])


def test_norm_alone(device):
    check_contract(Append(seqlen=2, norm=True, with_q=True, dims=(40, 8)), device)


@pytest.mark.parametrize("norms", ["q", "k", "two dtypes"])
def test_norm_of_one_and_weights_of_two_dtypes(norms, device):
    contract = Contract(torch.bfloat16)
    for seed in range(2):
        arguments = draw(Append(seqlen=2, dtype=torch.bfloat16, rotary_dim=8, norm=True, with_q=True), seed, device)
        weight = arguments["k_norm_weight"]
        arguments["k_norm_weight"] = None if norms == "q" else weight.float() if norms == "two dtypes" else weight
        if norms == "k":
            arguments["q_norm_weight"] = None
        contract.add_all(run(arguments), run_reference(arguments), run_reference(arguments, torch.float64))
    contract.check()


@pytest.mark.parametrize("place", ["packed", "packed-pages", "slots"])
def test_rope_positions(place, device):
    """Each way of saying where tokens go says their positions; explicit ones win."""
    case = replace(PLACES[place], rotary_dim=8, with_q=True, norm=True)
    check_contract(case, device, least=1)
    if case.slots is None:
        explicit = torch.randint(0, 30, (sum(case.counts),), dtype=torch.int32)
        check_contract(replace(case, options={"positions": explicit}), device, least=1)


@pytest.mark.parametrize("scale_per_token", [False, True], ids=["per-head", "per-token"])
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_codes_are_exact(cache_dtype, scale_per_token, device):
    for dtype, place in ((torch.float32, "contiguous"), (torch.bfloat16, "slots"), (torch.float16, "packed-pages")):
        case = replace(PLACES[place], dtype=dtype, cache_dtype=cache_dtype, scale_per_token=scale_per_token)
        arguments = draw(case, 5, device)
        arguments["k"][..., 0, :] = 0.0
        arguments["v"] *= 3.0
        assert_same(run(arguments), run_reference(arguments))


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_rounding_of_codes(cache_dtype, device):
    """Ties, saturation, subnormal codes and both signs; every code and every midpoint of two codes."""
    if cache_dtype == torch.int8:
        codes = torch.arange(-140, 141, dtype=torch.float32)
    else:
        codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        codes = torch.cat([-codes.flip(0), codes, torch.tensor([464.0, 480.0, 1e6, torch.inf])])
    values = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, torch.nextafter(codes, torch.tensor(torch.inf))])
    values = torch.nn.functional.pad(values, (0, -len(values) % 256)).view(1, -1, 1, 256).to(device)
    cache = torch.zeros(values.shape, device=device).to(cache_dtype)
    one = torch.ones(1, device=device)
    lengths = torch.zeros(1, dtype=torch.int32, device=device)
    arguments = {
        "k": values,
        "v": -values,
        "k_cache": cache,
        "v_cache": cache,
        "cache_seqlens": lengths,
        "k_scale": one,
        "v_scale": one,
    }
    assert_same(run(arguments), run_reference(arguments))


def test_nan_becomes_nan_in_float8(device):
    case = Append(cache_dtype=torch.float8_e4m3fn)
    arguments = draw(case, 6, device)
    arguments["k"][0, 0, 0, 3] = torch.nan
    codes = run(arguments)["k_cache"]
    assert bool(codes[0, 0, 0, 3].float().isnan())
    assert int(codes.float().isnan().sum()) == 1


ALIKE = {
    **PLACES,
    "fused": Append(with_q=True, rotary_dim=16, norm=True),
    "int8": Append(with_q=True, cache_dtype=torch.int8),
    "float8-per-token": Append(cache_dtype=torch.float8_e4m3fn, scale_per_token=True),
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_launch_serves_all_calls_alike(name, device):
    """Nothing of the values that it was prepared with is kept: tokens, places, tables and scales are the call's."""
    first, other = (draw(ALIKE[name], seed, device) for seed in (10, 11))
    if ALIKE[name].slots is None:
        other["cache_seqlens"] = torch.tensor([4, 2, 0], dtype=torch.int32, device=device)
    launch = AppendLaunch(call_of(**first), config=TILE)
    for arguments in (other, first):
        mine = {**arguments, **copies(arguments)}
        assert_same(results_of(mine, launch(call_of(**mine))), run(arguments))


def test_strides(device):
    """k, v and q cut from one projection; caches that are slices of a bigger tensor, heads before tokens."""
    case = Append(with_q=True, rotary_dim=16, dims=(16, 16), norm=True)
    arguments = draw(case, 7, device)
    expected = run(arguments)
    fused = torch.cat([arguments["q"], arguments["k"], arguments["v"]], dim=2)
    q, k, v = fused.split([3, 2, 2], dim=2)
    storage = torch.full((2, 3, 2, 12, 20), SENTINEL, device=device)
    k_cache, v_cache = (storage[side, :, :, :, 3:19].transpose(1, 2) for side in (0, 1))
    strided = {**arguments, "q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    new_q = kv_append_forward(call_of(**strided), config=TILE)
    assert_same({"k_cache": k_cache, "v_cache": v_cache, "new_q": new_q}, expected)
    assert bool((storage[..., :3] == SENTINEL).all() and (storage[..., 19:] == SENTINEL).all())


@pytest.mark.parametrize("config", [None, AppendConfig(1, 1, 4), AppendConfig(8, 4, 4)], ids=str)
def test_tiles_do_not_change_a_result(config, device):
    arguments = draw(Append(with_q=True, rotary_dim=16, counts=(2, 1, 3)), 8, device)
    assert_same(run(arguments, config), run(arguments))


@pytest.mark.skipif(not INTERPRETING, reason="a GPU chooses its own order of programs")
def test_order_of_programs_does_not_matter(device):
    from pytransformer.triton_interpreter import program_order

    arguments = draw(Append(with_q=True, rotary_dim=16, page_size=4), 9, device)
    natural = run(arguments)
    with program_order(3):
        assert_same(run(arguments), natural)


def test_no_tokens(device):
    arguments = draw(Append(seqlen=0, with_q=True), 0, device)
    results = run(arguments)
    assert results["new_q"].shape == (3, 0, 3, 16)
    assert bool((results["k_cache"] == SENTINEL).all())


def test_offsets_past_32_bits(device):
    """A cache row that begins beyond 2^31 elements; only the memory that is touched is taken."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GB of GPU memory")
    stride = 2**31 + 64
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, torch.utils.deterministic, "fill_uninitialized_memory", before)
        storage = torch.empty(stride + 256, dtype=torch.int8, device=device)
    far = [storage.as_strided((2, 4, 1, 16), (stride, 32, 16, 1), offset).fill_(5) for offset in (0, 16)]
    arguments = draw(
        Append(lengths=(1, 0), seqlen=2, heads=(1, 1), dims=(16, 16), capacity=4, cache_dtype=torch.int8), 0, device
    )
    expected = run({**arguments, "k_cache": far[0].contiguous(), "v_cache": far[1].contiguous()})
    kv_append_forward(call_of(**{**arguments, "k_cache": far[0], "v_cache": far[1]}), config=TILE)
    assert torch.equal(far[0], expected["k_cache"])
    assert torch.equal(far[1], expected["v_cache"])


def test_policy(device):
    """One token per program for a decode step, tiles of at most 4 KB for a prompt, powers of two always."""
    assert append_config(1, 8, 128, 2, device).block_tokens == 1
    for tokens in (1, 64, 8192):
        for num_kv_heads in (1, 3, 8, 64):
            for head_dim, itemsize in ((64, 2), (80, 2), (256, 4)):
                config = append_config(tokens, num_kv_heads, head_dim, itemsize, device)
                rows = config.block_tokens * config.block_heads
                assert rows & (rows - 1) == 0
                assert rows * head_dim * itemsize <= 4096
