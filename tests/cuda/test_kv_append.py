"""KV append in CUDA C++: exact copies to the right cells and no others, the fused steps with the bits of the separate ones, and faults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from pytransformer import extension, reference
from pytransformer.ops import checks
from pytransformer.ops.kv_append import kv_append
from pytransformer.ops.kv_append.call import AppendCall
from pytransformer.verification import SEEDS, Contract
from tests.kernels.append_contract import PLACES, SENTINEL, Append, assert_same, copies, draw, results_of, run_reference
from tests.support.emulator import in_every_schedule

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
CODES = pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)


def call_op(arguments: dict[str, Any]) -> Tensor | None:
    """The extension's op on exactly these tensors."""
    options = {"interleaved": False, "norm_eps": 1e-6, "norm_weight_offset": 0.0, **arguments}
    scale = arguments.get("k_scale")
    op = extension.op("kv_append" if scale is None or scale.ndim == 1 else "kv_append_scaled")
    new_q = op(*(options.get(name) for name in AppendCall._fields))
    return None if arguments.get("q") is None else new_q


def run(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Results of the op on copies, in every schedule: the caches, per-token scales and the new q."""
    names: list[str] = []

    def once() -> list[Tensor]:
        copied = {**arguments, **copies(arguments)}
        results = results_of(copied, call_op(copied))
        names[:] = results
        return list(results.values())

    values = in_every_schedule(once)
    return dict(zip(names, values, strict=True))


def on_cpu(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def assert_reference_bits(arguments: dict[str, Any]) -> None:
    assert_same(on_cpu(run(arguments)), run_reference(on_cpu(arguments)))


# --- where tokens go --------------------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("place", PLACES)
def test_copies_are_exact_and_nothing_else_is_written(place, dtype, device):
    arguments = draw(replace(PLACES[place], dtype=dtype), 0, device)
    results = run(arguments)
    assert_same(on_cpu(results), run_reference(on_cpu(arguments)))
    written = sum(int((results[name] != SENTINEL).any(-1).any(-1).sum()) for name in ("k_cache", "v_cache"))
    tokens = arguments["k"].shape[:-2].numel()
    skipped = int((arguments["slot_mapping"] < 0).sum()) if "slot_mapping" in arguments else 0
    assert written == 2 * (tokens - skipped)


def test_any_bits_are_copied(device):
    """NaN with its payload, infinities, subnormals and -0 arrive as they are."""
    case = Append(dtype=BFLOAT16, lengths=(2,), seqlen=8, heads=(1, 256), dims=(32, 32), capacity=10)
    bits = torch.arange(2**16, dtype=torch.int32, device=device).to(torch.int16).view(1, 8, 256, 32)
    arguments = {**draw(case, 0, device), "k": bits.view(BFLOAT16), "v": bits.view(BFLOAT16)}
    call_op(arguments)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(arguments[name][:, 2:].contiguous().view(torch.int16), bits)


OUTSIDE = {
    "behind-the-cache": Append(lengths=(11, 12, 3)),
    "negative-length": Append(lengths=(-2, -9, 3)),
    "far-away": Append(lengths=(2**31 - 1, -(2**31), 3)),
    "behind-the-table": Append(lengths=(10, 13, 3), page_size=4),
    "slots": Append(page_size=4, slots=(3, 0, 40, 10**12, -(10**12), 39, 41, 7, 8)),
    "rows": Append(options={"cache_batch_idx": torch.tensor([2, 3, -1], dtype=torch.int32)}),
}


@pytest.mark.parametrize("place", OUTSIDE)
def test_writes_outside_are_dropped(place, device):
    """What is dropped is not even read: its k and v are NaN here. The sanitizer sees any access outside of a tensor."""
    case = replace(OUTSIDE[place], with_q=True)
    arguments = draw(case, 1, device)
    expected = run_reference(on_cpu(arguments))
    assert_same(on_cpu(run(arguments)), expected)
    # Positions beyond the table of 30 rows take its last row.
    rotated = run(draw(replace(case, rotary_dim=16), 1, device))
    assert bool(rotated["new_q"].isfinite().all())


def test_pages_that_do_not_exist_are_dropped(device):
    arguments = draw(Append(page_size=4), 1, device)
    arguments["block_table"][:, 1] = torch.tensor([-1, 999, -(2**31)], device=device)
    assert_reference_bits(arguments)


def test_a_cache_without_pages_drops_everything(device):
    arguments = draw(Append(page_size=4, slots=(3, 0, -1, 39, 17, 16, 5, -7, 30), with_q=True), 1, device)
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name][:, :0]
    assert torch.equal(run(arguments)["new_q"], arguments["q"])


def test_tokens_of_no_sequence_are_dropped(device):
    """Rows behind the last packed sequence are not written; their q is rotated as at position 0."""
    arguments = draw(Append(counts=(2, 1, 3), with_q=True), 2, device)
    arguments["cu_seqlens"] = torch.tensor([0, 2, 3, 4], dtype=torch.int32, device=device)
    assert_reference_bits(arguments)
    arguments["cos"], arguments["sin"] = (table.to(device) for table in reference.rope_tables(16, 30))
    assert torch.equal(run(arguments)["new_q"][4:], arguments["q"][4:])  # cos 1, sin 0
    arguments["cu_seqlens"] = torch.tensor([90, -5, 2**31 - 1, -(2**31)], dtype=torch.int32, device=device)
    assert bool(run(arguments)["new_q"].isfinite().all())


def test_shapes_of_what_is_given_per_token(device):
    case = replace(PLACES["slots"], rotary_dim=16, with_q=True)
    arguments = draw(case, 3, device)
    expected = run(arguments)
    slots, positions = arguments["slot_mapping"], arguments["positions"].view(3, 3)
    for shaped in (
        {"slot_mapping": slots.view(3, 3), "positions": positions.flatten()},
        {"slot_mapping": torch.stack([slots, slots], 1)[:, 0], "positions": positions.T.contiguous().T.to(torch.int32)},
    ):
        assert_same(run({**arguments, **shaped}), expected)
    row = torch.tensor([4, 0, 9], device=device)
    shared = run({**arguments, "positions": row})
    assert_same(shared, run({**arguments, "positions": row.expand(3, 3).contiguous()}))


# --- norm, RoPE -------------------------------------------------------------------------------------------------------------------------


def check_contract(case: Append, device: torch.device) -> None:
    contract = Contract(case.dtype)
    for seed in range(SEEDS):
        arguments = draw(case, seed, device)
        actual, plain = run(arguments), run_reference(arguments)
        contract.add_all(actual, plain, run_reference(arguments, torch.float64))
        untouched = plain["k_cache"] == SENTINEL
        assert bool((actual["k_cache"][untouched] == SENTINEL).all())
    contract.check()


@DTYPES
@LAYOUTS
def test_norm_and_rope(interleaved, dtype, device):
    check_contract(
        Append(seqlen=2, dtype=dtype, rotary_dim=16, interleaved=interleaved, norm=True, with_q=True), device
    )


@DTYPES
@pytest.mark.parametrize("dims", [(40, 8), (8, 16), (256, 64)], ids=str)
def test_norm_alone(dims, dtype, device):
    check_contract(Append(lengths=(2, 0), seqlen=2, norm=True, with_q=True, dims=dims, dtype=dtype, capacity=5), device)


@pytest.mark.parametrize("weight_dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_norm_weights_of_any_dtype(weight_dtype, device):
    case = Append(seqlen=2, norm=True, with_q=True, dtype=BFLOAT16)
    arguments = draw(case, 0, device)
    expected = run(arguments)
    for name in ("k_norm_weight", "q_norm_weight"):
        arguments[name] = (
            arguments[name].to(weight_dtype) if weight_dtype != FLOAT16 else arguments[name].half().float()
        )
    if weight_dtype == FLOAT16:
        expected = run(arguments)
        for name in ("k_norm_weight", "q_norm_weight"):
            arguments[name] = arguments[name].half()
    assert_same(run(arguments), expected)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize(
    ("rotary_dim", "head_dim"),
    [(16, 16), (2, 8), (4, 16), (8, 24), (24, 40), (80, 80), (32, 80), (128, 128), (256, 256)],
)
def test_rope_has_the_bits_of_the_reference(rotary_dim, head_dim, interleaved, dtype, device):
    case = Append(
        lengths=(3, 0), seqlen=2, dims=(head_dim, 8), rotary_dim=rotary_dim, interleaved=interleaved, with_q=True, dtype=dtype, capacity=5
    )  # fmt: skip
    assert_reference_bits(draw(case, 0, device))


@pytest.mark.parametrize("place", ["packed", "packed-pages", "slots", "cache-rows"])
def test_rope_positions(place, device):
    """Each way of saying where tokens go says their positions; explicit ones win."""
    case = replace(PLACES[place], rotary_dim=8, with_q=True)
    assert_reference_bits(draw(case, 0, device))
    if case.counts is not None:
        explicit = torch.randint(0, 30, (sum(case.counts),), dtype=torch.int32)
        assert_reference_bits(draw(replace(case, options={"positions": explicit}), 0, device))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (17, 2)], ids=str)
@pytest.mark.parametrize("seqlen", [1, 9, 40])
def test_heads_and_tokens_around_a_block(heads, seqlen, device):
    case = Append(
        lengths=(0, 2),
        seqlen=seqlen,
        heads=heads,
        dims=(24, 40),
        dtype=BFLOAT16,
        capacity=42,
        rotary_dim=16,
        with_q=True,
    )
    assert_reference_bits(draw(case, 0, device))


# --- quantised caches -------------------------------------------------------------------------------------------------------------------


@CODES
@DTYPES
@pytest.mark.parametrize("scale_per_token", [False, True], ids=["per-head", "per-token"])
def test_codes_are_exact(cache_dtype, dtype, scale_per_token, device):
    for place in ("contiguous", "slots", "packed-pages"):
        case = replace(
            PLACES[place], dtype=dtype, cache_dtype=cache_dtype, scale_per_token=scale_per_token, rotary_dim=8
        )
        arguments = draw(case, 5, device)
        arguments["k"][..., 0, :] = 0.0
        arguments["v"] *= 3.0
        assert_reference_bits(arguments)


@CODES
def test_rounding_of_codes(cache_dtype, device):
    """Ties, saturation, subnormal codes, both signs; every code and every midpoint of two codes, and NaN of both signs."""
    if cache_dtype == torch.int8:
        codes = torch.arange(-140, 141, dtype=FLOAT32)
    else:
        codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        codes = torch.cat([-codes.flip(0), codes, torch.tensor([464.0, 480.0, 1e6, torch.inf])])
    values = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, torch.nextafter(codes, torch.tensor(torch.inf))])
    if cache_dtype != torch.int8:
        values = torch.cat([values, torch.tensor([0x7FC00000, 0x7F800001], dtype=torch.int32).view(FLOAT32)])
    values = torch.nn.functional.pad(values, (0, -len(values) % 256)).view(1, -1, 1, 256).to(device)
    one = torch.ones(1, device=device)
    cache = torch.zeros(values.shape, device=device).to(cache_dtype)
    arguments = {"k": values, "v": -values, "k_cache": cache, "v_cache": cache.clone(), "k_scale": one, "v_scale": one}
    assert_reference_bits({**arguments, "cache_seqlens": torch.zeros(1, dtype=torch.int32, device=device)})


def test_scales_of_odd_tokens(device):
    """amax of 0, subnormal, infinite and NaN: the scale and the codes of the reference."""
    arguments = draw(Append(cache_dtype=torch.float8_e4m3fn, scale_per_token=True, seqlen=3), 6, device)
    for token, value in enumerate((0.0, 1e-44, float("inf"))):
        arguments["k"][:, token] *= 0.0
        arguments["k"][:, token, :, 3] = value
    arguments["v"][0, 0, 0, 5] = float("nan")
    results, expected = on_cpu(run(arguments)), run_reference(on_cpu(arguments))
    assert_same(
        {name: results[name] for name in ("k_scale", "v_scale")},
        {name: expected[name] for name in ("k_scale", "v_scale")},
    )
    for name in ("k_cache", "v_cache"):  # the sign of a NaN made by a division is the processor's
        assert torch.equal(results[name].float().nan_to_num(nan=999.0), expected[name].float().nan_to_num(nan=999.0))


# --- memory -----------------------------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("shift", [0, 3])
def test_strides_and_alignment(shift, dtype, device):
    """k, v and q cut from one projection; caches that are slices of a bigger tensor, heads before tokens."""
    arguments = draw(Append(with_q=True, rotary_dim=16, dims=(16, 16), norm=True, dtype=dtype), 7, device)
    expected = run(arguments)
    fused = torch.cat([arguments["q"], arguments["k"], arguments["v"]], dim=2)
    fused = torch.cat([fused.new_full((shift,), float("nan")), fused.flatten()])[shift:].view_as(fused)
    q, k, v = fused.split([3, 2, 2], dim=2)
    storage = torch.full((2, 3, 2, 12, 24), SENTINEL, device=device, dtype=dtype)

    def once() -> list[Tensor]:
        after = storage.clone()
        k_cache, v_cache = (after[side, :, :, :, shift : shift + 16].transpose(1, 2) for side in (0, 1))
        new_q = call_op({**arguments, "q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache})
        return [new_q, k_cache, v_cache, after[..., :shift], after[..., shift + 16 :]]

    new_q, k_cache, v_cache, *around = in_every_schedule(once)
    assert_same({"k_cache": k_cache, "v_cache": v_cache, "new_q": new_q}, expected)
    assert all(bool((cells == SENTINEL).all()) for cells in around)


def test_offsets_past_32_bits(device, tmp_path: Path):
    """A cache row that begins beyond 2^31 elements; only the memory that is touched is taken."""
    stride = 2**31 + 64
    if device.type == "cuda":
        storage = torch.empty(stride + 256, dtype=torch.int8, device=device)
    else:
        storage = torch.from_file(str(tmp_path / "hole"), shared=True, size=stride + 256, dtype=torch.int8)
    far = [storage.as_strided((2, 4, 1, 16), (stride, 32, 16, 1), offset).fill_(5) for offset in (0, 16)]
    case = Append(lengths=(1, 0), seqlen=2, heads=(1, 1), dims=(16, 16), capacity=4, cache_dtype=torch.int8)
    arguments = draw(case, 0, device)
    expected = run({**arguments, "k_cache": far[0].contiguous(), "v_cache": far[1].contiguous()})
    call_op({**arguments, "k_cache": far[0], "v_cache": far[1]})
    assert torch.equal(far[0], expected["k_cache"]) and torch.equal(far[1], expected["v_cache"])


def test_no_tokens(device):
    results = run(draw(Append(seqlen=0, with_q=True), 0, device))
    assert results["new_q"].shape == (3, 0, 3, 16)
    assert bool((results["k_cache"] == SENTINEL).all())


# --- the public function ----------------------------------------------------------------------------------------------------------------

PUBLIC = {
    "store": Append(),
    "store-slots": PLACES["slots"],
    "store-pages": PLACES["pages-of-3"],
    "rotate-store": Append(rotary_dim=16, with_q=True),
    "rotate-store-slots": replace(PLACES["slots"], rotary_dim=16, interleaved=True, with_q=True),
    "rotate-only-k": Append(rotary_dim=16),
    "packed": replace(PLACES["packed-pages"], rotary_dim=16, with_q=True),
    "norm": Append(rotary_dim=16, with_q=True, norm=True),
    "int8": Append(cache_dtype=torch.int8),
    "int8-per-token": Append(cache_dtype=torch.int8, scale_per_token=True),
}


@pytest.mark.parametrize("case", PUBLIC)
def test_the_short_way_and_the_long_way_do_the_same(case, device, monkeypatch):
    arguments = draw(PUBLIC[case], 3, device)
    expected = run(arguments)
    for debug in (False, True):
        monkeypatch.setattr(checks, "DEBUG", debug)
        copied = {**arguments, **copies(arguments)}
        versions = [copied[name]._version for name in copies(arguments) if copied[name].ndim > 1]
        new_q = kv_append(**copied, backend="cuda")
        assert (new_q is None) == ("q" not in arguments)
        assert_same(results_of(copied, new_q), expected)
        assert all(
            copied[name]._version > version
            for name, version in zip((n for n in copies(arguments) if copied[n].ndim > 1), versions)
        )


def test_gradients_are_refused(device):
    arguments = draw(Append(with_q=True), 0, device)
    arguments["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="kv_append is not differentiable, but q requires grad"):
        kv_append(**arguments, backend="cuda")


def test_autocast_casts(device):
    arguments = draw(Append(with_q=True, dtype=BFLOAT16), 0, device)
    wide = {**arguments, **{name: arguments[name].float() for name in ("k", "v", "q")}}
    with torch.autocast(device.type, BFLOAT16):
        new_q = kv_append(**{**wide, **copies(arguments)}, backend="cuda")
    assert new_q.dtype == BFLOAT16


def zeros(*shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


INT32, INT64, INT8 = torch.int32, torch.int64, torch.int8
BYTES = {"k_cache": zeros(2, 5, 2, 8, dtype=INT8), "v_cache": zeros(2, 5, 2, 8, dtype=INT8)}
TABLES = {"cos": zeros(9, 4), "sin": zeros(9, 4)}
SLOTS = {"slot_mapping": zeros(6, dtype=INT64), "cache_seqlens": None}
PACKED = {"k": zeros(6, 2, 8), "v": zeros(6, 2, 8)}
WRONG = {
    "dtype of k": ({"k": zeros(2, 3, 2, 8, dtype=INT32)}, "k must be float32"),
    "rank of k": ({"k": zeros(2, 8)}, "3 or 4 dimensions"),
    "dtype of v": ({"v": zeros(2, 3, 2, 8, dtype=FLOAT16)}, "v must have the dtype of k"),
    "shape of v": ({"v": zeros(2, 4, 2, 8)}, "v must have the shape of k"),
    "head_dim": ({"k": zeros(2, 3, 2, 12), "v": zeros(2, 3, 2, 12)}, "multiple of 8 from 8 to 256"),
    "stride of k": ({"k": zeros(2, 3, 8, 2).transpose(2, 3)}, "k must be contiguous"),
    "dtype of q": ({"q": zeros(2, 3, 2, 8, dtype=FLOAT16)}, "q must have the dtype of k"),
    "shape of q": ({"q": zeros(2, 3, 2, 16)}, "q must have the shape of k"),
    "heads of q": ({"q": zeros(2, 3, 0, 8)}, "at least one head"),
    "dtype of the cache": ({"k_cache": zeros(2, 5, 2, 8, dtype=FLOAT16)}, "k_cache must have the dtype of k"),
    "dtypes of the caches": ({"k_cache": BYTES["k_cache"]}, "v_cache must have the dtype of k_cache"),
    "shape of the cache": ({"v_cache": zeros(2, 5, 3, 8)}, "v_cache must be"),
    "lengths of the caches": ({"v_cache": zeros(2, 6, 2, 8)}, "v_cache must have the shape of k_cache"),
    "stride of the cache": ({"k_cache": zeros(2, 5, 8, 2).transpose(2, 3)}, "k_cache must be contiguous"),
    "expanded cache": ({"k_cache": zeros(2, 1, 2, 8).expand(2, 5, 2, 8)}, "must not be expanded"),
    "no scale": ({**BYTES, "k_scale": torch.ones(2)}, "v_scale must be given"),
    "shape of the scale": ({**BYTES, "k_scale": torch.ones(3), "v_scale": torch.ones(2)}, "k_scale must have shape"),
    "scales of two kinds": ({**BYTES, "k_scale": torch.ones(2), "v_scale": torch.ones(2, 5, 2)}, "v_scale must have shape"),
    "dtype of the scale": ({**BYTES, "k_scale": zeros(2, dtype=FLOAT16), "v_scale": torch.ones(2)}, "k_scale must be float32"),
    "scale without use": ({"k_scale": torch.ones(2)}, "are for quantised caches"),
    "nowhere": ({"cache_seqlens": None}, "cache_seqlens or slot_mapping"),
    "twice": ({"slot_mapping": zeros(6, dtype=INT64)}, "cache_seqlens or slot_mapping"),
    "dtype of slots": ({**SLOTS, "slot_mapping": zeros(6, dtype=INT32)}, "slot_mapping must be int64"),
    "number of slots": ({**SLOTS, "slot_mapping": zeros(5, dtype=INT64)}, "an entry for each token"),
    "slots and pages": ({**SLOTS, "block_table": zeros(2, 1, dtype=INT32)}, "go with cache_seqlens"),
    "dtype of lengths": ({"cache_seqlens": zeros(2, dtype=INT64)}, "cache_seqlens must be int32"),
    "number of lengths": ({"cache_seqlens": zeros(3, dtype=INT32)}, "cache_seqlens must have shape"),
    "stride of lengths": ({"cache_seqlens": zeros(2, 2, dtype=INT32)[:, 0]}, "cache_seqlens must be contiguous"),
    "packed without bounds": (PACKED, "cu_seqlens goes with packed k"),
    "number of bounds": ({**PACKED, "cu_seqlens": zeros(2, dtype=INT32)}, "cu_seqlens must have shape"),
    "shape of the table": ({"block_table": zeros(3, 1, dtype=INT32)}, "block_table must have shape"),
    "dtype of the table": ({"block_table": zeros(2, 1, dtype=INT64)}, "block_table must be int32"),
    "table and rows": ({"block_table": zeros(2, 1, dtype=INT32), "cache_batch_idx": zeros(2, dtype=INT32)}, "for contiguous caches"),
    "number of rows": ({"cache_batch_idx": zeros(3, dtype=INT32)}, "cache_batch_idx must have shape"),
    "rows of the cache": ({"k_cache": zeros(3, 5, 2, 8), "v_cache": zeros(3, 5, 2, 8)}, "k_cache must have 2 rows"),
    "no room": ({"k_cache": zeros(2, 0, 2, 8), "v_cache": zeros(2, 0, 2, 8)}, "no room"),
    "cos without sin": ({"cos": zeros(9, 4)}, "cos and sin go together"),
    "width of cos": ({"cos": zeros(9, 5), "sin": zeros(9, 5)}, "rotary_dim from 2 to 8"),
    "rows of cos": ({"cos": zeros(0, 4), "sin": zeros(0, 4)}, "cos has no rows"),
    "slots without positions": ({**SLOTS, **TABLES}, "positions must be given with slot_mapping"),
    "dtype of positions": ({**TABLES, "positions": zeros(6)}, "positions must be int32 or int64"),
    "number of positions": ({**TABLES, "positions": zeros(4, dtype=INT64)}, "an entry for each token"),
    "eps": ({"norm_eps": -1.0}, "norm_eps"),
    "weight without q": ({"q_norm_weight": zeros(8)}, "without q"),
    "shape of the weight": ({"k_norm_weight": zeros(7)}, "k_norm_weight must have shape"),
    "dtype of the weight": ({"k_norm_weight": zeros(8, dtype=INT32)}, "k_norm_weight must be float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_op_refuses_what_is_wrong_and_writes_nothing(name, device):
    changes, message = WRONG[name]
    given: dict[str, Any] = {
        **{name: torch.ones(2, 3, 2, 8) for name in ("k", "v")},
        **{name: zeros(2, 5, 2, 8) for name in ("k_cache", "v_cache")},
        "cache_seqlens": zeros(2, dtype=INT32),
        **changes,
    }
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    if name == "expanded cache":
        given["k_cache"] = given["k_cache"][:, :1].expand(2, 5, 2, 8)
    with pytest.raises(ValueError, match=message):
        call_op(given)
    assert not given["k_cache"].float().any() and not given["v_cache"].float().any()


def test_the_public_function_says_in_its_own_words_what_is_wrong(device):
    arguments = draw(Append(), 0, device)
    with pytest.raises(ValueError, match="cos and sin go together: cos is given"):
        kv_append(**arguments, cos=torch.zeros(9, 4, device=device), backend="cuda")
    with pytest.raises(TypeError, match=r"k must be a torch\.Tensor"):
        kv_append(**{**arguments, "k": [1.0]}, backend="cuda")
    with pytest.raises(NotImplementedError, match="float64"):
        double = {name: value.double() if value.is_floating_point() else value for name, value in arguments.items()}
        kv_append(**double, backend="cuda")


# --- graphs -----------------------------------------------------------------------------------------------------------------------------


def test_opcheck(device):
    for case in (PUBLIC["rotate-store"], PUBLIC["int8-per-token"]):
        arguments = draw(case, 0, device)
        options = {"interleaved": False, "norm_eps": 1e-6, "norm_weight_offset": 0.0, **arguments}
        op = extension.op("kv_append_scaled" if case.scale_per_token else "kv_append")
        torch.library.opcheck(op, tuple(options.get(name) for name in AppendCall._fields))
    arguments = draw(PUBLIC["rotate-store"], 0, device)
    first = [arguments[name] for name in ("k", "v", "k_cache", "v_cache", "cache_seqlens")]
    torch.library.opcheck(extension.op("kv_store"), (*first, None))
    tables = (arguments["cos"], arguments["sin"])
    torch.library.opcheck(extension.op("kv_rotate_store"), (arguments["q"], *first, None, *tables, None, False))


def test_compiles_whole_with_dynamic_shapes(device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(q, k, v, k_cache, v_cache, lengths, cos, sin):
        new_q = kv_append(k * 2, v, k_cache, v_cache, cache_seqlens=lengths, q=q, cos=cos, sin=sin, backend="cuda")
        return new_q + 1, k_cache.sum()

    cos, sin = (table.to(device) for table in reference.rope_tables(16, 40))
    for batch, seqlen, capacity in ((3, 5, 20), (5, 3, 31)):
        q, k, v = (torch.randn(batch, seqlen, heads, 16, device=device) for heads in (4, 2, 2))
        caches = torch.zeros(2, 2, batch, capacity, 2, 16, device=device)
        lengths = torch.arange(batch, dtype=torch.int32, device=device)
        new_q, total = compiled(q, k, v, caches[0, 0], caches[0, 1], lengths, cos, sin)
        options = {"cache_seqlens": lengths, "q": q, "cos": cos, "sin": sin, "backend": "cuda"}
        expected = kv_append(k * 2, v, caches[1, 0], caches[1, 1], **options)
        assert torch.equal(new_q, expected + 1)
        assert torch.equal(caches[0], caches[1])
        assert torch.equal(total, caches[1, 0].sum())
    assert sum("pytransformer.kv_append" in graph.code for graph in counter.graphs) == 1
    torch._dynamo.reset()
