"""Runs the code of docs/paris.md, from "The capital of France is" to " Paris", and writes what it prints beneath it.

    python tools/paris_walk.py                  writes the page
    python tools/paris_walk.py --check          fails if the page does not show what its code prints now
    python tools/paris_walk.py --make FOLDER    writes the checkpoint that the page walks through
    python tools/paris_walk.py --model FOLDER   walks through another one, of the Llama kind; prints the page

Nothing is downloaded: transformers makes a Llama of three layers, trains it for a second on six sentences, and writes it as any other.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/paris.md"
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Norway": "Oslo",
}  # fmt: skip
SENTENCES = [f"The capital of {country} is {capital}." for country, capital in CAPITALS.items()]
STEPS = 60
# A block of code, and the output that stands under it after the first run.
_BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)


def make_tokenizer() -> Any:
    """Byte-level BPE in which each word of the sentences is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False, vocab_size=400
    )
    tokenizer.train_from_iterator(SENTENCES * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def make_checkpoint(folder: Path) -> None:
    """Writes a tiny Llama that knows six capitals, by transformers' own ``save_pretrained``.

    Everything is computed in float64 from numbers drawn here, so that another machine or release, which rounds otherwise, prints the same.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    end = tokenizer.eos_token
    ids = torch.tensor([tokenizer(sentence + end)["input_ids"] for sentence in SENTENCES])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def walk(page: str, folder: Path) -> str:
    """The page with what its blocks print for the checkpoint in ``folder``, run in order in one namespace."""
    namespace: dict[str, Any] = {"folder": folder}

    def run(block: re.Match[str]) -> str:
        code, printed = block["code"], io.StringIO()
        line = page.count("\n", 0, block.start("code"))
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + code, str(PAGE), "exec"), namespace)
        shown = printed.getvalue().rstrip("\n")
        return f"```python\n{code}```\n" + (f"\n```text\n{shown}\n```\n" if shown else "")

    return _BLOCK.sub(run, page)


def main() -> int:
    """Does what the head of this file says; returns 1 if the page is stale."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="fail instead of writing")
    what.add_argument("--make", metavar="FOLDER", type=Path, help="write the checkpoint")
    what.add_argument("--model", metavar="FOLDER", type=Path, help="walk through this checkpoint and print the page")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.make is not None:
        make_checkpoint(arguments.make)
        return 0
    page = PAGE.read_text(encoding="utf-8")
    if arguments.model is not None:
        print(walk(page, arguments.model))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder))
        text = walk(page, Path(folder))
    if not arguments.check:
        PAGE.write_text(text, encoding="utf-8")
    elif page != text:
        print("docs/paris.md is stale: run python tools/paris_walk.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
