"""Every class of the installed transformers that ``attn_implementation="pytransformer"`` can be set for, beside "eager".

    python -m tests.interop.huggingface_walk            # those that huggingface_classes.json lacks; all of another release
    python -m tests.interop.huggingface_walk bert t5    # these families, printed

Each class gets a tiny model (huggingface_tiny.py) with the same weights under both names, and the same inputs without padding, padded on
the left and on the right (a head on a body that is a class of its own: without padding alone); those that take ``position_ids`` also two
texts in each row, told apart by them. What is compared is every floating output, where there is padding the rows of real tokens. Both are
float32 on a CPU; the tolerance is torch.testing's own, of outputs scaled to at most 1.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from pytransformer.interop.huggingface import NAME, DeferredMask, attention_forward
from pytransformer.verification import Contract, ContractError
from tests.interop.huggingface_models import ComputeInFloat64, in_float64
from tests.interop.huggingface_tiny import DECODER_LENGTH, LENGTH, build, floating_outputs, inputs_for

RECORD = Path(__file__).with_name("huggingface_classes.json")
MODELS = Path(transformers.__file__).parent / "models"
SECONDS = 60

AGREES, REFUSED, ALONE, NOT_WALKED, DIFFERS = "agrees", "refused", "without our attention", "not walked", "DIFFERS"
AS_SDPA = "padded as sdpa, other than eager"  # what a row of padding holds reaches the others
APART, TOGETHER = "packed texts apart", "packed texts see each other"


# --- Which classes there are, read from the sources: nothing is imported. ---------------------------------------------------------------


def classes_of(source: str) -> list[str]:
    """The model classes that a modeling file defines."""
    found, families = [], {"PreTrainedModel"}
    for name, bases in re.findall(r"^class (\w+)\(([^)]*)\):", source, re.MULTILINE):
        if families & {base.strip() for base in bases.split(",")} or re.search(r"\w+PreTrainedModel\b", bases):
            families.add(name)
            if not name.endswith(("PreTrainedModel", "PretrainedModel")):
                found.append(name)
    return found


def installed_classes() -> dict[str, list[str]]:
    """Model classes by their module's name below transformers.models ("bert.modeling_bert")."""
    files = sorted(MODELS.glob("*/modeling_*.py"))
    return {f"{file.parent.name}.{file.stem}": classes_of(file.read_text(encoding="utf-8")) for file in files}


def arguments_of_attention_calls() -> dict[str, list[str]]:
    """Keywords that models write where they call an attention function, and the modules that do."""
    found: dict[str, set[str]] = {}
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        for call in re.finditer(
            r"^( *)(?:\w+(?:, \w+)* = |return )?attention_interface\(\n(.*?)^\1\)",
            file.read_text(encoding="utf-8"),
            re.M | re.S,
        ):
            for keyword in re.findall(r"^ +(\w+)=", call[2], re.MULTILINE):
                found.setdefault(keyword, set()).add(file.parent.name)
    return {keyword: sorted(names) for keyword, names in sorted(found.items())}


# --- One class -------------------------------------------------------------------------------------------------------------------------


class Calls(list[str]):
    """What reached the attention function: the kinds of masks, and the other arguments that were not None, in words."""

    def record(self, module: torch.nn.Module, mask: Any, options: dict[str, Any]) -> None:
        if mask is None:
            kind = "no mask"
        elif isinstance(mask, DeferredMask):
            kind = f"{'read ' if mask.was_read() else ''}deferred {mask.dtype}"
        else:
            kind = f"{mask.dtype} of {tuple('1' if size == 1 else 'n' for size in mask.shape)}"
        own = {
            "s_aux",
            "softcap",
            "position_bias",
            "indices",
            "block_indices",
            "sinks",
            "cu_seq_lens_q",
            "is_causal",
            "sliding_window",
        }
        given = sorted(name for name in own & options.keys() if options[name] is not None)
        self.append(f"{kind}; is_causal {getattr(module, 'is_causal', None)}; {', '.join(given)}")


@contextlib.contextmanager
def recorded_calls() -> Iterator[Calls]:
    calls = Calls()

    def record(module: torch.nn.Module, *args: Any, **options: Any) -> Any:
        mask = args[3] if len(args) > 3 else options.get("attention_mask")
        calls.record(module, mask, options)
        return attention_forward(module, *args, **options)

    AttentionInterface.register(NAME, record)
    try:
        yield calls
    finally:
        AttentionInterface.register(NAME, attention_forward)


class Found(NamedTuple):
    """What became of a class: its verdict, what is to be said of it, and in which ways our attention was asked."""

    verdict: str
    why: str = ""
    calls: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.verdict}: {self.why}" if self.why else self.verdict


def is_head(name: str) -> bool:
    """Whether a class only adds something to a body that is a class of its own: it is compared without padding alone."""
    return re.search(r"For[A-Z]|LMHead|DoubleHeads|WithProjection", name) is not None and "ForCausalLM" not in name


def walk(model_class: type[PreTrainedModel]) -> Found:
    """Builds the class under both names and compares what it computes."""
    paddings = (None,) if is_head(model_class.__name__) else (None, "left", "right")
    try:
        eager = build(model_class, "eager")
        expected = {padding: outputs_of(eager, inputs_for(eager, padding)) for padding in paddings}
    except Exception as error:
        return Found(NOT_WALKED, in_short(error))
    with recorded_calls() as calls:
        try:
            ours = build(model_class, NAME)
            ours.load_state_dict(eager.state_dict())
            actual = {padding: outputs_of(ours, inputs_for(ours, padding)) for padding in expected}
        except (KeyError, NotImplementedError, ValueError) as error:
            return Found(REFUSED, in_short(error), tuple(sorted(set(calls))))
        except Exception as error:
            return Found(DIFFERS, in_short(error))
    ways = tuple(sorted(set(calls)))
    note = ""
    for padding in expected:
        inputs = inputs_for(eager, padding)
        found = difference(actual[padding], expected[padding], inputs)
        if not found or is_rounding(eager, actual[padding], expected[padding], inputs):
            continue
        if padding is None or not model_class._supports_sdpa:
            return Found(DIFFERS, f"{found}, padding {padding}", ways)
        sdpa = build(model_class, "sdpa")
        sdpa.load_state_dict(eager.state_dict())
        if difference(actual[padding], outputs_of(sdpa, inputs), inputs):
            return Found(DIFFERS, f"{found}, padding {padding}", ways)
        note = AS_SDPA
    packing = "" if is_head(model_class.__name__) else packed(eager, ours)
    if packing == DIFFERS:
        return Found(DIFFERS, "packed texts", ways)
    return Found(AGREES if calls else ALONE, ", ".join(filter(None, (note, packing))), ways)


def is_rounding(
    eager: PreTrainedModel, actual: dict[str, Tensor], expected: dict[str, Tensor], inputs: dict[str, Any]
) -> bool:
    """Whether what differs is as near to "eager" in float64 as "eager" in float32 is, by the contract: a few models amplify rounding."""
    mask = inputs.get("attention_mask")
    contract = Contract(torch.float32)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    try:
        with ComputeInFloat64():
            golden = outputs_of(in_float64(eager), wide)
    except Exception:
        return False
    for name, exact in golden.items():
        if not difference({name: actual[name]}, {name: expected[name]}, inputs):
            continue
        rows = mask.bool() if mask is not None and exact.shape[: mask.ndim] == mask.shape else slice(None)
        contract.add(name, actual=actual[name][rows], plain=expected[name][rows], golden=exact[rows])
    try:
        contract.check()
    except ContractError:
        return False
    return True


def in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def outputs_of(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(1)  # a few models draw noise
    with torch.no_grad():
        return dict(floating_outputs(model(**inputs)))


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor], inputs: dict[str, Any]) -> str:
    """Empty where every output agrees. Rows of padding see nothing here and everything in "eager": those, and what is pooled from them,
    are not compared."""
    mask = inputs.get("attention_mask")
    for name, wanted in expected.items():
        got = actual.get(name)
        if got is None or got.shape != wanted.shape:
            return f"{name} is {None if got is None else tuple(got.shape)}, not {tuple(wanted.shape)}"
        if mask is not None:
            if wanted.shape[: mask.ndim] == mask.shape:
                got, wanted = got[mask.bool()], wanted[mask.bool()]
            elif wanted.ndim < 3 or wanted.shape[1] != DECODER_LENGTH:
                continue
        scale = wanted.abs().max().clamp(min=1e-30) if wanted.numel() else 1.0
        try:
            torch.testing.assert_close(got / scale, wanted / scale, equal_nan=True)
        except AssertionError:
            return f"{name} by {float((got - wanted).abs().max() / scale):.1e} of its largest"
    return ""


def packed(eager: PreTrainedModel, ours: PreTrainedModel) -> str:
    """Whether two texts in one row, told apart by position_ids, see each other: TOGETHER or APART under both
    names alike."""
    inputs = inputs_for(eager)
    if "position_ids" not in inspect.signature(eager.forward).parameters:
        return ""
    if inputs.keys() != {"input_ids"} or inputs["input_ids"].ndim != 2:
        return ""
    first = 5
    positions = torch.cat([torch.arange(first), torch.arange(LENGTH - first)]).expand(2, -1)
    others = inputs["input_ids"].clone()
    others[:, :first] += 1
    seen = []
    for model in (eager, ours):
        try:
            results = [
                outputs_of(model, {"input_ids": ids, "position_ids": positions, "use_cache": False})
                for ids in (inputs["input_ids"], others)
            ]
        except Exception:
            return ""
        name = next((name for name, value in results[0].items() if value.shape[:2] == others.shape), None)
        if name is None:
            return ""
        seen.append([result[name][:, first:] for result in results])
    if difference({"second text": seen[1][0]}, {"second text": seen[0][0]}, {}):
        return DIFFERS
    return TOGETHER if difference({"it": seen[0][0]}, {"it": seen[0][1]}, {}) else APART


# --- All of them -----------------------------------------------------------------------------------------------------------------------


def load(module: str, name: str) -> type[PreTrainedModel] | str:
    """The class, or why it is none that can be built."""
    try:
        loaded = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    except Exception as error:
        return in_short(error)
    if not (isinstance(loaded, type) and issubclass(loaded, PreTrainedModel)) or loaded.config_class is None:
        return "no configuration of its own"
    return loaded


def found_of(module: str, name: str) -> Found:
    """What became of the class of this name."""
    loaded = load(module, name)
    return Found(NOT_WALKED, loaded) if isinstance(loaded, str) else walk(loaded)


class TooLate(BaseException):
    """No Exception, which a walk makes a verdict of."""


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """TooLate inside when they are over."""

    def stop(*_: object) -> None:
        raise TooLate(f"longer than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def walk_all(record: Record, families: set[str], write: bool) -> None:
    """Adds to the record what became of every class of these families, or of all, that it lacks; what differs is printed at once."""
    for module, names in installed_classes().items():
        if families and module.split(".")[0] not in families:
            continue
        for name in names:
            if name in record.classes.get(module, {}):
                continue
            try:
                with at_most(SECONDS):
                    found = found_of(module, name)
            except TooLate as error:
                found = Found(NOT_WALKED, str(error))
            record.add(module, name, found)
            if families or found.verdict == DIFFERS:
                print(module, name, found, flush=True)
        if write:
            record.write()


class Record:
    """What became of each class, by module and name; and one class for each way in which attention is asked and each reason to refuse."""

    def __init__(self, content: dict[str, Any] | None = None) -> None:
        content = content or {}
        self.version: str = content.get("transformers", transformers.__version__)
        self.classes: dict[str, dict[str, str]] = content.get("classes", {})
        self.ways: dict[str, str] = content.get("ways", {})

    @classmethod
    def read(cls) -> Record:
        """The one that is committed, or an empty one."""
        return cls(json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else None)

    def add(self, module: str, name: str, found: Found) -> None:
        self.classes.setdefault(module, {})[name] = str(found)
        if found.verdict == AGREES or (found.verdict == REFUSED and found.calls):
            self.ways.setdefault(" | ".join(found.calls), f"{module}.{name}")

    def write(self) -> None:
        def lines(content: dict[str, Any]) -> str:
            return ",\n".join(f"{json.dumps(key)}: {json.dumps(content[key])}" for key in sorted(content))

        version, ways, classes = json.dumps(self.version), lines(self.ways), lines(self.classes)
        text = f'{{"transformers": {version},\n"ways": {{\n{ways}\n}},\n"classes": {{\n{classes}\n}}}}\n'
        RECORD.write_text(text, encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    families = set(sys.argv[1:])
    record = Record() if families else Record.read()
    if record.version != transformers.__version__:
        record = Record()
    walk_all(record, families, write=not families)
    print(Counter(text.split(":")[0] for names in record.classes.values() for text in names.values()))


if __name__ == "__main__":
    main()
