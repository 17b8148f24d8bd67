"""A model in a folder: our own layout, or that of a public family (Hugging Face). safetensors and JSON, never pickle.

Both are ``config.json`` beside ``model.safetensors``, or beside several files with an index; they differ in the names of the tensors and of
the configuration's fields. Which a folder has is seen from the fields.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pytransformer.nn import Linear, RowBlocks

from .config import TransformerConfig
from .families import FAMILIES, CheckpointError, Family, find_family, mapping, write_config
from .families import read_config as read_family_config
from .families.weights import ROW_FORMS, Weight, same
from .tensor_files import WEIGHTS_FILE, TensorFiles
from .transformer import Transformer
from .writing import CONFIG_FILE, Piece, write_model

__all__ = ["CONFIG_FILE", "OWN", "WEIGHTS_FILE", "CheckpointError", "load", "read_config", "read_folder", "save"]

GENERATION_FILE = "generation_config.json"
OWN = "pytransformer"
_HEAD = "lm_head.weight"
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# Fields that no configuration of ours has and every one of a public family has.
_PUBLIC_FIELDS = {"model_type", "architectures", "transformers_version"}
_DRAWING = ("normal_", "uniform_")


def save(
    model: Transformer,
    folder: str | os.PathLike[str],
    *,
    family: str | None = None,
    max_shard_bytes: int = 50 * 10**9,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Writes the model's weights and configuration into ``folder``, which is made if needed; other files in it are left alone.

    Tied weights are written once. After a crash or a kill at any moment the folder holds the model it held before, the new one, or (only
    where more than one file of weights had to be replaced) visibly none. A public family's folder loads in transformers.

    Args:
        family: the public family to save as ("llama", …), or "pytransformer" for our own layout; by default what the model was loaded from.
        max_shard_bytes: weights beyond so many bytes go into several files.
        dtype: floating dtype to write; by default that of each weight.
        progress: called with the number of bytes that were written since the last call.

    Raises:
        TypeError: not a :class:`Transformer`.
        ValueError: a parameter has no values (it is on the meta device), there is no such family, or it cannot express this model.
        OSError: the folder cannot be written.
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"save writes a Transformer, got {type(model).__name__}")
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be a positive int, got {max_shard_bytes!r}")
    values = _values(model)
    meta = [name for name, value in values.items() if (value if isinstance(value, Tensor) else value[0]).is_meta]
    if meta:
        raise ValueError(f"parameters on the meta device have no values to save: {', '.join(meta)}")
    outline = {name: _outline(value) for name, value in values.items()}
    target = _target(model.config.family if family is None else family)
    weights = mapping.to_write(target or _own_family(outline), model.config, outline)
    pieces = [piece for weight in weights for piece in _Taken(weight, model.config, values, dtype).pieces()]
    texts = {CONFIG_FILE: _config_text(model.config, target, pieces)}
    if model.generation_config is not None:
        texts[GENERATION_FILE] = json.dumps(model.generation_config, indent=2) + "\n"
    write_model(Path(folder), pieces, texts, max_shard_bytes, progress)


def load(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    mmap: bool | None = None,
) -> Transformer:
    """The model that a folder holds, in our own layout or a public family's, in evaluation mode.

    Args:
        folder: holds ``config.json`` and safetensors files; ``generation_config.json`` is read where there is one, its special tokens into
            the configuration, all of it into ``model.generation_config``.
        device: where to put it; by default torch's default device.
        dtype: floating dtype of the parameters; by default as stored.
        mmap: whether weights on a CPU stay in the mapped files where the dtype is the stored one, which takes no time and no memory until
            they are used; what is written to them stays in memory. ``None`` = where it can be; ``False`` = copies, which do not depend on
            the files any more.

    Raises:
        FileNotFoundError: the folder or one of the files is missing.
        CheckpointError: a file is truncated or not what its name says; names, shapes or dtypes do not fit the configuration, all of which are
            listed; or the configuration asks for what is not served. Nothing is loaded then.
        ValueError: ``mmap=True`` for another device than the CPU.
    """
    place = Path(folder)
    device = torch.get_default_device() if device is None else torch.device(device)
    if mmap and device.type != "cpu":
        raise ValueError(f"mmap=True is for weights on a CPU, got device={str(device)!r}")
    with _without_collector():
        config, family = read_folder(place)
        files = TensorFiles.of_folder(place)
        model, found = _fit(place, config, family, files)
        for module in model.modules():  # tables of positions are computed; the parameters come next
            if any(table is not None and table.is_meta for table in module._buffers.values()):
                # Not to_empty(): empty_like of a tensor on the meta device imports sympy, which takes seconds.
                module._apply(lambda old: torch.empty(old.shape, dtype=old.dtype, device=device), recurse=False)
        _fill(model, found, files, device, dtype, mapped=device.type == "cpu" and mmap is not False)
        model.generation_config = read_generation(place)
        return model.eval()


def read_config(path: Path) -> TransformerConfig:
    """The configuration that a ``config.json`` of either layout holds; :class:`CheckpointError` if it holds none."""
    return _parsed(path)[0]


def read_folder(folder: Path) -> tuple[TransformerConfig, Family | None]:
    """The configuration of a model's folder, with the special tokens of ``generation_config.json``, and its family (``None``: our own).

    Raises:
        FileNotFoundError: there is no ``config.json``.
        CheckpointError: a file is damaged, or the configuration is not served.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} does not hold a complete model: there is no {CONFIG_FILE}")
    config, family = _parsed(path)
    generation = read_generation(folder)
    if family is not None and generation is not None:
        tokens = {name: generation[name] for name in _SPECIAL_TOKENS if generation.get(name) is not None}
        try:
            config = dataclasses.replace(config, **tokens)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{folder / GENERATION_FILE}: {error}") from error
    return config, family


def read_generation(folder: Path) -> dict[str, Any] | None:
    """What ``generation_config.json`` holds, or ``None`` where there is none."""
    path = folder / GENERATION_FILE
    return _read_json(path) if path.is_file() else None


def describe_public(folder: Path) -> str | None:
    """Where the folder is a model in the layout of a public family: a sentence that says so."""
    try:
        values = _read_json(folder / CONFIG_FILE)
    except (OSError, CheckpointError):
        return None
    if not _PUBLIC_FIELDS & set(values):
        return None
    return f"{folder} holds a model of Hugging Face transformers (model_type {values.get('model_type')!r})"


def _parsed(path: Path) -> tuple[TransformerConfig, Family | None]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        if not isinstance(values, dict) or not _PUBLIC_FIELDS & set(values):
            return TransformerConfig.from_json(text), None
        family = find_family(values.get("model_type"))
        return read_family_config(family, values), family
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: a configuration must be JSON: {error}") from error
    except (ValueError, TypeError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold an object, got {type(values).__name__}")
    return values


def _own_family(ours: Mapping[str, Tensor]) -> Family:
    """Our own layout as a family: every tensor as it is, tied ones once."""
    names = [group[0] for group in mapping.tied(ours)]
    return Family(OWN, {}, {}, dict, lambda config: {}, tuple(same(name, name) for name in names))


def _fit(
    place: Path, config: TransformerConfig, family: Family | None, files: TensorFiles
) -> tuple[Transformer, mapping.Plan]:
    """A model without memory and how the files fill it.

    Head and embedding that are to be tied but differ in the files are two matrices in the model: so does transformers.
    """
    with _WithoutInitialValues():
        model = Transformer(config, device="meta")
    ours = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in files.tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in files.tensors.items()}
    found = mapping.plan(family or _own_family(ours), config, ours, shapes, dtypes)
    faults = list(found.faults)
    if not faults:
        for first, second in found.repeated:
            one, other = (mapping.join(weight, config, files.tensor) for weight in (first, second))
            if torch.equal(one, other):
                continue
            if _HEAD in (first.ours, second.ours) and config.tie_embeddings:
                return _fit(place, dataclasses.replace(config, tie_embeddings=False), family, files)
            faults.append(f"{', '.join(second.theirs)} must equal {', '.join(first.theirs)}")
    if faults:
        order = ("missing", "unexpected")
        faults.sort(key=lambda fault: (order.index(kind) if (kind := fault.split(":")[0]) in order else 2, fault))
        likeness = "" if family is None else _likeness(family, files)
        raise CheckpointError(f"{place} does not fit its {CONFIG_FILE}: " + "; ".join(faults) + likeness)
    return model, found


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """The garbage collector rests: it would walk all that torch has made, time and again, for thousands of modules that are to stay."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


class _WithoutInitialValues(TorchFunctionMode):
    """Modules are made as they are, and nothing is drawn: on the meta device that would be for nothing, and takes seconds.

    (A normal distribution has no kernel there; torch takes it apart in Python, for which it imports its compiler.)
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__ or getattr(func, "__name__", None) in _DRAWING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _likeness(family: Family, files: TensorFiles) -> str:
    """What family the tensors seem to be of, where that is another one."""
    scores = {name: mapping.resemblance(other, files.tensors) for name, other in FAMILIES.items()}
    best = max(share for share, _ in scores.values())
    if scores.get(family.name, (0.0, 0.0))[0] >= best:
        return ""
    alike = sorted((name for name in scores if scores[name][0] == best), key=lambda name: -scores[name][1])
    return f". By their names the tensors are not of {family.name} but of {' or '.join(alike[:4])}"


def _fill(
    model: Transformer,
    found: mapping.Plan,
    files: TensorFiles,
    device: torch.device,
    dtype: torch.dtype | None,
    mapped: bool,
) -> None:
    """Puts the files' tensors into a model on the meta device."""
    names = {name: group for group in mapping.tied(model.state_dict()) for name in group}
    modules = dict(model.named_modules(remove_duplicate=False))
    dtypes = []
    for weight in found.weights:
        stored = [files.tensor(name) for name in weight.theirs]
        parts = [part.to(device, dtype if part.is_floating_point() else None) for part in stored]
        in_place = mapped and all(part.data_ptr() == before.data_ptr() for part, before in zip(parts, stored))
        if in_place and isinstance(weight.form, ROW_FORMS) and _put_blocks(modules, weight.ours, parts):
            continue
        tensor = weight.form.join(parts, weight.side(model.config))
        if dtype is not None:
            tensor = tensor.to(dtype)
        if not in_place:
            shared = any(tensor.untyped_storage()._cdata == part.untyped_storage()._cdata for part in stored)
            tensor = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        parameter = nn.Parameter(tensor)
        dtypes.append(parameter.dtype)
        for name in names[weight.ours]:
            place, _, kind = name.rpartition(".")
            setattr(modules[place], kind, parameter)
    _start(model, device, dtypes[0] if dtype is None else dtype)


def _put_blocks(modules: dict[str, nn.Module], name: str, blocks: list[Tensor]) -> bool:
    """Puts row blocks in the place of a linear layer, where ``name`` is the weight of one."""
    place, _, kind = name.rpartition(".")
    parent, _, leaf = place.rpartition(".")
    layer = modules[place]
    if type(layer) is not Linear or kind != "weight" or len({block.dtype for block in blocks}) > 1:
        return False
    modules[place] = RowBlocks(blocks, layer.bias)
    setattr(modules[parent], leaf, modules[place])
    return True


@torch.no_grad()
def _start(model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    """Gives what the files may lack and do lack its initial value, and warns where that is a random one."""
    drawn = []
    for place, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            fresh = torch.zeros(parameter.shape, device=device, dtype=dtype)
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and kind == "weight":
                fresh += 1.0 - getattr(module, "weight_offset", 0.0)
            elif parameter.ndim > 1:
                nn.init.normal_(fresh, std=model.config.initializer_range)
                drawn.append(f"{place}.{kind}")
            setattr(module, kind, nn.Parameter(fresh))
    if drawn:
        warnings.warn(f"the files have nothing for {', '.join(drawn)}: started with random values", stacklevel=3)


def _target(name: str | None) -> Family | None:
    if name is None or name == OWN:
        return None
    if name not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join((OWN, *sorted(FAMILIES)))}, got {name!r}")
    return FAMILIES[name]


def _config_text(config: TransformerConfig, family: Family | None, pieces: list[Piece]) -> str:
    if family is None:
        return dataclasses.replace(config, family=None, family_fields=None).to_json()
    values = write_config(family, config)
    values.pop("torch_dtype", None)  # the older name
    sizes: dict[torch.dtype, int] = {}
    for piece in pieces:
        sizes[piece.dtype] = sizes.get(piece.dtype, 0) + piece.numel
    # transformers loads in this dtype, whatever the files hold.
    values["dtype"] = str(max(sizes, key=sizes.__getitem__)).removeprefix("torch.")
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _values(model: Transformer) -> dict[str, Tensor | list[nn.Parameter]]:
    """Name in the state_dict -> tensor, or the row blocks that it is a pile of: a state_dict would put those together in memory."""
    values: dict[str, Tensor | list[nn.Parameter]] = {}
    for place, module in model.named_modules(remove_duplicate=False):
        prefix = f"{place}." if place else ""
        if isinstance(module, RowBlocks):
            values[f"{prefix}weight"] = module.blocks
        for kind, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not isinstance(module, RowBlocks) or kind == "bias":
                values[prefix + kind] = parameter.detach()
    return values


def _outline(value: Tensor | list[nn.Parameter]) -> Tensor:
    if isinstance(value, Tensor):
        return value
    rows = sum(block.shape[0] for block in value)
    return torch.empty(rows, *value[0].shape[1:], dtype=value[0].dtype, device="meta")


class _Taken:
    """One of our tensors, taken apart when its first part is written and let go with the last."""

    def __init__(
        self,
        weight: Weight,
        config: TransformerConfig,
        values: Mapping[str, Tensor | list[nn.Parameter]],
        dtype: torch.dtype | None,
    ) -> None:
        self._weight, self._config, self._value, self._dtype = weight, config, values[weight.ours], dtype
        self._parts: dict[int, Tensor] = {}

    def pieces(self) -> Iterator[Piece]:
        """What is to be written, in the order of the names in the file."""
        outline = mapping.split(self._weight, self._config, _outline(self._value).to("meta"))
        for index, (name, part) in enumerate(zip(self._weight.theirs, outline)):
            dtype = self._dtype if self._dtype is not None and part.is_floating_point() else part.dtype
            yield Piece(name, tuple(part.shape), dtype, lambda index=index: self._part(index))  # type: ignore[misc]

    @torch.no_grad()
    def _part(self, index: int) -> Tensor:
        if not self._parts:
            self._parts = dict(enumerate(mapping.split(self._weight, self._config, self._value)))
        return self._parts.pop(index)
