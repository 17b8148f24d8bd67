"""The options of attention as factors of a covering array, and a row of the array as a call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pytransformer.ops.attention import attention
from pytransformer.verification import SEEDS, Contract
from tests.combinations.pairwise import Impossible, Row, covering_array
from tests.kernels.attention_contract import Case, Inputs, draw, run_reference
from tests.support.draws import pool

FACTORS: dict[str, tuple[str, ...]] = {
    "dtype": ("bfloat16", "float32", "float16"),
    "visible": ("all", "causal", "window", "causal, window"),
    "lengths": ("Lq = Lk", "Lq < Lk", "Lq > Lk", "one query", "no keys"),
    "layout": ("dense", "packed"),
    "heads": ("MHA", "GQA 4:1", "GQA 4:2", "MQA 3:1"),
    "head_dim": ("64", "8", "40", "96", "128"),
    "value head_dim": ("same", "other"),
    "softcap": ("none", "given"),
    "mask": ("none", "boolean, full", "boolean, (1, 1, Lq, Lk)", "integer, (batch, 1, 1, Lk)"),
    "bias": ("none", "full", "(1, heads, Lq, Lk)", "(batch, 1, 1, Lk)", "-inf, whole rows too", "no gradient wanted"),
    "block_mask": ("none", "(batch, heads, blocks)", "(1, 1, blocks)"),
    "key_padding_mask": ("none", "given"),
    "alibi_slopes": ("none", "(heads)", "(batch, heads)"),
    "sinks": ("none", "given"),
    "dropout_p": ("0", "0.3"),
    "return_lse": ("no", "with its gradient"),
    "deterministic": ("no", "yes"),
    "strides": ("contiguous", "heads before tokens"),
}
_TERMS = ("softcap", "mask", "bias", "block_mask", "key_padding_mask", "alibi_slopes", "dropout_p")
# No pair is excluded; these rows are, because in them one of a pair would be there in name only.
RULES = tuple(
    Impossible(
        {"layout": ("dense",), "lengths": ("no keys",), factor: FACTORS[factor][1:]},
        f"a dense call without keys has no score that {factor} could act on: such pairs are met in packed calls",
    )
    for factor in (*_TERMS, "visible")
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Tiles are 32 by 32: one, two along either axis, and in packed calls both; the interpreter's time goes by their number, and that of the
# bias gradient's tiles, 16 by 16 in float32.
LENGTHS: dict[str, tuple[tuple[int, int], tuple[tuple[int, int], ...]]] = {
    "Lq = Lk": ((16, 16), ((5, 5), (33, 33))),
    "Lq < Lk": ((9, 37), ((5, 17), (9, 33))),
    "Lq > Lk": ((40, 9), ((17, 5), (33, 9))),
    "one query": ((1, 21), ((1, 12), (1, 33))),
    "no keys": ((9, 0), ((7, 0), (9, 20))),
}
HEADS = {"MHA": (2, 2), "GQA 4:1": (4, 1), "GQA 4:2": (6, 2), "MQA 3:1": (3, 1)}
VISIBLE: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"causal": True},
    "window": {"window": (6, 3)},
    "causal, window": {"causal": True, "window": (7, -1)},
}
BLOCK_SIZE = 16
SEED = torch.tensor([2**40 + 5, -(2**33) - 7])
Draw = Callable[[Case, torch.Generator], Any]


def rows() -> list[Row]:
    """The covering array."""
    return covering_array(FACTORS, RULES)


def _sizes(case: Case) -> tuple[int, int, int, int]:
    return len(case.pairs), case.heads[0], *case.longest


def _random_mask(shape: Callable[[int, int, int, int], tuple[int, ...]], dtype: torch.dtype = torch.bool) -> Draw:
    """Hides a third; the first row of the last sequence and head sees nothing, if the mask has rows at all."""

    def make(case: Case, generator: torch.Generator) -> Tensor:
        mask = torch.rand(shape(*_sizes(case)), generator=generator) > 0.3
        if mask.shape[-2] > 1 and mask.shape[1] > 1:
            mask[-1, -1, 0] = False
        return mask if dtype == torch.bool else mask.to(dtype) * 3

    return make


def _random_blocks(is_full: bool) -> Draw:
    """Lists two thirds of the blocks of 16; alone, never all of them."""

    def make(case: Case, generator: torch.Generator) -> Tensor:
        batch, heads, *lengths = _sizes(case)
        listed = torch.rand(
            *((batch, heads) if is_full else (1, 1)), *(-(-n // BLOCK_SIZE) for n in lengths), generator=generator
        )
        listed = listed > 0.35
        listed[:1, :1, -1:, :1] = False
        return listed

    return make


def _random_bias(shape: Callable[[int, int, int, int], tuple[int, ...]], infinities: bool = False) -> Draw:
    def make(case: Case, generator: torch.Generator) -> Tensor:
        bias = torch.randn(shape(*_sizes(case)), generator=generator)
        if infinities:
            bias[torch.rand(bias.shape, generator=generator) < 0.25] = -math.inf
            bias[-1, :, -1] = -math.inf
            bias[0, 0, 0] = -math.inf
        return bias.to(case.dtype)

    return make


def _padding(case: Case, generator: torch.Generator) -> Tensor:
    """Left and right padding by turns, from none to half of the keys."""
    batch, _, _, seqlen_k = _sizes(case)
    padded = torch.randint(1, max(seqlen_k // 2, 2), (batch, 1), generator=generator)
    positions = torch.arange(seqlen_k).expand(batch, -1)
    left = torch.arange(batch)[:, None] % 2 == 0
    return torch.where(left, positions >= padded, positions < seqlen_k - padded)


def _full(*sizes: int) -> tuple[int, ...]:
    return sizes


OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "softcap": {"given": {"softcap": 1.5}},
    "mask": {
        "boolean, full": {"mask": _random_mask(_full)},
        "boolean, (1, 1, Lq, Lk)": {"mask": _random_mask(lambda batch, heads, *lengths: (1, 1, *lengths))},
        "integer, (batch, 1, 1, Lk)": {
            "mask": _random_mask(lambda batch, heads, seqlen_q, seqlen_k: (batch, 1, 1, seqlen_k), torch.int32)
        },
    },
    "bias": {
        "full": {"bias": _random_bias(_full)},
        "(1, heads, Lq, Lk)": {"bias": _random_bias(lambda batch, *rest: (1, *rest))},
        "(batch, 1, 1, Lk)": {
            "bias": _random_bias(lambda batch, heads, seqlen_q, seqlen_k: (batch, 1, 1, seqlen_k)),
        },
        "-inf, whole rows too": {"bias": _random_bias(_full, infinities=True)},
        "no gradient wanted": {"bias": _random_bias(lambda batch, heads, *lengths: (1, 1, *lengths))},
    },
    "block_mask": {
        "(batch, heads, blocks)": {"block_mask": _random_blocks(True), "block_size": BLOCK_SIZE},
        "(1, 1, blocks)": {"block_mask": _random_blocks(False), "block_size": BLOCK_SIZE},
    },
    "key_padding_mask": {"given": {"key_padding_mask": _padding}},
    "alibi_slopes": {
        "(heads)": {"alibi_slopes": lambda case, generator: torch.rand(case.heads[0], generator=generator)},
        "(batch, heads)": {"alibi_slopes": lambda case, generator: torch.rand(_sizes(case)[:2], generator=generator)},
    },
    "sinks": {"given": {"sinks": lambda case, generator: torch.randn(case.heads[0], generator=generator)}},
    "dropout_p": {"0.3": {"dropout_p": 0.3, "dropout_seed": SEED}},
}


def case_of(row: Mapping[str, str]) -> Case:
    """Shapes and options of a row."""
    options: dict[str, Any] = dict(VISIBLE[row["visible"]])
    for factor, levels in OPTIONS.items():
        options.update(levels.get(row[factor], {}))
    dense, packed = LENGTHS[row["lengths"]]
    head_dim = int(row["head_dim"])
    return Case(
        lengths=packed if row["layout"] == "packed" else dense,
        heads=HEADS[row["heads"]],
        dims=(head_dim, head_dim if row["value head_dim"] == "same" else {8: 24, 40: 8}.get(head_dim, 40)),
        dtype=DTYPES[row["dtype"]],
        batch=2,
        options=options,
        lse_gradient=row["return_lse"] != "no",
    )


def _heads_first(tensor: Tensor) -> Tensor:
    """The same values in memory where heads come before tokens (a mask or bias: columns before rows)."""
    first, second = (0, 1) if tensor.ndim == 3 else (1, 2)
    return tensor.transpose(first, second).contiguous().transpose(first, second)


def inputs_of(row: Mapping[str, str], seed: int, device: torch.device, case: Case | None = None) -> Inputs:
    """Random arguments of a row, or of a case that is the row's with other lengths."""
    inputs = draw(case or case_of(row), seed, device)
    if row["strides"] != "contiguous":
        inputs.tensors = {name: _heads_first(t) if t.ndim > 2 else t for name, t in inputs.tensors.items()}
        inputs.dout = _heads_first(inputs.dout)
        if "mask" in inputs.options:
            inputs.options["mask"] = inputs.options["mask"].mT.contiguous().mT
    if row["bias"] == "no gradient wanted":
        inputs.options["bias"] = inputs.tensors.pop("bias")
    return inputs


def run_op(
    row: Mapping[str, str], inputs: Inputs, backend: str, gradients: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(out and, where the row asks for it, lse; gradients of all that wants one) of the public op."""
    leaves = inputs.leaves() if gradients else inputs.tensors
    with_lse = row["return_lse"] != "no"
    result = attention(
        **leaves, **inputs.options, deterministic=row["deterministic"] == "yes", return_lse=with_lse, backend=backend
    )
    outputs = dict(zip(("out", "lse"), result if isinstance(result, tuple) else (result,)))
    if not gradients:
        return outputs, {}
    sent = [inputs.dout]
    if with_lse:
        # What flows into the lse of a row that sees nothing must not matter to a kernel; a merge of partial results sends NaN.
        poison = math.nan if backend in ("triton", "cuda") else 0.0
        sent.append(torch.where(outputs["lse"] == -math.inf, poison, inputs.dlse))
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), sent)
    return {name: value.detach() for name, value in outputs.items()}, {f"d{n}": g for n, g in zip(leaves, found)}


def same_bits(first: Mapping[str, Tensor], *again: Mapping[str, Tensor]) -> None:
    """Raises an AssertionError that names the result of two runs that differs."""
    for name, value in ((name, value) for results in again for name, value in results.items()):
        assert torch.equal(first[name], value), f"{name} differs between two runs"


def calls_of(row: Mapping[str, str]) -> int:
    """How many calls pool at least as many draws as the contract asks for: each has two sequences that are drawn independently.

    The gradient of the sinks is one number for each head of a call, the sum of few where there is one query: in 16 bits its mean over 24
    numbers still wanders by half (over 500 it is 0.9 of what is allowed).
    """
    if row["sinks"] == "none" or row["dtype"] == "float32":
        return SEEDS // 2
    return 2 * SEEDS if row["lengths"] == "one query" else SEEDS


def contract_of(
    row: Mapping[str, str],
    backend: str,
    device: torch.device,
    gradients: bool = True,
    repeated: bool = False,
    least: int | None = None,
) -> Contract:
    """Errors of the op, pooled, beside plain PyTorch's.

    Args:
        row: what is called.
        backend: of the op.
        device: of the tensors.
        gradients: whether the call is differentiated.
        repeated: whether the first call is made twice, for the same bits: of all results of a deterministic row, else of the outputs.
        least: calls that are pooled in any case; as many as the contract asks for, unless the test goes over many rows.
    """
    contract = Contract(DTYPES[row["dtype"]])

    def add(seed: int) -> None:
        inputs = inputs_of(row, seed, device)
        golden, golden_gradients = run_reference(inputs, torch.float64)
        plain, plain_gradients = run_reference(inputs)
        outputs, found = run_op(row, inputs, backend, gradients)
        if seed == 0 and repeated and row["deterministic"] == "yes":
            same_bits({**outputs, **found}, *run_op(row, inputs, backend, gradients))
        elif seed == 0 and repeated:  # two calls without gradients, as with them another kernel may serve
            same_bits(*(run_op(row, inputs, backend, gradients=False)[0] for _ in range(2)))
        contract.add_all(outputs, plain, golden)
        contract.add_all(found, plain_gradients, golden_gradients, kind="gradient")

    # A gradient of few numbers, most of them hidden, is one draw's luck: in doubt there are more.
    return pool(contract, add, least or calls_of(row), 2 * SEEDS)
