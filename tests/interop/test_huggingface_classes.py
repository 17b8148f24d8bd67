"""Every model class of the installed transformers agrees with "eager" or is refused, by the record of a walk over all of them.

The record (huggingface_classes.json) is made by ``make huggingface-classes``. Here the classes that are installed are compared with it, and
classes are walked again between which there is every way in which models ask for attention. The slow test walks all of them.
"""

from __future__ import annotations

import inspect

import pytest
import transformers

from pytransformer.interop.huggingface import attention_forward
from pytransformer.interop.huggingface.attention import _REFUSED
from tests.interop.huggingface_walk import (
    AGREES,
    ALONE,
    NOT_WALKED,
    REFUSED,
    Record,
    arguments_of_attention_calls,
    found_of,
    installed_classes,
    walk_all,
)

AGAIN = "`make huggingface-classes` walks them and writes the record; what differs must be served, or refused by name"
RECORDED = Record.read()
CLASSES = RECORDED.classes


def test_a_release_of_transformers_brings_classes_that_nobody_looked_at():
    installed = {f"{module}.{name}" for module, names in installed_classes().items() for name in names}
    recorded = {f"{module}.{name}" for module, names in CLASSES.items() for name in names}
    assert not installed - recorded, (
        f"new in transformers {transformers.__version__}: {sorted(installed - recorded)}; {AGAIN}"
    )
    assert not recorded - installed, (
        f"gone since transformers {RECORDED.version}: {sorted(recorded - installed)}; {AGAIN}"
    )


def test_a_class_differs_from_eager_without_a_word():
    verdicts = {
        f"{module}.{name}": text.split(":")[0] for module, names in CLASSES.items() for name, text in names.items()
    }
    assert set(verdicts.values()) <= {AGREES, REFUSED, ALONE, NOT_WALKED}, {
        name: verdict for name, verdict in verdicts.items() if verdict not in (AGREES, REFUSED, ALONE, NOT_WALKED)
    }


def test_models_pass_arguments_to_attention_that_nobody_looked_at():
    """A keyword in a model's own call says something of that attention; in ``**kwargs`` it travels to every layer."""
    looked_at = set(inspect.signature(attention_forward).parameters) | set(_REFUSED)
    looked_at |= {
        "output_attentions",
        "position_ids",
    }  # answered with a warning; positions are in the mask and in the keys
    assert set(arguments_of_attention_calls()) <= looked_at


def classes_that_ask_in_every_way(ways: dict[str, str]) -> set[str]:
    """Few classes between which there is each call that any class makes; ``ways``: a class for each set of calls."""
    calls = {path: set(way.split(" | ")) for way, path in sorted(ways.items())}
    left, chosen = set().union(*calls.values()), set()
    while left:
        path = max(calls, key=lambda path: len(left & calls[path]))
        left -= calls[path]
        chosen.add(path)
    return chosen


QUICK = classes_that_ask_in_every_way(RECORDED.ways)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path in QUICK else pytest.mark.slow) for path in sorted(RECORDED.ways.values())],
)
def test_a_class_of_each_kind_is_what_the_record_says(path):
    module, _, name = path.rpartition(".")
    assert str(found_of(module, name)) == CLASSES[module][name]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_classes_are_what_the_record_says():
    again = Record()
    walk_all(again, set(), write=False)
    late = "longer than"  # how far a slow one comes is the machine's
    differing = {
        f"{module}.{name}": (text, CLASSES[module][name])
        for module, names in again.classes.items()
        for name, text in names.items()
        if text != CLASSES[module][name] and late not in text + CLASSES[module][name]
    }
    assert not differing
