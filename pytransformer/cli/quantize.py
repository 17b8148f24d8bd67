"""``pytransformer quantize``: a model's folder with its linear layers as 8- or 4-bit codes, and what that costs on a text."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytransformer.cli.convert import copy_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from pytransformer.model.transformer import Transformer

METHODS = ("rtn", "gptq")
GROUP_SIZE = 64
# Tokens that a text is cut into pieces of, unless the model takes fewer; and most tokens of the calibration text that are read.
_WINDOW = 512
_CALIBRATION_TOKENS = 128 * 512


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers the subcommand."""
    parser = subparsers.add_parser(
        "quantize",
        help="write a model with weights of 8 or 4 bits",
        description=(
            "Reads a model, ours or of Hugging Face's layout, and writes it in our own layout with codes for the weights of its linear "
            "layers, beside the files of its tokenizer. Prints the memory before and after, and with --text the perplexity."
        ),
    )
    parser.add_argument("source", type=Path, metavar="FOLDER", help="a model's folder, or a training run's")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="OUT", help="the folder to write, which must not hold a model"
    )
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8, help="of a weight (default 8)")
    parser.add_argument(
        "--group-size", type=int, metavar="N", help=f"columns with one scale, with 4 bits (default {GROUP_SIZE})"
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="rtn",
        help="rtn: each weight to the nearest code (default); gptq: by the inputs that a calibration text makes",
    )
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="text for gptq")
    parser.add_argument("--act-order", action="store_true", help="gptq: columns with the largest inputs first")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text whose perplexity is compared, another one")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Quantises, compares and writes.

    Raises:
        ValueError: an option that is wrong or missing, a model that cannot be quantised so, a text with too few tokens.
        FileExistsError: the target holds a model.
        FileNotFoundError: the source holds none, or there is no such text.
    """
    if (arguments.method == "gptq") != (arguments.calibration is not None):
        raise ValueError("--calibration FILE and --method gptq go together")
    if arguments.act_order and arguments.method != "gptq":
        raise ValueError("--act-order is for --method gptq")

    from pytransformer.cli.model_folder import find_model, read_text
    from pytransformer.model.checkpoint import CONFIG_FILE, load, save
    from pytransformer.model.quantized import memory_of, quantize
    from pytransformer.nn.quantized import check_bits

    if arguments.bits == 8 and arguments.group_size is not None:
        raise ValueError(f"--group-size {arguments.group_size} is for --bits 4: with 8 bits each row has a scale")
    group_size = GROUP_SIZE if arguments.group_size is None else arguments.group_size
    check_bits(arguments.bits, group_size)
    source = find_model(arguments.source)
    if (arguments.out / CONFIG_FILE).exists():
        raise FileExistsError(f"{arguments.out} holds a model already; give another folder")
    texts = {name: read_text(path, f"--{name}") for name in ("calibration", "text") if (path := vars(arguments)[name])}
    model = load(source, device="cpu")
    _check_texts(model, texts)
    windows = {name: windows_of(model, source, name, text) for name, text in texts.items()}
    before = memory_of(model), perplexity(model, windows.get("text"))
    quantizer = None
    if arguments.method == "gptq":
        from pytransformer.model.gptq import gptq

        batches = windows["calibration"][: max(1, _CALIBRATION_TOKENS // windows["calibration"][0].shape[1])]
        quantizer = gptq(model, batches, arguments.bits, group_size=group_size, act_order=arguments.act_order)
    quantize(model, arguments.bits, group_size=group_size, quantizer=quantizer)
    after = memory_of(model), perplexity(model, windows.get("text"))
    save(model, arguments.out)
    copy_tokenizer(source, arguments.out)
    print(f"memory      {before[0] / 1e6:10.2f} MB  -> {after[0] / 1e6:10.2f} MB ({after[0] / before[0]:.1%})")
    if before[1] is not None and after[1] is not None:
        print(f"perplexity  {before[1]:10.4f}     -> {after[1]:10.4f}    ({after[1] / before[1] - 1:+.2%})")
    print(arguments.out)
    return 0


def _check_texts(model: Transformer, texts: Mapping[str, str]) -> None:
    """ValueError for a text where the model does not predict each next token of it."""
    config = model.config
    if texts and (config.architecture != "decoder" or config.head != "lm" or not config.causal):
        names = " and ".join(f"--{name}" for name in texts)
        raise ValueError(
            f"{names}: a text's next tokens are predicted by a decoder with a language-model head, this model is "
            f"{config.architecture!r} with the head {config.head!r}; leave {'it' if len(texts) == 1 else 'them'} out"
        )


def windows_of(model: Transformer, source: Path, name: str, text: str) -> Sequence[Tensor]:
    """The text's ids in pieces (1, seqlen), each but the last of the same length, a token or two at the end left out."""
    import torch

    from pytransformer.cli.model_folder import check_vocabulary
    from pytransformer.text import Tokenizer

    tokenizer = Tokenizer.load(source)
    ids = torch.tensor(tokenizer.encode(text))
    check_vocabulary(model, tokenizer, ids.tolist(), f"--{name}")
    length = min(_WINDOW, model.config.max_seqlen)
    pieces = [piece[None] for piece in torch.split(ids, length) if len(piece) > 1]
    if not pieces:
        raise ValueError(f"--{name} has {len(ids)} tokens, at least 2 are needed")
    return pieces


def perplexity(model: Transformer, windows: Sequence[Tensor] | None) -> float | None:
    """exp of the mean loss over the tokens of all pieces but the first of each; None without a text."""
    if windows is None:
        return None

    from pytransformer.training.loss import evaluate

    pairs = [(ids[:, :-1], ids[:, 1:]) for ids in windows]
    return math.exp(evaluate(model, pairs, device=pairs[0][0].device))
