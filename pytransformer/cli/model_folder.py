"""Finds the model that a folder holds, whichever way it got there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytransformer.model.transformer import Transformer
    from pytransformer.training.tokenizer import TextTokenizer


def find_model(folder: Path) -> Path:
    """The folder with the model itself: the newest checkpoint of a training run, or ``folder`` if it holds a model directly.

    Raises:
        FileNotFoundError: there is no model, with what is missing.
        ValueError: the newest checkpoint is damaged.
    """
    from pytransformer.model.checkpoint import CONFIG_FILE
    from pytransformer.training.checkpoint import CheckpointStore
    from pytransformer.training.run import CHECKPOINTS, has_run

    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder {folder}: train one with `pytransformer train --out {folder}`")
    if has_run(folder):
        checkpoint = CheckpointStore(folder / CHECKPOINTS).latest()
        if checkpoint is not None:
            return checkpoint
        if not (folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"the run in {folder} has no complete checkpoint yet")
    elif not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds neither a training run (run.json) nor a model (config.json)")
    return folder


def check_device(device: str | None) -> None:
    """ValueError unless ``--device`` is one that is here."""
    import torch

    if device is None:
        return
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cuda", "cpu"):
        raise ValueError(f'--device must be "cuda" or "cpu", but is {device!r}')
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device} was asked for, but torch sees no GPU on this machine")


def load_model(folder: Path, device: str | None) -> tuple[Transformer, TextTokenizer]:
    """Model, in evaluation mode, and tokenizer.

    Args:
        folder: a training run or a model's own folder.
        device: by default "cuda" where there is a GPU, else "cpu".

    Raises:
        FileNotFoundError: there is no model or no tokenizer.
        ValueError: a file is damaged, they don't fit each other, or the device isn't there.
    """
    import torch

    from pytransformer.model.checkpoint import load
    from pytransformer.training.run import TOKENIZER_FILE
    from pytransformer.training.tokenizer import TextTokenizer

    check_device(device)
    place = find_model(folder)
    tokenizer = TextTokenizer.load(place / TOKENIZER_FILE)
    model = load(place, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{place}: the tokenizer has {tokenizer.vocab_size} tokens, but the model only {model.config.vocab_size}"
        )
    return model, tokenizer
