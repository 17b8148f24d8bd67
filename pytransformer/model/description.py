"""What a model's folder holds, from its configuration and the headers of its files alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import CONFIG_FILE, GENERATION_FILE, OWN, read_folder, read_generation
from .config import TransformerConfig
from .families import Family, mapping
from .tensor_files import DTYPES, StoredTensor, TensorFiles

# So many tokens are the "1k" of the cache's size.
_THOUSAND = 1024


@dataclass(frozen=True)
class Description:
    """A model in a folder.

    Attributes:
        folder: where it is.
        family: "llama", …, or "pytransformer" for our own layout.
        model_class: transformers' class, or ``None``.
        config: its shape and choices.
        files: number of weight files.
        tensors: number of tensors in them.
        parameters: elements of the weights, tied ones once; a code counts as the weight that it stands for, its scale as none.
        active_parameters: those that take part in one token's computation: of a mixture's experts only the chosen ones.
        weight_bytes: their size in the files.
        dtypes: name of a dtype -> elements stored so, most first.
        cache_bytes_per_1k: of keys and values of a sequence's first 1024 tokens in the embedding's dtype, as :class:`KVCache` keeps them,
            where a layer with a sliding window keeps the window alone.
        cache_bytes: the same of a whole context.
        tied: whether head and embedding are one matrix.
        decisions: what was taken where the configuration says two things or nothing.
    """

    folder: Path
    family: str
    model_class: str | None
    config: TransformerConfig
    files: int
    tensors: int
    parameters: int
    active_parameters: int
    weight_bytes: int
    dtypes: dict[str, int]
    cache_bytes_per_1k: int
    cache_bytes: int
    tied: bool
    decisions: tuple[str, ...]


def describe(folder: str | os.PathLike[str]) -> Description:
    """Describes the model in ``folder`` without reading a weight.

    Raises:
        As :func:`pytransformer.load`, but whether the tensors fit the configuration is not asked.
    """
    place = Path(folder)
    config, family = read_folder(place)
    files = TensorFiles.of_folder(place)
    if family is not None:
        config = family.settle(config, mapping.known_names(family, files.tensors).keys())
    values = json.loads((place / CONFIG_FILE).read_text(encoding="utf-8"))
    stored = _by_our_names(files, config, family)
    coded = {name.rpartition(".")[0] for name, _ in stored if name.endswith(".scale") and config.quantization}
    experts = sum(_elements(tensor, coded) for name, tensor in stored if ".experts." in name)
    parameters = sum(_elements(tensor, coded) for _, tensor in stored)
    dtypes: dict[str, int] = {}
    for _, tensor in stored:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.numel
    dtypes = dict(sorted(dtypes.items(), key=lambda item: -item[1]))
    # Codes and a mixture's blocks are most of what is stored, and say nothing of what is computed with.
    embedding = next((tensor.dtype for name, tensor in stored if name.endswith("embed_tokens.weight")), None)
    itemsize = DTYPES[embedding].itemsize if embedding in DTYPES else 2
    unused = 1 - config.experts_per_token / config.num_experts if config.num_experts else 0.0
    return Description(
        folder=place,
        family=OWN if family is None else family.name,
        model_class=_class_of(family, values),
        config=config,
        files=len({tensor.file for tensor in files.tensors.values()}),
        tensors=len(files.tensors),
        parameters=parameters,
        active_parameters=parameters - round(experts * unused),
        weight_bytes=sum(tensor.nbytes for _, tensor in stored),
        dtypes=dtypes,
        cache_bytes_per_1k=cache_bytes(config, _THOUSAND, itemsize),
        cache_bytes=cache_bytes(config, config.max_seqlen, itemsize),
        tied=config.tie_embeddings and config.quantization is None,  # a quantised head has codes of its own
        decisions=tuple(_decisions(place, values, family, files)),
    )


def cache_bytes(config: TransformerConfig, tokens: int, itemsize: int) -> int:
    """Bytes of keys and values of one sequence of so many tokens; a layer with a sliding window keeps the window alone.

    An encoder–decoder keeps the memory's keys and values besides: so many source tokens' once. An encoder keeps nothing.
    """
    if config.architecture == "encoder":
        return 0
    row = 2 * config.num_kv_heads * config.head_dim * itemsize
    rows = 0
    for layer in range(config.num_layers):
        left, _ = config.window(layer)
        rows += tokens if left < 0 else min(tokens, left + 1)
    if config.is_encoder_decoder:
        rows += tokens * config.num_layers
    return row * rows


def _by_our_names(
    files: TensorFiles, config: TransformerConfig, family: Family | None
) -> list[tuple[str, StoredTensor]]:
    """The tensors that count, each with our name (the number of the layer apart); those that repeat a tied one are left out."""
    if family is None:
        return list(files.tensors.items())
    own = mapping.templates(family)
    found = []
    for known, name in mapping.known_names(family, files.tensors).items():
        weight = own.get(mapping.numberless(known))
        if weight is not None and name not in weight.copies and _stands(weight.ours, config):
            found.append((weight.ours, files.tensors[name]))
    return found


def _stands(ours: str, config: TransformerConfig) -> bool:
    """Whether the model has the tensor, and not as the second name of another."""
    if ours == "lm_head.weight" and config.tie_embeddings:
        return False
    if ours == "encoder.embed_tokens.weight" and config.share_embeddings:
        return False
    heads = {"lm_head": config.head in ("lm", "masked_lm"), "classifier": config.head == "classification"}
    return {**heads, "pooler": config.pooler}.get(ours.partition(".")[0], True)


def _elements(tensor: StoredTensor, coded: Set[str]) -> int:
    """Numbers that a tensor stands for. Codes of 4 bits and GPT-OSS's blocks have two in a byte; scales and zero points are none.

    Args:
        tensor: any of the folder.
        coded: names of the layers that :mod:`.quantized` made, in our own layout.
    """
    layer, _, kind = tensor.name.rpartition(".")
    if layer in coded and kind != "bias":
        return {"I8": 1, "U8": 2}[tensor.dtype] * tensor.numel if kind == "weight" else 0
    name = tensor.name.rpartition("_")[2]
    if tensor.dtype == "U8" and name in ("blocks", "scales"):
        return 2 * tensor.numel if name == "blocks" else 0
    return tensor.numel


def _class_of(family: Family | None, values: Mapping[str, Any]) -> str | None:
    if family is None:
        return None
    return str((values.get("architectures") or [next(iter(family.classes))])[0])


def _decisions(place: Path, values: Mapping[str, Any], family: Family | None, files: TensorFiles) -> list[str]:
    if family is None:
        return []
    told = []
    heads = [name for name, weight in mapping.templates(family).items() if weight.ours == "lm_head.weight"]
    if any(name in files.tensors for name in heads) and read_folder(place)[0].tie_embeddings:
        told.append("head and embedding are to be tied and are both there: they stay two if they differ")
    if not values.get("architectures"):
        told.append(f"architectures is absent: taken for {next(iter(family.classes))}")
    older = [name for name in ("rope_theta", "rope_scaling") if values.get(name) is not None]
    if values.get("rope_parameters") is not None and older:
        told.append(f"rope_parameters and {' and '.join(older)} are there: rope_parameters counts")
    if "tie_word_embeddings" not in values:
        tie = family.field("tie_word_embeddings")
        told.append(f"tie_word_embeddings is absent: taken for {getattr(tie, 'default', None)}")
    if values.get("dtype", values.get("torch_dtype")) is None:
        told.append("dtype is absent: weights keep the dtype they are stored in")
    generation = read_generation(place) or {}
    for name in ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id"):
        if generation.get(name) is not None and generation[name] != values.get(name):
            told.append(
                f"{name} {generation[name]} of {GENERATION_FILE} counts, not {values.get(name)} of {CONFIG_FILE}"
            )
    unknown = sorted(name for name in values if family.field(name) is None and not name.startswith("_"))
    if unknown:
        told.append(f"fields that {family.name} does not know are ignored: {', '.join(unknown)}")
    return told
