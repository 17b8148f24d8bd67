"""A prompt whose keys and values are kept, in memory or on disk, for many calls that begin with it.

A folder holds ``prefix.safetensors`` with token ids, keys and values of every layer, and ``prefix.json`` with the fingerprint of the model
that made them: its configuration, and samples of every weight. Another model is refused, for it would compute nonsense without an error.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytransformer.generation.modes import evaluation
from pytransformer.model.families.family import CheckpointError
from pytransformer.model.tensor_files import TensorFiles
from pytransformer.model.transformer import Transformer
from pytransformer.model.writing import Piece, write_tensor_file

from .contiguous import KVCache
from .part import CachePart
from .sequence import SequenceCache
from .sizes import split_kind

_TENSORS_FILE, _FACTS_FILE = "prefix.safetensors", "prefix.json"
_VERSION = 1
_SAMPLES = 64  # of each weight


@dataclass(frozen=True)
class Prefix:
    """The first tokens of prompts, and what every layer made of them. Made by :meth:`of` or :meth:`load`.

    Attributes:
        token_ids: int64 (length), on the CPU.
        part: keys and values (num_layers, length, num_kv_heads, head_dim), of a quantised cache codes and scales.
        model: fingerprint of the model, see :func:`fingerprint`.
    """

    token_ids: Tensor
    part: CachePart
    model: str

    def __len__(self) -> int:
        return len(self.token_ids)

    @classmethod
    @torch.no_grad()
    def of(cls, model: Transformer, token_ids: Tensor | Sequence[int], *, cache: str = "contiguous") -> Prefix:
        """Runs the model over a prompt's beginning.

        Args:
            model: a causal decoder, without an encoder.
            token_ids: one prompt: a 1-D tensor or a list of ints.
            cache: the kind that it will be used with: a quantised one needs a prefix that was computed so, layer by layer.

        Raises:
            ValueError: an encoder–decoder, or RoPE whose frequencies depend on the length and a prefix that is longer than the first hold.
            TypeError, ValueError: token ids as of :func:`pytransformer.generation.generate`.
        """
        from pytransformer.generation.prompts import prompt_rows

        (row,), _ = prompt_rows([token_ids], model.config)
        _check_model(model, len(row))
        weight = model.model.embed_tokens.weight
        own = KVCache(
            model.config, 1, len(row), device=weight.device, dtype=weight.dtype, quantised=split_kind(cache)[1]
        )
        with evaluation(list(model.modules())):
            model.model(row[None].to(weight.device), cache=own)
        own.advance(len(row))
        return cls.from_cache(model, row, own)

    @classmethod
    def from_cache(cls, model: Transformer, token_ids: Tensor, cache: SequenceCache, row: int = 0) -> Prefix:
        """The first tokens of sequence ``row`` of a cache that ``model`` has filled; ``token_ids`` (length): what they are."""
        _check_model(model, len(token_ids))
        part = cache.read_prefix(row, len(token_ids))
        return cls(token_ids.detach().long().cpu(), part, fingerprint(model))

    def common(self, rows: Sequence[Tensor]) -> int:
        """How many of its tokens every one of these prompts begins with and is longer than."""
        count = min(len(self), *(len(row) - 1 for row in rows))
        for row in rows:
            same = row[:count].cpu() == self.token_ids[:count]
            count = int(same.long().cumprod(0).sum())
        return count

    def fill(self, cache: SequenceCache, model: Transformer, rows: Sequence[Tensor]) -> int:
        """Puts what the prompts ``rows`` have in common with it into an empty cache: the number of tokens, 0 if it does not serve.

        Raises:
            ValueError: made by another model, in another dtype, or quantised otherwise than the cache.
        """
        self.check(model)
        own = cache.read_kind()
        if own != (self.part.k.dtype, self.part.quantised):
            raise ValueError(
                f"prefix holds {self.part.k.dtype}, the cache {own[0]}: make the prefix with the same kind of cache "
                "(Prefix.of(model, token_ids, cache=...)) and a model of the same dtype"
            )
        limits = lengths_that_change_rope(model)
        if limits and max(map(len, rows)) > min(limits):
            return 0  # its keys were rotated for shorter sequences
        count = self.common(rows)
        if count > 0:
            cache.write_prefix(self.part, count)
        return count

    def check(self, model: Transformer) -> None:
        """ValueError unless ``model`` made it."""
        if (own := fingerprint(model)) != self.model:
            raise ValueError(
                "prefix was made by another model, or by this one in another dtype or quantisation: its fingerprint is "
                f"{self.model[:12]}…, this model's {own[:12]}…"
            )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes it into a folder, which is made if needed; one that is there is replaced."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        tensors = {"token_ids": self.token_ids, **_named(self.part)}
        # Without its facts a folder holds no prefix: they go first and come last.
        (place / _FACTS_FILE).unlink(missing_ok=True)
        pieces = [
            Piece(name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)  # type: ignore[misc]
            for name, tensor in tensors.items()
        ]
        write_tensor_file(place / _TENSORS_FILE, pieces)
        facts = {"version": _VERSION, "model": self.model, "tokens": len(self)}
        (place / _FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: Transformer) -> Prefix:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is none in the folder.
            CheckpointError: files that are damaged or do not go together.
            ValueError: it was made by another model.
        """
        place = Path(folder)
        if not (place / _FACTS_FILE).is_file():
            raise FileNotFoundError(f"{place} does not hold a prefix: there is no {_FACTS_FILE}")
        try:
            facts = json.loads((place / _FACTS_FILE).read_text(encoding="utf-8"))
            version, made_by, tokens = (facts[name] for name in ("version", "model", "tokens"))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{place / _FACTS_FILE} is damaged ({type(error).__name__}: {error})") from error
        if version != _VERSION:
            raise CheckpointError(f"{place / _FACTS_FILE} is of version {version!r}, this library reads {_VERSION}")
        files = TensorFiles([place / _TENSORS_FILE])
        found = {name: files.tensor(name).clone() for name in files.tensors}
        try:
            part = CachePart(found["k"], found["v"], found.get("k_scale"), found.get("v_scale"))
            prefix = cls(found["token_ids"], part, made_by)
        except KeyError as error:
            raise CheckpointError(f"{place / _TENSORS_FILE} is damaged: there is no {error}") from error
        prefix.check(model)
        config = model.config
        shape = (config.num_layers, tokens, config.num_kv_heads, config.head_dim)
        scales = {tuple(tensor.shape) for tensor in (part.k_scale, part.v_scale) if tensor is not None}
        fits = prefix.token_ids.shape == (tokens,) and part.k.shape == part.v.shape == shape
        if not fits or scales != (set() if part.quantised is None else {shape[:-1]}):
            shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
            raise CheckpointError(
                f"{place / _TENSORS_FILE} is damaged: {tokens} tokens are announced, its shapes are {shapes}"
            )
        return prefix


def fingerprint(model: Transformer) -> str:
    """SHA-256 of the configuration, and of each parameter's name, shape, dtype and some of its values, evenly spread: 64 digits.

    Models that differ in weights which are not among those have one fingerprint; training, fine-tuning and merging change all or most.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, parameter in model.state_dict().items():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _named(part: CachePart) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in part._asdict().items() if tensor is not None}


def _check_model(model: Any, length: int) -> None:
    if model.config.is_encoder_decoder:
        raise ValueError("a prefix is of a model without an encoder: an encoder-decoder's target depends on the source")
    limits = lengths_that_change_rope(model)
    if limits and length > min(limits):
        raise ValueError(
            f"token_ids must have at most {min(limits)} tokens, got {length}: behind that RoPE's frequencies depend on the whole length"
        )


def lengths_that_change_rope(model: Transformer) -> set[int]:
    """Lengths up to which one set of RoPE's frequencies holds, where there are others behind."""
    return {rotary.original_length for rotary in model.model.rotaries if rotary.depends_on_length}
