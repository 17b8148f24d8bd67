"""Speculative decoding on a CPU: tokens per second with prompt-lookup against plain decoding, on the demo's text.

The model is the demo's (`make demo`), the prompts are stretches of the text that it was not trained on, evenly spread over it, each
continued greedily up to the end of the model's context. Both sides are the public ``generate`` with packed weights, in turns: each prompt
plainly, then with proposals, again and again. The tokens must be the same, or there is no result.

    python -m pytransformer.benchmarks.programs.cpu_speculative            # writes benchmarks/results/cpu/speculative.json
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytransformer import Transformer
from pytransformer.benchmarks.harness.paths import RESULTS
from pytransformer.benchmarks.programs import cpu
from pytransformer.generation import Generation, PromptLookup, generate
from pytransformer.model.checkpoint import load
from pytransformer.text import Tokenizer
from pytransformer.training import corpus
from pytransformer.training.checkpoint import CheckpointStore
from pytransformer.training.run import CHECKPOINTS

RESULT = RESULTS / "cpu/speculative.json"
LEAST_SPEEDUP = 1.5
PLAIN, SPECULATIVE = "plain", "prompt-lookup"


def main() -> int:
    """Measures, prints a table, writes the JSON; 0 if the target is met."""
    parser = cpu.new_parser("cpu_speculative", __doc__, 5, "passes over all prompts", RESULT)
    parser.add_argument("--model", type=Path, default=Path("runs/demo"), help="folder of the demo's training run")
    parser.add_argument("--prompts", type=int, default=16, help="stretches of text that are continued")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens of each")
    parser.add_argument("--max-ngram", type=int, default=PromptLookup.max_ngram, help="longest run that is looked for")
    parser.add_argument("--num-tokens", type=int, default=PromptLookup.num_tokens, help="tokens proposed at a time")
    arguments = parser.parse_args()
    checkpoint = CheckpointStore(arguments.model / CHECKPOINTS).latest()
    if checkpoint is None:
        raise SystemExit(
            f"{arguments.model} holds no training run with a checkpoint: `make demo` trains one, --model names another"
        )
    model, tokenizer = load(checkpoint, device="cpu"), Tokenizer.load(checkpoint)
    result = cpu.new_result(
        f"the demo's model, {model.num_parameters()} parameters, float32, batch 1", arguments.threads
    )
    prompts = find_prompts(tokenizer, arguments.prompts, arguments.prompt_tokens)
    draft = PromptLookup(arguments.max_ngram, arguments.num_tokens)
    result |= {"max_ngram": draft.max_ngram, "num_tokens": draft.num_tokens, "prompt_tokens": arguments.prompt_tokens}
    result |= check_same_tokens(model, prompts, draft)
    code = report(result, measure(model, prompts, draft, arguments.rounds))
    cpu.write(arguments.out, result)
    return code


def find_prompts(tokenizer: Tokenizer, count: int, length: int) -> list[Tensor]:
    """Stretches of ``length`` tokens of the standard library's files that the demo holds out, each from the middle of a file."""
    _, held_out = corpus.split_files(corpus.standard_library_files(), 0.05)
    found = []
    for file in held_out:
        ids = tokenizer(corpus.read_text(file)).input_ids
        if len(ids) >= 2 * length:
            found.append(torch.tensor(ids[len(ids) // 2 :][:length]))
    if len(found) < count:
        raise SystemExit(
            f"the text has {len(found)} files of at least {2 * length} tokens, {count} prompts were asked for"
        )
    return [found[index * len(found) // count] for index in range(count)]


def continued(model: Transformer, prompt: Tensor, draft: PromptLookup | None) -> Generation:
    """The prompt and its greedy continuation up to the end of the context."""
    return generate(model, prompt, model.config.max_seqlen, draft=draft, eos_token_id=(), pack_weights=True)


def check_same_tokens(model: Transformer, prompts: Sequence[Tensor], draft: PromptLookup) -> dict[str, Any]:
    """What was proposed and accepted; a fast wrong decoder is not a result."""
    drafted = accepted = count = 0
    for index, prompt in enumerate(prompts):
        plain, found = continued(model, prompt, None), continued(model, prompt, draft)
        if not torch.equal(torch.as_tensor(plain.token_ids), torch.as_tensor(found.token_ids)):
            raise SystemExit(f"prompt {index} gets other tokens: {found.token_ids} and plainly {plain.token_ids}")
        assert found.drafted is not None and found.accepted is not None
        drafted, accepted, count = drafted + found.drafted[0], accepted + found.accepted[0], count + found.new_tokens[0]
    return {
        "same_tokens": count,
        "drafted": drafted,
        "accepted": accepted,
        "tokens_per_pass": count / (count - accepted),
    }


def measure(
    model: Transformer, prompts: Sequence[Tensor], draft: PromptLookup, rounds: int
) -> dict[str, list[list[float]]]:
    """Seconds of each round and prompt, plain and speculative by turns. Packing is not part of it: weights are kept for later calls."""
    seconds: dict[str, list[list[float]]] = {PLAIN: [], SPECULATIVE: []}
    for index in range(rounds):
        for times in seconds.values():
            times.append([])
        for prompt in prompts:
            for name, proposer in ((PLAIN, None), (SPECULATIVE, draft)):
                # Weights are packed for the number of rows of a pass, which differs: once before the clock starts.
                generate(model, prompt, 1, draft=proposer, pack_weights=True)
                started = time.perf_counter()
                continued(model, prompt, proposer)
                seconds[name][-1].append(time.perf_counter() - started)
        cpu.show_progress("round", index + 1, rounds)
    return seconds


def report(result: dict[str, Any], seconds: dict[str, list[list[float]]]) -> int:
    """Adds the rows to the result; 0 if the target is met."""
    tokens = result["same_tokens"]
    medians = {}
    for name, rounds in seconds.items():
        totals = [sum(times) for times in rounds]
        timing = cpu.add_row(result, name, totals, unit="round", tokens=tokens, samples="rounds", prompts=rounds)
        medians[name] = timing.median
    speedup = medians[PLAIN] / medians[SPECULATIVE]
    result["speedup_over_plain"] = speedup
    share = result["accepted"] / max(result["drafted"], 1)
    print(
        f"\n{tokens} tokens, the same; {share:.0%} of {result['drafted']} proposals accepted, {result['tokens_per_pass']:.2f} tokens a pass"
    )
    print(f"{speedup:.2f} × plain decoding (target {LEAST_SPEEDUP})")
    return 0 if speedup >= LEAST_SPEEDUP else 1


if __name__ == "__main__":
    raise SystemExit(main())
