"""Beside support.py: checks of models that are changed after they are made, of files as they are found, and of padded sources."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pytransformer import Transformer, load, save
from pytransformer.generation import generate
from pytransformer.model.families import find_family, mapping, read_config

from .support import LOGITS_ERROR, NEW_TOKENS, Case, assert_logits, call_ours, call_theirs, on_disk, pair, perturb


def made(case: Case, change: Callable[[Any], object] | None = None) -> Any:
    """Their model of a case with weights of its own, after a change that its configuration cannot express."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, case.config)(**dict(case.fields), attn_implementation="eager")
    model = getattr(transformers, case.model)(config).eval()
    if change is not None:
        change(model)
    perturb(model)
    return model


def write_folder(folder: str | Path, model: Any, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """A folder with their configuration, changed by ``values`` (``None``: left out), and these tensors."""
    fields = {**json.loads(model.config.to_json_string()), "architectures": [type(model).__name__], **values}
    place = Path(folder)
    place.mkdir(exist_ok=True)
    given = {name: value for name, value in fields.items() if not (name in values and value is None)}
    (place / "config.json").write_text(json.dumps(given))
    safetensors.torch.save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
        place / "model.safetensors",
        metadata={"format": "pt"},
    )
    return place


def loaded(
    model: Any, *, tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict, **values: Any
) -> Transformer:
    """Our model of a folder with their tensors, changed on the way, and their configuration, changed by ``values``."""
    with tempfile.TemporaryDirectory() as folder:
        return load(write_folder(folder, model, values, tensors(on_disk(model))), mmap=False)


def inputs_for(ours: Transformer, seqlen: int = 9) -> dict[str, Tensor]:
    """Ids as :meth:`Pair.inputs` makes them."""
    generator, config = torch.Generator().manual_seed(7), ours.config
    inputs = {"ids": torch.randint(3, config.vocab_size, (2, seqlen), generator=generator)}
    if config.is_encoder_decoder:
        inputs["src"] = torch.randint(3, config.src_vocab_size, (2, seqlen + 2), generator=generator)
    if config.type_vocab_size:
        inputs["types"] = torch.randint(config.type_vocab_size, (2, seqlen), generator=generator)
    return inputs


@torch.no_grad()
def assert_same(ours: Transformer, theirs: Any) -> None:
    """Equal logits, or hidden states."""
    inputs = inputs_for(ours)
    assert_logits(call_ours(ours, inputs), call_theirs(theirs, inputs))


@torch.no_grad()
def assert_saved(ours: Transformer, theirs: Any) -> None:
    """What we save loads in transformers with their logits, nothing missing and nothing too much; and in ours."""
    with tempfile.TemporaryDirectory() as folder:
        save(ours, folder)
        again, report = type(theirs).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        inputs = inputs_for(ours)
        assert_logits(call_theirs(again.eval(), inputs), call_theirs(theirs, inputs), "loaded again")
        assert_same(load(folder, mmap=False), theirs)


@torch.no_grad()
def padded_sources(case: Case) -> None:
    """Greedy tokens with a cache for sources of several lengths; where tokens differ, their logits tie within the bound."""
    import transformers

    both = pair(case)
    lengths = [case.seqlen, 3, case.seqlen - 4]
    rows = [both.inputs(seed, batch=1, seqlen=length)["src"][0] for seed, length in enumerate(lengths)]
    ids = torch.full((len(rows), max(lengths)), both.config.pad_token_id)
    for row, source in zip(ids, rows):
        row[: len(source)] = source
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    theirs = both.theirs()
    theirs.generation_config = transformers.GenerationConfig()
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=both.config.pad_token_id, output_scores=True,
        return_dict_in_generate=True, decoder_start_token_id=both.config.decoder_start_token_id,
    )  # fmt: skip
    result = theirs.generate(ids, attention_mask=mask.long(), generation_config=settings)
    targets = generate(both.ours(), rows, NEW_TOKENS, eos_token_id=()).token_ids
    for row, target in enumerate(targets):
        for step, scores in enumerate(result.scores):
            expected, actual = int(result.sequences[row, step + 1]), int(target[step + 1])
            if expected != actual:
                gap, scale = float(scores[row, expected] - scores[row, actual]), float(scores[row].abs().max())
                assert gap <= 2 * LOGITS_ERROR * scale, f"row {row}, step {step}: {actual}, theirs {expected}"
                break


def fitted(model: Any, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> mapping.Plan:
    """How tensors fit a model of the configuration."""
    fields = {**json.loads(model.config.to_json_string()), "architectures": [type(model).__name__], **values}
    family = find_family(fields["model_type"])
    config = read_config(family, fields)
    ours = Transformer(config, device="meta").state_dict()
    return mapping.plan(family, config, ours, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
