"""Writes docs/families.md: which public checkpoints are loaded and saved, and what each field of their configuration means here.

python tools/families.py             writes the page
python tools/families.py --check     fails if the page does not say what the families' tables say now
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from pytransformer.model.families import FAMILIES
from pytransformer.model.families.family import COMMON, Field, Harmless, Refused, Used

PAGE = Path(__file__).resolve().parent.parent / "docs/families.md"
TITLES = {
    "bart": "BART", "bert": "BERT", "bloom": "BLOOM", "distilbert": "DistilBERT", "falcon": "Falcon", "gemma": "Gemma",
    "gemma2": "Gemma 2", "gemma3": "Gemma 3 with vision (its text part)", "gemma3_text": "Gemma 3", "glm": "GLM-4 (2024)",
    "glm4": "GLM-4 (2025)", "gpt2": "GPT-2", "gpt_neox": "GPT-NeoX, Pythia", "gpt_oss": "GPT-OSS", "llama": "Llama 2 and 3.x",
    "marian": "Marian", "mistral": "Mistral", "mixtral": "Mixtral", "mt5": "mT5", "olmo2": "OLMo 2", "phi3": "Phi-3", "qwen2": "Qwen2",
    "qwen3": "Qwen3", "qwen3_moe": "Qwen3 with experts", "roberta": "RoBERTa", "t5": "T5 1.0 and 1.1",
}  # fmt: skip
INTRODUCTION = """# Public families

`pytransformer.load(folder)` reads these checkpoints (safetensors, whole or in shards), and `save` writes them so that transformers loads
them with equal logits. Each family is one file of data in `pytransformer/model/families/`: the fields of its configuration, two functions
that translate them, and a table of tensors that is read in both directions. The tests compare logits, gradients, greedy tokens with a
cache, padding and round trips of tiny random models with transformers 5.23. This page is made by `tools/families.py`.

Every field of a family's configuration class is one of three kinds, and a test compares the lists with the installed transformers, so that
no new field slips by: **used**; **harmless**, because it changes no number here (it is kept and written again); or **refused** unless it
has the value that is served, because it would change the mathematics. What a file holds beyond that is named in a warning and ignored, as
transformers ignores it.
"""


def page() -> str:
    """The text of docs/families.md."""
    families = sorted(FAMILIES.values(), key=lambda family: TITLES[family.name].lower())
    lines = [INTRODUCTION, "| family | `model_type` | classes |", "|---|---|---|"]
    lines += [
        f"| {TITLES[family.name]} | `{family.name}` | {', '.join(f'`{name}`' for name in family.classes)} |"
        for family in families
    ]
    lines += ["", "## Fields of every family", "", *_fields(COMMON)]
    for family in families:
        lines += ["", f"## {TITLES[family.name]}", "", *_fields(family.fields)]
        if family.ignored:
            lines.append(f"* tensors that are passed over: {', '.join(f'`{pattern}`' for pattern in family.ignored)}")
    return "\n".join(lines) + "\n"


def _fields(fields: Mapping[str, Field]) -> list[str]:
    kinds: dict[type, list[str]] = {Used: [], Harmless: [], Refused: []}
    for name, known in fields.items():
        text = f"`{name}`"
        if isinstance(known, Refused):
            text += f" other than {' or '.join(f'`{value!r}`' for value in known.allowed)} ({known.why})"
        kinds[type(known)].append(text)
    titles = {Used: "used", Harmless: "harmless", Refused: "refused"}
    return [f"* {titles[kind]}: {', '.join(texts)}" for kind, texts in kinds.items() if texts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    text = page()
    if parser.parse_args().check:
        if PAGE.read_text(encoding="utf-8") != text:
            print("docs/families.md is not what the families' tables say: run tools/families.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
