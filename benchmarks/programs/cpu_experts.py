"""A mixture of experts on a CPU: time of forward and backward beside transformers' Mixtral block, in turns in one process.

The same weights and tokens, 8 experts of which 2 serve a token. transformers has two ways: "eager", what the block does by itself, one
expert after another, and "grouped_mm", which a whole model chooses. Beside them stand the matrix products alone, of as many rows for each
expert: what no way on this machine can be faster than.

    python -m pytransformer.benchmarks.programs.cpu_experts          # writes benchmarks/results/cpu/experts.json
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pytransformer.benchmarks.harness.paths import RESULTS
from pytransformer.benchmarks.programs import cpu
from pytransformer.nn import MixtureOfExperts

RESULT = RESULTS / "cpu/experts.json"
NUM_EXPERTS, PER_TOKEN, TOKENS = 8, 2, 2048
# (hidden, expert) widths.
SIZES = ((512, 1024), (1024, 2048))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS, BLOCK, GROUPED, PRODUCTS = "pytransformer", "transformers, eager", "transformers, grouped_mm", "products alone"
LEAST_SPEEDUP = 1.5

Run = Callable[[], None]


def main() -> int:
    """Measures, prints a table, writes the JSON; 0 if each size and dtype meets the target beside transformers' own block."""
    arguments = cpu.new_parser("cpu_experts", __doc__, 15, "rounds", RESULT).parse_args()
    shape = {"experts": NUM_EXPERTS, "experts per token": PER_TOKEN, "tokens": TOKENS, "sizes": SIZES}
    result = cpu.new_result(shape, arguments.threads)
    result["speedups"] = {}
    code = 0
    for sizes in SIZES:
        for dtype in DTYPES:
            code |= measure(result, sizes, dtype, arguments.rounds)
    cpu.write(arguments.out, result)
    return code


def measure(result: dict[str, Any], sizes: tuple[int, int], dtype: str, rounds: int) -> int:
    """Adds the rows of one size and dtype; 0 if the target is met."""
    torch.manual_seed(0)
    runs = make_runs(sizes, DTYPES[dtype])
    samples: dict[str, list[float]] = {name: [] for name in runs}
    warm_up = 2
    for index in range(warm_up + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if index >= warm_up:
                samples[name].append(time.perf_counter() - start)
        cpu.show_progress("round", index + 1, warm_up + rounds)
    title = f"{sizes[0]} × {sizes[1]}, {dtype}"
    medians = {
        name: cpu.add_row(
            result, f"{name}, {title}", seconds, unit="pass", tokens=TOKENS, samples="seconds", sizes=sizes, dtype=dtype
        ).median
        for name, seconds in samples.items()
    }
    speedups = {name: medians[name] / medians[OURS] for name in (BLOCK, GROUPED, PRODUCTS)}
    result["speedups"][title] = speedups
    print(
        f"{title}: {', '.join(f'{value:.2f} × {name}' for name, value in speedups.items())} (target {LEAST_SPEEDUP} × eager)\n"
    )
    return 0 if speedups[BLOCK] >= LEAST_SPEEDUP else 1


def make_runs(sizes: tuple[int, int], dtype: torch.dtype) -> dict[str, Run]:
    """Forward and backward, by name; all of them begin without gradients, and blocks of the same weights give the same output."""
    hidden, expert = sizes
    ours = MixtureOfExperts(hidden, expert, NUM_EXPERTS, PER_TOKEN, dtype=dtype)
    # As a model begins: GPT-2's 0.02. torch's uniform start would do as well.
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x, dout = torch.randn(1, TOKENS, hidden, dtype=dtype), torch.randn(1, TOKENS, hidden, dtype=dtype)
    blocks = {OURS: ours, BLOCK: their_block(ours, sizes, "eager"), GROUPED: their_block(ours, sizes, "grouped_mm")}
    check_same(blocks, x)
    return {
        **{name: forward_and_backward(block, x, dout) for name, block in blocks.items()},
        PRODUCTS: products(sizes, dtype),
    }


def their_block(ours: MixtureOfExperts, sizes: tuple[int, int], way: str) -> Any:
    """transformers' block with our weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=sizes[0], intermediate_size=sizes[1], num_local_experts=NUM_EXPERTS, num_experts_per_tok=PER_TOKEN
    )
    config._experts_implementation = way
    block = MixtralSparseMoeBlock(config)
    names = {"router.weight": "gate.weight"}
    block.load_state_dict({names.get(name, name): value for name, value in ours.state_dict().items()})
    return block.to(ours.router.weight.dtype)


def check_same(blocks: dict[str, Any], x: Tensor) -> None:
    """All blocks compute the same: what is slower because it does something else is no comparison."""
    with torch.no_grad():
        outputs = {name: block(x) for name, block in blocks.items()}
    for name, output in outputs.items():
        if not torch.allclose(output, outputs[OURS], rtol=0.05, atol=0.02 * float(outputs[OURS].abs().max())):
            raise SystemExit(f"{name} computes something else")


def forward_and_backward(block: Any, x: Tensor, dout: Tensor) -> Run:
    """One pass, with gradients of the input and of all weights, as the first of an optimizer's step."""
    leaf = x.clone().requires_grad_()

    def run() -> None:
        leaf.grad = None
        for parameter in block.parameters():
            parameter.grad = None
        block(leaf).backward(dout)

    return run


def products(sizes: tuple[int, int], dtype: torch.dtype) -> Run:
    """The six products of each expert with an even share of the rows, into tensors that are there: two forward, four backward."""
    hidden, expert = sizes
    rows = TOKENS * PER_TOKEN // NUM_EXPERTS
    x, inner, active = (torch.randn(rows, width, dtype=dtype) for width in (hidden, 2 * expert, expert))
    first, down = (torch.randn(NUM_EXPERTS, *shape, dtype=dtype) for shape in ((2 * expert, hidden), (hidden, expert)))
    dfirst, ddown, out = torch.empty_like(first[0]), torch.empty_like(down[0]), torch.empty_like(x)
    inner_out, active_out = torch.empty_like(inner), torch.empty_like(active)

    def run() -> None:
        with torch.no_grad():
            for index in range(NUM_EXPERTS):
                torch.mm(x, first[index].t(), out=inner_out)
                torch.mm(active, down[index].t(), out=out)
                torch.mm(x, down[index], out=active_out)
                torch.mm(x.t(), active, out=ddown)
                torch.mm(inner, first[index], out=out)
                torch.mm(inner.t(), x, out=dfirst)

    return run


if __name__ == "__main__":
    raise SystemExit(main())
