"""Cross-entropy on a linear head: loss alone, and with the gradients of x and the weight, at Llama's and other large vocabularies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import pytransformer
from pytransformer.benchmarks.definitions.cases import LinearCrossEntropyCase
from pytransformer.benchmarks.harness.rows import Inputs, Row, Variant
from pytransformer.benchmarks.suites.common import Wanted, all_variants, generator, no_grad, normal

QUICK = (LinearCrossEntropyCase(8192, 4096, 128256),)
FULL = (
    LinearCrossEntropyCase(16384, 768, 50304),  # GPT-2
    LinearCrossEntropyCase(8192, 4096, 128256, both=False),
    LinearCrossEntropyCase(16384, 768, 50304, both=False),
    LinearCrossEntropyCase(8192, 2304, 256000),  # Gemma 2 2B
    LinearCrossEntropyCase(32768, 4096, 32000),  # Llama 2
)
TINY = (LinearCrossEntropyCase(48, 64, 160), LinearCrossEntropyCase(48, 64, 160, both=False))
CHECKED_TOKENS = 32
CHECKED_WORDS = 32
# float64 logits held at once: 512 MB.
CHUNK_ELEMENTS = 2**26


def rows(wanted: Wanted) -> Iterator[Row]:
    """The target's row, then other vocabularies and the loss alone."""
    for case in TINY if wanted.tiny else QUICK:
        yield _row(wanted, case, 0)
    for case in () if wanted.tiny else FULL:
        yield _row(wanted, case, 1)


def draw(case: LinearCrossEntropyCase, device: torch.device, seed: int) -> Inputs:
    """Logits of unit variance, as a model that has begun to learn has them."""
    targets = torch.randint(case.vocab_size, (case.tokens,), device=device, generator=generator(device, seed))
    weight = normal(device, 2 * seed + 1, case.vocab_size, case.hidden_size) * case.hidden_size**-0.5
    return {
        "x": normal(device, 2 * seed, case.tokens, case.hidden_size).requires_grad_(case.both),
        "weight": weight.requires_grad_(case.both),
        "targets": targets,
    }


def _golden(case: LinearCrossEntropyCase, inputs: Inputs) -> Tensor:
    """The loss; with gradients also dx of the last tokens and dweight of the last words and of a few targets."""
    x, weight, targets = inputs["x"].detach(), inputs["weight"].detach().double(), inputs["targets"]
    words = _words(case, x.device)
    # Both gradients are of a mean; times the number of tokens they are of the size of x and the weight.
    dweight = torch.zeros(len(words), case.hidden_size, dtype=torch.float64, device=x.device)
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    dx = torch.empty(0)
    for rows_of_x, wanted in zip(*(tensor.split(_chunk(case)) for tensor in (x, targets))):
        wide = rows_of_x.double()
        logits = wide @ weight.T
        lse = logits.logsumexp(-1, keepdim=True)
        loss += (lse[:, 0] - logits.gather(1, wanted[:, None])[:, 0]).sum()
        if case.both:
            dweight += ((logits[:, words] - lse).exp() - (wanted[:, None] == words).double()).T @ wide
            dlogits = (logits[-CHECKED_TOKENS:] - lse[-CHECKED_TOKENS:]).exp()
            dlogits[torch.arange(len(dlogits)), wanted[-CHECKED_TOKENS:]] -= 1
            dx = dlogits @ weight
    if not case.both:
        return loss[None] / case.tokens
    return _parts(case, loss / case.tokens, dx / case.tokens, dweight / case.tokens)


def _chunk(case: LinearCrossEntropyCase) -> int:
    """Tokens whose logits are held at once; the last chunk is a full one, because dx is checked at its end."""
    chunk = max(1, CHUNK_ELEMENTS // case.vocab_size)
    while chunk > CHECKED_TOKENS and case.tokens % chunk:
        chunk -= 1
    return min(chunk, case.tokens)


def _words(case: LinearCrossEntropyCase, device: torch.device) -> Tensor:
    return torch.arange(case.vocab_size - CHECKED_WORDS, case.vocab_size, device=device)


def _parts(case: LinearCrossEntropyCase, loss: Tensor, dx: Tensor, dweight: Tensor) -> Tensor:
    """Loss and gradients in one vector, scaled so that an error in any of them shows in the norm of all."""
    scaled_dx = dx.double() * case.tokens
    # A word is the target of tokens / vocab_size tokens; each adds a row of x, of length √hidden_size.
    times = max(case.tokens / case.vocab_size, 1.0) ** 0.5
    scaled_dweight = dweight.double() * case.tokens / (times * case.hidden_size**0.5)
    return torch.cat((loss.double()[None], scaled_dx.flatten(), scaled_dweight.flatten()))


def _row(wanted: Wanted, case: LinearCrossEntropyCase, priority: int) -> Row:
    def ours(backend: str | None) -> Variant:
        return lambda inputs: pytransformer.linear_cross_entropy(
            inputs["x"], inputs["weight"], inputs["targets"], backend=backend
        )

    def with_gradients(call: Variant) -> Variant:
        def both(inputs: Inputs) -> Any:
            loss = call(inputs)
            return (loss, *torch.autograd.grad(loss, (inputs["x"], inputs["weight"])))

        return both

    def pick(result: Any) -> Tensor:
        if not case.both:
            return result[None]
        loss, dx, dweight = result
        return _parts(case, loss.detach(), dx[-CHECKED_TOKENS:], dweight[-CHECKED_WORDS:])

    calls, notes = all_variants(wanted, "linear_cross_entropy", case, ours)
    variants = {name: with_gradients(call) if case.both else no_grad(call) for name, call in calls.items()}
    return Row(
        case.row_op,
        case.shape,
        case.flop,
        case.moved_bytes,
        lambda device, seed: draw(case, device, seed),
        variants,
        lambda inputs: _golden(case, inputs),
        pick,
        notes=notes,
        priority=priority,
    )
