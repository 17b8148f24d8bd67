"""The cross-entropy kernel against the reference: the contract, edges, memory, faults that must be seen."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pytransformer import reference, triton_interpreter
from pytransformer.kernels.linear_cross_entropy import (
    CrossEntropyConfig,
    cross_entropy,
    cross_entropy_config,
    logits_buffer,
)
from pytransformer.verification import SEEDS, Contract, ContractError
from tests.conftest import INTERPRETING
from tests.support.broken_kernel import load_broken
from tests.support.draws import pool

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
ROWS = 6
IGNORED = -100
# What ships walks rows of more than 8192 words in blocks; with this one 600 words are three, the last one not full.
BLOCKS = CrossEntropyConfig(256, 1)
PLAIN = {"ignore_index": IGNORED, "label_smoothing": 0.0, "softcap": 0.0, "z_loss": 0.0}
EVERYTHING = {"ignore_index": 3, "label_smoothing": 0.1, "softcap": 5.0, "z_loss": 1e-2}


def inputs(
    vocab_size: int, dtype: torch.dtype, device: torch.device, options=PLAIN, seed: int = 0, scale: float = 3.0
) -> dict[str, Tensor]:
    """logits, targets (the second row ignored) and, where all options are on, bias and dlosses."""
    torch.manual_seed(seed)
    drawn = {
        "logits": (scale * torch.randn(ROWS, vocab_size)).to(dtype),
        "targets": torch.randint(0, vocab_size, (ROWS,)),
    }
    drawn["targets"][1] = options["ignore_index"]
    if options is EVERYTHING:
        drawn["bias"] = torch.randn(vocab_size).to(dtype)
        drawn["dlosses"] = torch.randn(ROWS)
    return {name: tensor.to(device) for name, tensor in drawn.items()}


def by_kernel(drawn: dict[str, Tensor], options=PLAIN, launch=cross_entropy, wants_gradient: bool = True, config=None):
    """(losses, gradient of the logits, the whole buffer)."""
    rows, vocab_size = drawn["logits"].shape
    buffer = logits_buffer(rows, vocab_size, drawn["logits"]).fill_(math.nan)
    buffer[:, :vocab_size] = drawn["logits"]
    losses = torch.full((rows,), math.nan, device=buffer.device)
    tensors = drawn["targets"], drawn.get("bias"), drawn.get("dlosses"), losses
    launch(buffer, vocab_size, *tensors, **options, wants_gradient=wants_gradient, config=config)
    return losses, buffer[:, :vocab_size], buffer


def by_reference(drawn: dict[str, Tensor], options=PLAIN, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The reference's head with an identity for its weight."""
    logits = drawn["logits"].detach().cpu().to(dtype or drawn["logits"].dtype).requires_grad_()
    bias = drawn["bias"].cpu().to(logits.dtype) if "bias" in drawn else None
    identity = torch.eye(logits.shape[1], dtype=logits.dtype)
    losses = reference.linear_cross_entropy(
        logits, identity, drawn["targets"].cpu(), bias=bias, reduction="none", **options
    )
    dlosses = drawn["dlosses"].cpu() if "dlosses" in drawn else torch.ones(len(losses))
    return losses.detach(), torch.autograd.grad(losses, logits, dlosses.to(losses.dtype))[0]


def measure(
    vocab_size: int, dtype: torch.dtype, device, options=PLAIN, seeds: int = SEEDS, least: int | None = None, **more
) -> Contract:
    """The contract over some seeds; over ``least`` and all only in doubt where what is asked is which cells are read."""
    contract = Contract(dtype)
    scale = more.pop("scale", 3.0)

    def add(seed: int) -> None:
        drawn = inputs(vocab_size, dtype, device, options, seed, scale)
        losses, gradient, _ = by_kernel(drawn, options, **more)
        plain, golden = by_reference(drawn, options), by_reference(drawn, options, torch.float64)
        contract.add("loss", actual=losses, plain=plain[0], golden=golden[0], kind="output")
        contract.add("dlogits", actual=gradient, plain=plain[1], golden=golden[1], kind="gradient")

    return pool(contract, add, least, seeds)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 512, 513])
def test_contract_holds_at_every_size_of_the_vocabulary(vocab_size, dtype, device):
    measure(vocab_size, dtype, device, least=1).check()
    if vocab_size > BLOCKS.block_cols:
        measure(vocab_size, dtype, device, least=1, config=BLOCKS).check()


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_contract_holds_with_every_option(dtype, device):
    measure(600, dtype, device, EVERYTHING, config=BLOCKS).check()


def contract_with_torch(logits: Tensor, targets: Tensor, losses: Tensor, gradient: Tensor) -> Contract:
    """The contract by torch's own function, for logits for which the reference's identity weight would not do."""
    contract, results = Contract(logits.dtype), {}
    for name, dtype in (("plain", logits.dtype), ("golden", torch.float64)):
        leaf = logits.to(dtype).requires_grad_()
        wide = leaf.to(torch.promote_types(dtype, FLOAT32))
        loss = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
        results[name] = loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]
    for index, (name, actual) in enumerate({"loss": losses, "dlogits": gradient}.items()):
        pair = {key: value[index] for key, value in results.items()}
        contract.add(name, actual=actual, kind="gradient" if index else "output", **pair)
    return contract


@pytest.mark.parametrize("vocab_size", [20_000, 70_001])
def test_contract_holds_over_several_blocks_of_the_shipped_sizes(vocab_size, device, monkeypatch):
    """Against float64 alone: an identity of this size would not fit, so the reference is torch's own function here."""
    monkeypatch.setattr("tests.kernels.test_linear_cross_entropy.ROWS", 2)
    drawn = inputs(vocab_size, BFLOAT16, device)
    assert vocab_size > cross_entropy_config(vocab_size).block_cols
    losses, gradient, _ = by_kernel(drawn)
    contract_with_torch(drawn["logits"].cpu(), drawn["targets"].cpu(), losses, gradient).check()


@pytest.mark.parametrize("scale", [40.0, 1e4], ids=["outliers", "huge"])
def test_contract_holds_for_large_logits(scale, device):
    measure(600, FLOAT32, device, scale=scale, config=BLOCKS).check()


def test_without_a_gradient_the_logits_stay(device):
    drawn = inputs(600, BFLOAT16, device)
    expected, _, _ = by_kernel(drawn)
    losses, logits, _ = by_kernel(drawn, wants_gradient=False)
    assert torch.equal(losses, expected)
    assert torch.equal(logits, drawn["logits"])


def test_an_ignored_row_is_zero_whatever_it_holds(device):
    drawn = inputs(600, BFLOAT16, device)
    drawn["logits"][1] = math.nan
    losses, gradient, _ = by_kernel(drawn)
    assert losses[1] == 0
    assert gradient[1].eq(0).all()
    assert losses.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("target", [-1, 600, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_target_that_is_no_word_gives_nan_and_reads_nothing(target, dtype, device):
    drawn = inputs(600, BFLOAT16, device, EVERYTHING)
    drawn["targets"][4] = target
    drawn["targets"] = drawn["targets"].to(dtype)
    losses, gradient, _ = by_kernel(drawn, EVERYTHING)
    assert losses[4].isnan() and gradient[4].isnan().all()
    others = [0, 1, 2, 3, 5]
    assert losses[others].isfinite().all() and gradient[others].isfinite().all()


def test_hidden_words_and_infinite_logits(device):
    """Words of logit -inf have no weight, whole blocks of them included; +inf and NaN are not hidden."""
    drawn = inputs(1100, FLOAT32, device)
    logits, targets = drawn["logits"], drawn["targets"]
    targets[:] = torch.tensor([1, 1099, 1050, 7, 8, 9])
    logits[0, 512:], logits[1, :600], logits[2, :1050] = -math.inf, -math.inf, -math.inf
    logits[3] = -math.inf
    logits[4, 700] = math.inf
    logits[5, 3] = math.nan
    losses, gradient, _ = by_kernel(drawn, config=BLOCKS)
    visible = logits[:3].cpu()
    contract_with_torch(visible, targets[:3].cpu(), losses[:3], gradient[:3]).check()
    assert gradient[:3][visible.to(device) == -math.inf].eq(0).all()
    # Of nothing but -inf there is no distribution; +inf and NaN must not pass for a loss.
    assert losses[3].isnan() and not losses[4:].isfinite().any()


def test_rows_beyond_two_gigabytes_of_elements(device):
    """A buffer of two rows whose distance is more than 2³¹ elements; on a CPU it is never touched in between."""
    holder = torch.empty(2**31 + 2048, dtype=BFLOAT16, device=device)
    drawn = inputs(600, BFLOAT16, device)
    far = holder.as_strided((2, 640), (2**31 + 64, 1))
    far[:, :600] = drawn["logits"][:2]
    losses = torch.full((2,), math.nan, device=device)
    targets = drawn["targets"][:2].clone().fill_(5)
    cross_entropy(far, 600, targets, None, None, losses, **PLAIN, wants_gradient=True)
    near = by_kernel({"logits": drawn["logits"][:2], "targets": targets})
    assert torch.equal(losses, near[0])
    assert torch.equal(far[:, :600], near[1])


def test_same_bits_each_run_in_any_order_of_programs(device):
    drawn = inputs(600, BFLOAT16, device, EVERYTHING)
    first = by_kernel(drawn, EVERYTHING)[:2]
    for seed in range(200 if device.type == "cuda" else 1):
        order = triton_interpreter.program_order(seed) if triton_interpreter.installed() else contextlib.nullcontext()
        with order:
            again = by_kernel(drawn, EVERYTHING)[:2]
        assert all(map(torch.equal, first, again))


def test_a_row_does_not_depend_on_the_others(device):
    drawn = inputs(600, BFLOAT16, device, EVERYTHING)
    losses, gradient, _ = by_kernel(drawn, EVERYTHING)
    alone = {name: tensor if name == "bias" else tensor[2:3].clone() for name, tensor in drawn.items()}
    one_loss, one_gradient, _ = by_kernel(alone, EVERYTHING)
    assert torch.equal(one_loss, losses[2:3]) and torch.equal(one_gradient, gradient[2:3])


def test_no_rows(device):
    drawn = {name: tensor[:0] for name, tensor in inputs(64, FLOAT32, device).items()}
    assert by_kernel(drawn)[0].shape == (0,)


FAULTS = {
    "a block's maximum is not carried on": ("maxima = tl.maximum(before, tl.max(grouped, axis=1))", "maxima = tl.max(grouped, axis=1)"),
    "sums are not rescaled": ("totals = totals * _exp(before - shifts) +", "totals = totals +"),
    "groups are not brought to one maximum": ("totals * _exp(_finite(maxima) - shift))", "totals)"),
    "the padding counts": ('values = tl.where(inside, values, float("-inf"))', "values = tl.where(cols >= 0, values, 0.0)"),
    "the target's share is forgotten": ("gradient -= onehot", "gradient -= 0.0"),
    "smoothing by the columns of the buffer": ("(label_smoothing / vocab_size)", "(label_smoothing / padded_size)"),
    "softcap has no slope": ("return 1.0 - ratio * ratio", "return 1.0 - 0.0 * ratio"),
    "z-loss has no gradient": ("(1.0 + 2.0 * z_loss * lse) / total", "1.0 / total"),
    "ignored rows keep their logits": ("tl.store(logits_row + start + lanes, zeros,", "tl.store(logits_row + start + lanes, zeros + 1,"),
    "the losses' gradient is not used": ("dloss = tl.load(dlosses_ptr + row).to(tl.float32)", "dloss = 1.0"),
    "bias is not read": ("values += tl.load(bias_ptr + cols, mask=inside, other=0.0)", "values += tl.zeros_like(cols)"),
    "bias of whole blocks is not read": ("values += tl.load(bias_ptr + cols).to(tl.float32)", "values += 0.0"),
    "the last block is forgotten": ("if whole_end < padded_size:\n            state", "if whole_end < 0:\n            state"),
    "the last block keeps its logits": ("if whole_end < padded_size:\n                _write", "if whole_end < 0:\n                _write"),
}  # fmt: skip


def _is_caught(device: torch.device, launch) -> bool:
    try:
        for options in (PLAIN, EVERYTHING):
            measure(600, FLOAT32, device, options, seeds=1, launch=launch, config=BLOCKS).check()
    except ContractError:
        return True
    return False


@pytest.mark.skipif(
    not INTERPRETING, reason="broken copies are interpreted: on a GPU some of them would read what is not theirs"
)
def test_the_check_for_faults_passes_a_faithful_copy(device, tmp_path: Path):
    assert not _is_caught(device, load_broken(tmp_path, "linear_cross_entropy").cross_entropy)


@pytest.mark.skipif(
    not INTERPRETING, reason="broken copies are interpreted: on a GPU some of them would read what is not theirs"
)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_is_caught(fault, device, tmp_path: Path):
    assert _is_caught(device, load_broken(tmp_path, "linear_cross_entropy", FAULTS[fault]).cross_entropy)
