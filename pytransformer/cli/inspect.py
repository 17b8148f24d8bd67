"""``pytransformer inspect``: what a model's folder holds, from its configuration and the headers of its files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from pytransformer.model.description import Description


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers the subcommand."""
    parser = subparsers.add_parser(
        "inspect",
        help="what a model's folder holds: family, shapes, parameters, memory",
        description=(
            "Shows the family, shapes, parameters and memory of a model in a folder, ours or of Hugging Face's layout, without reading "
            "its weights."
        ),
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a model's folder, or a training run's")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the table and what was decided."""
    from rich.console import Console

    from pytransformer.cli.model_folder import find_model
    from pytransformer.model.description import describe

    found = describe(find_model(arguments.folder))
    console = Console(highlight=False)
    console.print(table(found))
    for decision in found.decisions:
        console.print(decision, markup=False, style="dim", soft_wrap=True)
    return 0


def table(found: Description) -> Table:
    """A row for each fact."""
    from rich.table import Table

    rows = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts(found).items():
        rows.add_row(name, value)
    return rows


def facts(found: Description) -> dict[str, str]:
    """What is shown, by its name."""
    from pytransformer.model.quantized import parse

    config = found.config
    kind = f"{found.family} ({found.model_class})" if found.model_class else found.family
    layers = f"{config.num_layers}"
    if config.is_encoder_decoder:
        layers = f"{config.num_encoder_layers} of the encoder, {config.num_layers} of the decoder"
    sliding = sum(config.window(layer)[0] >= 0 for layer in range(config.num_layers))
    if sliding:
        layers += f", {sliding} of them with a window of {config.sliding_window}"
    shown = {
        "family": kind,
        "architecture": f"{config.architecture}, head {config.head}",
        "layers": layers,
        "hidden size": f"{config.hidden_size}, feed-forward {config.intermediate_size} ({config.activation})",
        "heads": f"{config.num_heads} of {config.head_dim}, {config.num_kv_heads} of keys and values",
    }
    if config.num_experts:
        shown["experts"] = f"{config.num_experts} of {config.expert_size}, {config.experts_per_token} for a token"
    shown |= {
        "positions": config.positions,
        "vocabulary": f"{config.vocab_size}, head and embedding {'tied' if found.tied else 'apart'}",
        "context": f"{config.max_seqlen} tokens",
        "parameters": f"{found.parameters:,}",
    }
    if found.active_parameters != found.parameters:
        shown["for one token"] = f"{found.active_parameters:,}"
    if config.quantization is not None:
        bits, group_size = parse(config.quantization)
        shown["quantisation"] = (
            f"codes of {bits} bits, a scale for each {'row' if bits == 8 else f'{group_size} columns'}"
        )
    shown["dtype"] = ", ".join(
        name if len(found.dtypes) == 1 else f"{name} ({count:,})" for name, count in found.dtypes.items()
    )
    shown["weights"] = (
        f"{_size(found.weight_bytes)} in {found.files} file{'s' if found.files > 1 else ''}, {found.tensors} tensors"
    )
    if found.cache_bytes:
        shown["KV cache"] = (
            f"{_size(found.cache_bytes_per_1k)} per 1024 tokens, {_size(found.cache_bytes)} for the whole context"
        )
    if found.cache_bytes and config.head == "lm" and config.causal:
        from pytransformer.generation.caches import predict_bytes

        eight_bits = predict_bytes("int8", config, 1, config.max_seqlen)
        shown["KV cache of 8 bits"] = (
            f"{_size(eight_bits)} for the whole context{' of the target' * config.is_encoder_decoder}, without windows "
            "(cache='int8' or 'fp8')"
        )
    return shown


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
