"""A tiny model of transformers beside ours with the same weights, and the checks that every family passes.

The weights are drawn once with a fixed seed, norms, biases and what starts as zero included, and are numbers that bfloat16 holds, so that
one golden model in float64 serves every dtype. They come to ours as a folder has them: through ``save_pretrained`` and the family's table.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pytransformer import Transformer, TransformerConfig
from pytransformer.generation import generate
from pytransformer.model.families import Family, find_family, mapping, read_config, write_config
from pytransformer.model.families.family import COMMON
from pytransformer.verification.contract import SEEDS, Contract
from tests.support.draws import pool

# The bound: largest error of float32 logits as a part of their largest magnitude.
LOGITS_ERROR = 2e-5
NEW_TOKENS = 6
# The seeds of the contract go through the models in so many batches: a forward pass of a tiny model costs the same for all of them.
DRAWS = 2
# Ids below are left to special tokens, so that no padding stands in a row by chance.
FIRST_ID = 3
# How far apart, of a router's largest score, two experts must be for a few roundings to bfloat16 not to exchange them.
_NEAR_TIE = 4 * 2.0**-8
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel")


@dataclass(frozen=True, eq=False)
class Case:
    """A tiny model of transformers.

    Attributes:
        name: for the test's id.
        config: the name of its configuration class.
        fields: keyword arguments of that.
        model: the name of the model class.
        seqlen: tokens of each row of the inputs.
        sides: where padding is tried.
        prompt: tokens that a generation begins with; ``None`` = ``seqlen``.
        values: what ``config.json`` holds instead of what the configuration object says, where an older file is meant; applied last.
        without: fields that ``config.json`` lacks.
        attention: their implementation of it (where eager is the one that is wrong).
        untrained: those of our parameters that are none of theirs.
        unread: tensors that their model has and never reads, in whose place we write others.
        quiet: the ends of names of weights that are drawn smaller, and the factor.
        batch: rows of the inputs; a classifier has few numbers a row, and the contract's means need many.
        generates: whether greedy tokens are compared, where the class can generate.
    """

    name: str
    config: str
    model: str
    fields: Mapping[str, Any]
    seqlen: int = 10
    sides: tuple[str, ...] = ("right", "left")
    prompt: int | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    attention: str = "eager"
    untrained: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    quiet: tuple[str, float] = ("", 1.0)
    batch: int = 2
    generates: bool = True


class Doubles(TorchFunctionMode):
    """Computes in float64 where a model asks for float32 (norms, softmax, angles), so that a golden result is one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _wide(value) for name, value in (kwargs or {}).items()}
        if func is Tensor.float:
            return args[0].to(torch.float64)
        return func(*(_wide(value) for value in args), **kwargs)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class Pair:
    """Their model and ours with the same weights."""

    def __init__(self, case: Case) -> None:
        import transformers

        self.case = case
        self.model_class = getattr(transformers, case.model)
        # A configuration keeps and edits the dictionaries that it is given.
        config = getattr(transformers, case.config)(
            **copy.deepcopy(dict(case.fields)), attn_implementation=case.attention
        )
        torch.manual_seed(0)
        self._model = self.model_class(config).eval()
        perturb(self._model, *case.quiet)
        self.disk = on_disk(self._model)
        # Saving has told the configuration the name of the class.
        self.values = {**json.loads(self._model.config.to_json_string()), **case.values}
        for name in case.without:
            self.values.pop(name, None)
        self.family: Family = find_family(self.values["model_type"])
        self.config: TransformerConfig = read_config(self.family, self.values)
        self.state = mapping.state_of(self.family, self.config, tensors_of(Transformer(self.config)), self.disk)
        self._golden: Any = None
        self._ours: dict[torch.dtype, Transformer] = {}
        self._results: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}

    def theirs(self, dtype: torch.dtype = torch.float32) -> Any:
        """Their model; a fresh one where RoPE changes with the length, because a dynamic one remembers the longest call."""
        if dtype == torch.float32:
            rope = str(getattr(self._model.config, "rope_parameters", None))
            return copy.deepcopy(self._model) if "dynamic" in rope or "longrope" in rope else self._model
        config = copy.deepcopy(self._model.config)
        if dtype == torch.float64:
            with Doubles():
                model = self.model_class._from_config(config, dtype=dtype, attn_implementation=self.case.attention)
        else:
            model = self.model_class._from_config(config, dtype=dtype, attn_implementation=self.case.attention)
        model.load_state_dict(self._model.state_dict())
        return model.eval()

    def ours(self, dtype: torch.dtype = torch.float32) -> Transformer:
        """Our model, the same for all checks: none changes it."""
        if dtype not in self._ours:
            model = Transformer(self.config, dtype=dtype).eval()
            second_names = {name: self.state[first] for name, first in model.tied_names().items()}
            model.load_state_dict({**self.state, **second_names})
            self._ours[dtype] = model
        return self._ours[dtype]

    def draw(self, index: int) -> dict[str, Tensor]:
        """The inputs of a share of the contract's seeds, one below the other."""
        share = SEEDS // DRAWS
        parts = [self.inputs(seed) for seed in range(index * share, (index + 1) * share)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def golden(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Their output in float64 for a draw, and the gradients under our names."""
        if self._golden is None:
            self._golden = self.theirs(torch.float64)
        if index not in self._results:
            with Doubles():
                output = call_theirs(self._golden, self.draw(index))
                grads = backward(self._golden, output)
            self._results[index] = output.detach(), self.through_table(self._golden, grads)
        return self._results[index]

    def firm(self, index: int) -> Tensor:
        """The tokens (batch, seqlen) of a draw before the first that two experts nearly tie for, whose output jumps with a rounding."""
        inputs = self.draw(index)
        firm = torch.ones(inputs["ids"].shape, dtype=torch.bool)

        def watch(router: Any, args: Any, output: Any) -> None:
            scores = output[0].sort(dim=-1, descending=True).values
            if router.top_k < scores.shape[-1]:
                margin = scores[:, router.top_k - 1] - scores[:, router.top_k]
                firm.logical_and_((margin > _NEAR_TIE * scores.abs().max()).view_as(firm))

        self.golden(index)
        routers = [module for module in self._golden.modules() if type(module).__name__.endswith("TopKRouter")]
        hooks = [router.register_forward_hook(watch) for router in routers]
        with Doubles(), torch.no_grad():
            call_theirs(self._golden, inputs)
        for hook in hooks:
            hook.remove()
        return firm.int().cummin(dim=1).values.bool()

    def through_table(self, model: Any, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their gradients under our names: they take the way of the weights, which is linear, through a saved file."""
        buffers = {name: tensor for name, tensor in model.named_buffers() if name in self.disk}
        if set(self.disk) <= {*grads, *buffers}:
            disk = {name: grads[name] if name in grads else buffers[name] for name in self.disk}
        else:
            carrier = copy.deepcopy(model)
            with torch.no_grad():
                for name, parameter in carrier.named_parameters():
                    parameter.copy_(grads[name])
            disk = on_disk(carrier)
        return mapping.state_of(self.family, self.config, self.state, disk)

    def inputs(self, seed: int = 0, batch: int | None = None, seqlen: int | None = None) -> dict[str, Tensor]:
        """Ids (batch, seqlen): "src" as well for an encoder–decoder, "types" for a model with token types."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.case.batch if batch is None else batch, self.case.seqlen if seqlen is None else seqlen)

        def ids(vocab_size: int) -> Tensor:
            return torch.randint(FIRST_ID, vocab_size, shape, generator=generator)

        inputs = {"ids": ids(self.config.vocab_size)}
        if self.config.is_encoder_decoder:
            inputs["src"] = ids(self.config.src_vocab_size)
        if self.config.type_vocab_size:
            inputs["types"] = torch.randint(self.config.type_vocab_size, shape, generator=generator)
        return inputs


def tensors_of(model: Transformer) -> dict[str, Tensor]:
    """A model's tensors, those with two names under the first."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.tied_names()}


@functools.lru_cache(maxsize=2)
def pair(case: Case) -> Pair:
    """Their model and ours of a case; the same for the checks that follow each other."""
    return Pair(case)


@torch.no_grad()
def perturb(model: torch.nn.Module, quiet: str = "", factor: float = 1.0) -> None:
    """Draws every weight and every saved buffer anew: large enough that softmax and gates bend, and representable in bfloat16.

    Tables that are not trained stay as they are; matrices whose names end with ``quiet`` are drawn smaller by the factor.
    """
    done = {parameter.data_ptr() for parameter in model.parameters() if not parameter.requires_grad}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or tensor.data_ptr() in done:
            continue
        done.add(tensor.data_ptr())
        if tensor.ndim < 2 or 1 in tensor.shape:
            tensor.add_(torch.randn_like(tensor), alpha=0.2)
        else:
            tensor.normal_(
                0.0, 1.5 * min(tensor.shape[-2:]) ** -0.5 * (factor if quiet and name.endswith(quiet) else 1.0)
            )
        tensor.copy_(tensor.to(torch.bfloat16))


def on_disk(model: Any) -> dict[str, Tensor]:
    """The tensors that ``save_pretrained`` writes: in the layout of files, which a state_dict in memory may not have."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {
            name: tensor.clone() for name, tensor in safetensors.torch.load_file(f"{folder}/model.safetensors").items()
        }


def call_theirs(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Their logits, or hidden states of a model without a head."""
    if "src" in inputs:
        output = model(input_ids=inputs["src"], decoder_input_ids=inputs["ids"])
    elif "types" in inputs:
        output = model(input_ids=inputs["ids"], token_type_ids=inputs["types"])
    else:
        output = model(input_ids=inputs["ids"])
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def call_ours(model: Transformer, inputs: Mapping[str, Tensor], mask: Tensor | None = None) -> Tensor:
    """Ours; ``mask``: (batch, seqlen) of the source's tokens, or of the only ones."""
    if "src" in inputs:
        output = model(inputs["src"], inputs["ids"], mask)
    elif "types" in inputs:
        output = model(inputs["ids"], mask, token_type_ids=inputs["types"])
    else:
        output = model(inputs["ids"], mask)
    assert isinstance(output, Tensor)
    return output


def assert_logits(actual: Tensor, expected: Tensor, what: str = "logits") -> None:
    """Within the issue's bound of float32 logits."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, theirs {tuple(expected.shape)}"
    actual, expected = actual.detach(), expected.detach()
    error, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    assert math.isfinite(scale) and scale > 0
    assert error <= LOGITS_ERROR * scale, f"{what}: error {error:.3g} is {error / scale:.3g} of the scale {scale:.3g}"


@torch.no_grad()
def logits(case: Case) -> None:
    """float32 logits."""
    both = pair(case)
    inputs = both.inputs()
    assert_logits(call_ours(both.ours(), inputs), call_theirs(both.theirs(), inputs))


def gradients(case: Case) -> None:
    """float32 gradients of every parameter by the contract; the golden ones are of their model in float64."""
    both = pair(case)
    contract = Contract(torch.float32)
    ours, theirs = both.ours(), both.theirs()
    first = ours.tied_names()
    names = {first.get(name, name) for name, _ in ours.named_parameters()} - set(case.untrained)

    def add(index: int) -> None:
        inputs = both.draw(index)
        actual = {first.get(name, name): grad for name, grad in backward(ours, call_ours(ours, inputs)).items()}
        plain = both.through_table(theirs, backward(theirs, call_theirs(theirs, inputs)))
        assert names <= set(plain), f"not compared: {sorted(names - set(plain))}"
        contract.add_all({name: actual[name] for name in names}, plain, both.golden(index)[1], kind="gradient")

    pool(contract, add, DRAWS).check()


def backward(model: torch.nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of the output, by the names of the parameters."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    model.zero_grad()
    (output * direction).sum().backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def bfloat16(case: Case) -> None:
    """bfloat16 logits by the contract."""
    both = pair(case)
    contract = Contract(torch.bfloat16)
    ours, theirs = both.ours(torch.bfloat16), both.theirs(torch.bfloat16)
    tokens = 0
    for index in range(DRAWS):
        inputs = both.draw(index)
        with torch.no_grad():
            actual, plain = call_ours(ours, inputs), call_theirs(theirs, inputs)
        golden = both.golden(index)[0]
        if both.config.num_experts:
            firm = both.firm(index)
            tokens += int(firm.sum())
            actual, plain, golden = actual[firm], plain[firm], golden[firm]
        contract.add("logits", actual=actual, plain=plain, golden=golden)
    assert tokens >= 4 * SEEDS or not both.config.num_experts, f"{tokens} tokens whose experts are beyond doubt are few"
    contract.check()


@torch.no_grad()
def generation(case: Case) -> None:
    """Greedy tokens with a cache; two tokens whose logits tie within the bound may change places, and end the comparison."""
    import transformers

    both = pair(case)
    inputs = both.inputs(seed=5, batch=3, seqlen=case.prompt)
    settings = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        decoder_start_token_id=both.config.decoder_start_token_id,
        # The cache of their T5 has as many layers as the encoder, and breaks where the decoder has more.
        use_cache=both.config.positions != "t5" or both.config.num_layers <= both.config.num_encoder_layers,
    )
    prompt = inputs.get("src", inputs["ids"])
    theirs = both.theirs()
    # What the settings leave open (end tokens, tokens that are forced) is not taken from the model.
    theirs.generation_config = transformers.GenerationConfig()
    result = theirs.generate(prompt, generation_config=settings)
    ours = generate(both.ours(), prompt, NEW_TOKENS, eos_token_id=()).token_ids
    assert isinstance(ours, Tensor)
    for row in range(len(prompt)):
        for step, scores in enumerate(result.scores):
            expected, actual = int(result.sequences[row, step - NEW_TOKENS]), int(ours[row, step - NEW_TOKENS])
            if expected != actual:
                gap = float(scores[row, expected] - scores[row, actual])
                scale = float(scores[row].abs().max())
                assert gap <= 2 * LOGITS_ERROR * scale, (
                    f"row {row}, step {step}: {actual}, theirs {expected}, {gap:.3g} apart"
                )
                break


@torch.no_grad()
def padding(case: Case) -> None:
    """A row with padding at either side gets what it gets alone."""
    both = pair(case)
    ours, lengths = both.ours(), [case.seqlen, case.seqlen - 3]
    rows = [both.inputs(seed, batch=1, seqlen=length) for seed, length in enumerate(lengths)]
    padded = "src" if both.config.is_encoder_decoder else "ids"
    expected = [call_theirs(both.theirs(), row) for row in rows]
    for side in case.sides:
        batch, mask = _pad(rows, padded, side, case.seqlen, both.config.pad_token_id or 0)
        actual = call_ours(ours, batch, mask)
        for index, alone in enumerate(expected):
            got = actual[index : index + 1]
            if padded == "ids" and got.ndim == 3:
                got = got[:, mask[index]]
            elif got.ndim == 3:
                got = got[:, : alone.shape[1]]
            assert_logits(got, alone, f"{side} padding, row {index}")


def _pad(
    rows: list[dict[str, Tensor]], padded: str, side: str, seqlen: int, token: int
) -> tuple[dict[str, Tensor], Tensor]:
    mask = torch.zeros(len(rows), seqlen, dtype=torch.bool)
    batch = {name: torch.full((len(rows), seqlen), 0 if name == "types" else token) for name in rows[0]}
    for index, row in enumerate(rows):
        length = row[padded].shape[1]
        place = slice(seqlen - length, seqlen) if side == "left" else slice(0, length)
        mask[index, place] = True
        for name, ids in row.items():
            batch[name][index, place if name in (padded, "types") else slice(0, length)] = ids[0]
    return batch, mask


@torch.no_grad()
def round_trip(case: Case) -> None:
    """What we would save is what they saved, and loads in transformers with equal logits and nothing missing or too much."""
    both = pair(case)
    values = write_config(both.family, both.config)
    assert read_config(both.family, values) == both.config
    tensors = mapping.theirs_of(both.family, both.config, tensors_of(both.ours()))
    # A base model is saved without the prefix that we write; transformers takes both.
    usual = both.family.prefixes[0]
    bare = bool(usual) and not any(name.startswith(usual) for name in both.disk)
    written = {name.removeprefix(usual) if bare else name: tensor for name, tensor in tensors.items()}
    assert not sorted(set(written) - set(both.disk))
    for name, tensor in both.disk.items():
        if name not in written:
            assert any(re.search(pattern, name) for pattern in both.family.ignored), f"{name} is not written"
        elif name not in case.unread:
            assert torch.equal(written[name], tensor), name
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(values))
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(contiguous, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        again, report = load_theirs(both, folder)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    inputs = both.inputs()
    assert_logits(call_theirs(again, inputs), call_theirs(both.theirs(), inputs), "loaded again")


def load_theirs(both: Pair, folder: str) -> tuple[Any, dict[str, Any]]:
    """The folder as transformers loads it, and its report."""
    loaded = both.model_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=both.case.attention, output_loading_info=True
    )
    return loaded[0].eval(), loaded[1]


def every_check(
    cases: list[Case] | tuple[Case, ...], brief: list[Case] | tuple[Case, ...] = ()
) -> pytest.MarkDecorator:
    """Parametrises a test by ``case`` and ``check``: each check that fits its case, and of ``brief`` cases those that take no time."""
    checks: list[Callable[[Case], None]] = [logits, padding, round_trip]
    long: list[Callable[[Case], None]] = [gradients, bfloat16]
    chosen = [
        (case, check)
        for case in (*cases, *brief)
        for check in (
            *checks,
            *(long if case not in brief else ()),
            *([generation] if case not in brief and case.generates and case.model.endswith(_GENERATES) else ()),
        )
    ]
    return pytest.mark.parametrize(
        ("case", "check"),
        [pytest.param(case, check, id=f"{case.name}-{check.__name__}") for case, check in chosen],
    )


def check_fields(family: Family, config_class: str, older: tuple[str, ...] = ()) -> None:
    """Every field of their configuration class is in the family's list with their default, and no other but ``older`` spellings."""
    import transformers

    cls = getattr(transformers, config_class)
    entries = {entry.name: entry for entry in dataclasses.fields(cls)}
    theirs = {name for name in {*entries, *cls().to_dict()} if not name.startswith("_")}
    assert not (unknown := sorted(name for name in theirs if family.field(name) is None)), f"not listed: {unknown}"
    assert not (extra := sorted(set(family.fields) - theirs - set(older) - set(COMMON))), f"nobody has: {extra}"
    assert not (unused := sorted(set(older) - set(family.fields))), f"older spellings that are not listed: {unused}"
    for name, entry in entries.items():
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        known = family.field(name)
        assert known is not None
        if default is not dataclasses.MISSING and name != "transformers_version":
            assert known.default == default, f"default of {name}: {known.default!r}, theirs {default!r}"
