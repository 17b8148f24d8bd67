"""Cross-entropy of rows of logits, and their gradient written over them.

    lse = log Σ exp(s),  s = softcap(logits + bias)
    loss = (1 - label_smoothing) · (lse - s[target]) + label_smoothing · mean(lse - s) + z_loss · lse²
    dlogits = dloss · ((1 + 2 · z_loss · lse) · softmax(s) - (1 - label_smoothing) · onehot - label_smoothing / vocab_size) · softcap'

The linear head around it stays with the vendor's matrix product, which no kernel of ours would beat: of a chunk of tokens at a time the
logits are computed into one buffer, this kernel turns the buffer into their gradient, and two more products make dx and dweight of it
(``pytransformer/ops/linear_cross_entropy/by_triton.py``). So all logits never exist together.

Cost for T rows of V 16-bit logits: 2·T·V bytes for the losses alone; with the gradient 2·T·V more written, and 2·T·V read a second time,
from L2. About 3 exponentials per logit and a dozen FLOP: memory-bound, and 3 % of the time of the three products (6·T·V·H FLOP) at a
hidden size of 4096.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import COMMON_OPTIONS, cdiv, next_power_of_2, on_device
from .mathematics import LOG2E, tanh
from .prepared import check_capture

# Rows of the buffer start at multiples of this many elements, so that 128-bit accesses and the matrix products' loads are aligned
# whatever the vocabulary's size.
ROW_ALIGNMENT = 64

# ------------------------------------------------------------------------------------------------------------------ launch policy


@dataclass(frozen=True)
class CrossEntropyConfig:
    """Columns that a program of ``num_warps`` warps takes at a time."""

    block_cols: int
    num_warps: int


def cross_entropy_config(vocab_size: int) -> CrossEntropyConfig:
    """A row per program, 16 logits a thread: two 128-bit loads of 16-bit data in flight."""
    # A row is read twice and should still be in L2 the second time. Of rows with more than 64k words (128 KB and more) at most two may be
    # under way per SM: 32 warps each. Shorter ones may be more, each with fewer warps that wait for each other. 32 logits a thread would
    # spill with all options on.
    widest = 16384 if vocab_size > 65536 else 8192
    block_cols = max(512, min(widest, next_power_of_2(vocab_size)))
    return CrossEntropyConfig(block_cols, block_cols // 512)


# ------------------------------------------------------------------------------------------------------------------------ kernel


@triton.jit
def _capped(
    logits,
    bias_ptr,
    cols,
    vocab_size,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT_TANH: tl.constexpr,
    WHOLE: tl.constexpr = False,
):
    """float32 logits with bias and softcap; -inf behind the vocabulary's end, before which all of them are where ``WHOLE``."""
    inside = cols < vocab_size
    values = logits.to(tl.float32)
    if HAS_BIAS:
        if WHOLE:
            values += tl.load(bias_ptr + cols).to(tl.float32)
        else:
            values += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        values = softcap * tanh(values / softcap, EXACT_TANH)
    if not WHOLE:
        values = tl.where(inside, values, float("-inf"))
    return values


@triton.jit
def _load_logits(ptrs, cols, padded_size, WHOLE: tl.constexpr, EVICTION: tl.constexpr):
    """Behind the vocabulary's end the buffer holds anything; to load it too keeps the mask a multiple of the vector width."""
    if WHOLE:
        logits = tl.load(ptrs, eviction_policy=EVICTION)
    else:
        logits = tl.load(ptrs, mask=cols < padded_size, other=0.0, eviction_policy=EVICTION)
    return logits


@triton.jit
def _exp(x):
    """e^x by the hardware's 2^x. Results below 2^-126 are 0, which spares the three instructions that scale them."""
    return tl.exp2(x * LOG2E)


@triton.jit
def _softcap_slope(capped, softcap):
    """d softcap(s) / ds from the capped logit: 1 - tanh²."""
    ratio = capped / softcap
    return 1.0 - ratio * ratio


@triton.jit
def _finite(maximum):
    """A maximum to subtract before exp: of infinite ones the difference would be NaN, where exp(-inf) = 0 and exp(inf) = inf are right."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)


@triton.jit
def _with_block(
    state,
    logits_row,
    start,
    bias_ptr,
    vocab_size,
    padded_size,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT_TANH: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """``state`` = (maxima, sums of exponentials less those, plain sums) of all groups, with one more block of logits."""
    maxima, totals, plain_sums = state
    cols = start + tl.arange(0, BLOCK_COLS)
    logits = _load_logits(logits_row + cols, cols, padded_size, WHOLE, "evict_last")
    values = _capped(logits, bias_ptr, cols, vocab_size, softcap, HAS_BIAS, HAS_SOFTCAP, EXACT_TANH, WHOLE)
    grouped = tl.reshape(values, [BLOCK_COLS // GROUP, GROUP])
    if HAS_SMOOTHING:
        inside = values if WHOLE else tl.where(cols < vocab_size, values, 0.0)
        plain_sums += tl.sum(tl.reshape(inside, [BLOCK_COLS // GROUP, GROUP]), axis=1)
    before = maxima
    maxima = tl.maximum(before, tl.max(grouped, axis=1))
    shifts = _finite(maxima)
    totals = totals * _exp(before - shifts) + tl.sum(_exp(grouped - shifts[:, None]), axis=1)
    return maxima, totals, plain_sums


@triton.jit
def _write_gradient(
    logits_row,
    start,
    bias_ptr,
    vocab_size,
    padded_size,
    shift,
    factor,
    everywhere,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT_TANH: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Overwrites a block of logits with ``(factor · exp(s - shift) - everywhere) · softcap'``, which lacks the target's share."""
    cols = start + tl.arange(0, BLOCK_COLS)
    logits = _load_logits(logits_row + cols, cols, padded_size, WHOLE, "evict_first")
    values = _capped(logits, bias_ptr, cols, vocab_size, softcap, HAS_BIAS, HAS_SOFTCAP, EXACT_TANH, WHOLE)
    gradient = _exp(values - shift) * factor
    if HAS_SMOOTHING:
        gradient -= everywhere
    if HAS_SOFTCAP:
        gradient *= _softcap_slope(values, softcap)
    gradient = gradient.to(logits_row.dtype.element_ty)
    if WHOLE:
        tl.store(logits_row + cols, gradient)
    else:
        tl.store(logits_row + cols, gradient, mask=cols < padded_size)


@triton.jit
def cross_entropy_kernel(
    logits_ptr,
    stride_logits_row,
    bias_ptr,
    targets_ptr,
    dlosses_ptr,
    losses_ptr,
    vocab_size,
    padded_size,
    ignore_index,
    label_smoothing,
    softcap,
    z_loss,
    HAS_BIAS: tl.constexpr,
    HAS_DLOSSES: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT_TANH: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One row per program: a loop for maximum and sum, a second one that overwrites the logits with their gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * stride_logits_row
    lanes = tl.arange(0, BLOCK_COLS)
    target = tl.load(targets_ptr + row).to(tl.int64)
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if WANTS_GRADIENT:
            zeros = tl.zeros([BLOCK_COLS], logits_ptr.dtype.element_ty)
            for start in range(0, padded_size, BLOCK_COLS):
                tl.store(logits_row + start + lanes, zeros, mask=start + lanes < padded_size)
    else:
        # A target that is no word of the vocabulary (never read back to the host) gives NaN, loss and gradient. Its logit is read before
        # other threads overwrite it: the reductions in between are barriers.
        is_word = (target >= 0) & (target < vocab_size)
        at_target = tl.load(logits_row + target, mask=is_word, other=float("nan"))
        at_target = _capped(
            at_target, bias_ptr, tl.where(is_word, target, 0), vocab_size, softcap, HAS_BIAS, HAS_SOFTCAP, EXACT_TANH
        )

        # Each group of neighbours, which one thread holds, keeps a maximum and a sum of its own: threads meet once, after the loop.
        maxima = tl.full([BLOCK_COLS // GROUP], float("-inf"), tl.float32)
        totals = tl.zeros([BLOCK_COLS // GROUP], tl.float32)
        plain_sums = tl.zeros([BLOCK_COLS // GROUP], tl.float32)
        # Blocks before the vocabulary's end need no masks; what is left is at most one block.
        whole_end = vocab_size // BLOCK_COLS * BLOCK_COLS
        state = maxima, totals, plain_sums
        for start in range(0, whole_end, BLOCK_COLS):
            state = _with_block(
                state, logits_row, start, bias_ptr, vocab_size, padded_size, softcap, HAS_BIAS, HAS_SMOOTHING,
                HAS_SOFTCAP, EXACT_TANH, BLOCK_COLS, GROUP, True,
            )  # fmt: skip
        if whole_end < padded_size:
            state = _with_block(
                state, logits_row, whole_end, bias_ptr, vocab_size, padded_size, softcap, HAS_BIAS, HAS_SMOOTHING,
                HAS_SOFTCAP, EXACT_TANH, BLOCK_COLS, GROUP, False,
            )  # fmt: skip
        maxima, totals, plain_sums = state

        maximum = tl.max(maxima, axis=0)
        shift = _finite(maximum)
        # A group of nothing but -inf has the sum 0 and a shift that says nothing.
        total = tl.sum(tl.where(maxima == float("-inf"), totals, totals * _exp(_finite(maxima) - shift)), axis=0)
        log_total = tl.log(total)
        lse = shift + log_total
        # The small part is added last: lse itself would lose it where logits are large.
        loss = (1.0 - label_smoothing) * (log_total + (shift - at_target)) + z_loss * lse * lse
        if HAS_SMOOTHING:
            loss += label_smoothing * (log_total + (shift - tl.sum(plain_sums, axis=0) / vocab_size))
        tl.store(losses_ptr + row, loss)

        if WANTS_GRADIENT:
            dloss = 1.0
            if HAS_DLOSSES:
                dloss = tl.load(dlosses_ptr + row).to(tl.float32)
            dloss = tl.where(is_word, dloss, float("nan"))
            factor = dloss * (1.0 + 2.0 * z_loss * lse) / total
            everywhere = dloss * (label_smoothing / vocab_size)
            onehot = dloss * (1.0 - label_smoothing)
            for start in range(0, whole_end, BLOCK_COLS):
                _write_gradient(
                    logits_row, start, bias_ptr, vocab_size, padded_size, shift, factor, everywhere, softcap,
                    HAS_BIAS, HAS_SMOOTHING, HAS_SOFTCAP, EXACT_TANH, BLOCK_COLS, True,
                )  # fmt: skip
            if whole_end < padded_size:
                _write_gradient(
                    logits_row, whole_end, bias_ptr, vocab_size, padded_size, shift, factor, everywhere, softcap,
                    HAS_BIAS, HAS_SMOOTHING, HAS_SOFTCAP, EXACT_TANH, BLOCK_COLS, False,
                )  # fmt: skip
            # One logit is the target: to look for it among all would cost a third of the loop.
            tl.debug_barrier()
            gradient = _exp(at_target - shift) * factor
            if HAS_SMOOTHING:
                gradient -= everywhere
            gradient -= onehot
            if HAS_SOFTCAP:
                gradient *= _softcap_slope(at_target, softcap)
            tl.store(logits_row + target, gradient.to(logits_ptr.dtype.element_ty), mask=is_word)


# ---------------------------------------------------------------------------------------------------------------------- launcher


def logits_buffer(rows: int, vocab_size: int, like: Tensor) -> Tensor:
    """(rows, vocab_size rounded up to a multiple of :data:`ROW_ALIGNMENT`) of the dtype and device of ``like``, uninitialised."""
    padded_size = cdiv(vocab_size, ROW_ALIGNMENT) * ROW_ALIGNMENT
    return torch.empty(rows, padded_size, dtype=like.dtype, device=like.device)


def cross_entropy(
    logits: Tensor,
    vocab_size: int,
    targets: Tensor,
    bias: Tensor | None,
    dlosses: Tensor | None,
    losses: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    wants_gradient: bool,
    config: CrossEntropyConfig | None = None,
) -> None:
    """Launches the kernel: writes ``losses`` and, if wanted, the gradient of ``Σ dlosses · losses`` over the logits.

    Args:
        logits: a :func:`logits_buffer`, float32, float16 or bfloat16; its columns behind ``vocab_size`` may hold anything, and do after.
        vocab_size: columns that are logits.
        targets: (rows) int32 or int64, contiguous.
        bias: (vocab_size), contiguous, added in float32; None = 0.
        dlosses: (rows) float32, contiguous; None = 1.
        losses: (rows) float32, contiguous, overwritten.
        ignore_index, label_smoothing, softcap (0 = none), z_loss: see the formulas above.
        wants_gradient: otherwise the logits are left as they are.
        config: overrides the launch policy, for tests.
    """
    rows, padded_size = logits.shape
    if rows == 0:
        return
    config = config or cross_entropy_config(vocab_size)
    has_options = bias is not None or label_smoothing > 0 or softcap > 0
    arguments = (
        logits, logits.stride(0), bias, targets, dlosses, losses,
        vocab_size, padded_size, ignore_index, label_smoothing, softcap, z_loss,
    )  # fmt: skip
    constants = {
        "HAS_BIAS": bias is not None,
        "HAS_DLOSSES": dlosses is not None,
        "HAS_SMOOTHING": label_smoothing > 0,
        "HAS_SOFTCAP": softcap > 0,
        "EXACT_TANH": logits.dtype == torch.float32,
        "WANTS_GRADIENT": wants_gradient,
        "BLOCK_COLS": config.block_cols,
        "GROUP": 16 // logits.element_size(),  # as many as one 128-bit load brings
        "num_warps": config.num_warps,
        # Two programs of 32 warps on an SM, or three of 16: without options nothing is spilled for it.
        "maxnreg": None if has_options else 32 if config.num_warps == 32 else 40,
        **COMMON_OPTIONS,
    }
    with on_device(logits):
        check_capture(cross_entropy_kernel, (rows,), arguments, constants, logits.get_device())
        cross_entropy_kernel[(rows,)](*arguments, **constants)
