"""Finds the model that a folder holds, whichever way it got there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytransformer.model.transformer import Transformer
    from pytransformer.text import Tokenizer


def find_model(folder: Path) -> Path:
    """The folder with the model itself: the newest checkpoint of a training run, or ``folder`` if it holds a model directly.

    Raises:
        FileNotFoundError: there is no model, with what is missing.
        NotADirectoryError: it is a file.
        ValueError: the newest checkpoint is damaged.
    """
    from pytransformer.model.checkpoint import CONFIG_FILE
    from pytransformer.training.checkpoint import CheckpointStore
    from pytransformer.training.run import CHECKPOINTS, has_run

    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: give the folder that holds the model")
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


def read_text(path: Path, option: str) -> str:
    """The text of a file that was given by ``option``; ValueError that names both unless it is UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{option} {path} must be UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error


def load_model(folder: Path, device: str | None, dtype: str | None = None) -> tuple[Transformer, Tokenizer]:
    """Model, in evaluation mode, and tokenizer, that of a training run or a public one.

    Args:
        folder: a training run or a model's own folder.
        device: by default "cuda" where there is a GPU, else "cpu".
        dtype: name of the weights' dtype; by default as the folder has them.

    Raises:
        FileNotFoundError: there is no model or no tokenizer.
        ValueError: a file is damaged, they don't fit each other, or the device isn't there.
    """
    import torch

    from pytransformer.model.checkpoint import load
    from pytransformer.text import Tokenizer

    check_device(device)
    place = find_model(folder)
    tokenizer = Tokenizer.load(place)
    model = load(
        place,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=None if dtype is None else getattr(torch, dtype),
    )
    # Tokens that were added later may lie beyond a public model's embedding (Gemma 3's for images); encode() looks at the ids of a prompt.
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{place}: the tokenizer has {tokenizer.vocab_size} tokens, but the model only {model.config.vocab_size}"
        )
    return model, tokenizer


def encode(model: Transformer, tokenizer: Tokenizer, prompt: str, option: str = "--prompt") -> list[int]:
    """The ids of a prompt that was given by an option, with what the model wants around a text.

    Raises:
        ValueError: a token that the model has no embedding for.
    """
    ids = tokenizer.encode(prompt)
    check_vocabulary(model, tokenizer, ids, option)
    return ids


def check_vocabulary(model: Transformer, tokenizer: Tokenizer, ids: list[int], option: str) -> None:
    """ValueError, naming the option that the text came by, for a token that the model has no embedding for."""
    config = model.config
    vocab_size = config.src_vocab_size if config.is_encoder_decoder else config.vocab_size
    for token_id in ids:
        if token_id >= vocab_size:
            raise ValueError(
                f"{option} has the token {tokenizer.label(token_id)!r} of id {token_id}, but the model's vocabulary is "
                f"{vocab_size}"
            )
