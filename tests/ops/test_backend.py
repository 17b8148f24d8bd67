"""Who serves a call: the argument before the context before the environment before the order of the candidates."""

from __future__ import annotations

import importlib.util
import sys
import threading
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pytransformer.ops import backend as module
from pytransformer.ops.backend import (
    Backend,
    BackendChoice,
    Limit,
    check_backend_name,
    is_plain,
    requested_backend,
    unavailable,
    use_backend,
    warn_once,
)
from pytransformer.ops.overview import CHOICES, backends


def only_even(call):
    return None if call % 2 == 0 else f"{call} is odd"


def halve(call):
    return (call / 2,)


CHOICE = BackendChoice(
    "halve", (Backend("torch", halve, (Limit("odd numbers", only_even),)), Backend("reference", halve))
)


def test_the_first_that_can_serves():
    assert CHOICE.select(2, "cpu") == "torch"
    assert CHOICE.select(3, "cpu") == "reference"


def test_the_argument_beats_the_context_beats_the_environment(monkeypatch):
    monkeypatch.setattr(module, "_environment", "torch")
    assert CHOICE.select(2, "cpu") == "torch"
    with use_backend("reference"):
        assert CHOICE.select(2, "cpu") == "reference"
        assert CHOICE.select(2, "cpu", "torch") == "torch"
        with use_backend("torch"):
            assert requested_backend(None) == "torch"
        assert requested_backend(None) == "reference"
    assert requested_backend(None) == "torch"


def test_the_context_can_restore_the_automatic_choice(monkeypatch):
    with use_backend("torch"), use_backend(None):
        assert CHOICE.select(3, "cpu") == "reference"


def test_the_context_is_left_after_an_error():
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert requested_backend(None) is None


def test_a_context_may_be_entered_again():
    context = use_backend("torch")
    with context, context:
        assert requested_backend(None) == "torch"
    assert requested_backend(None) is None


def test_each_thread_has_its_own_context():
    seen = []
    with use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(requested_backend(None)))
        thread.start()
        thread.join()
    assert seen == [None]


def test_a_named_backend_that_cannot_serve_raises_with_its_reason():
    with pytest.raises(NotImplementedError, match="halve: backend 'torch' cannot serve this call: 3 is odd"):
        CHOICE.select(3, "cpu", "torch")
    with (
        pytest.raises(NotImplementedError, match="the CUDA extension"),
        use_backend("cuda"),
    ):
        CHOICE.select(2, "cpu")


def test_no_backend_at_all_gives_every_reason():
    out = (Limit("anything", lambda call: "it is out"),)
    choice = BackendChoice(
        "halve", (Backend("torch", halve, (Limit("odd numbers", only_even),)), Backend("reference", halve, out))
    )
    with pytest.raises(NotImplementedError, match="no backend serves this call: torch: 3 is odd; reference: it is out"):
        choice.select(3, "cpu")


@pytest.mark.parametrize(
    ("call", "who"),
    [
        (lambda: check_backend_name("tritn"), "backend"),
        (lambda: use_backend("tritn"), r"use_backend\(name\)"),
        (lambda: CHOICE.select(2, "cpu", "tritn"), "backend"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(call, who):
    with pytest.raises(ValueError, match=f"{who} must be one of 'cuda', 'triton', 'torch', 'reference', got 'tritn'"):
        call()


def test_an_unknown_name_in_the_environment(monkeypatch):
    monkeypatch.setattr(module, "_environment", "tritn")
    with pytest.raises(ValueError, match=r"environment variable PYTRANSFORMER_BACKEND must be one of .* got 'tritn'"):
        CHOICE.select(2, "cpu")


@pytest.mark.parametrize(("value", "named"), [("reference", "reference"), ("", None)])
def test_the_environment_is_read_at_import(value, named, monkeypatch):
    """In a second copy of the module, as the other tests need the first as it is."""
    monkeypatch.setenv("PYTRANSFORMER_BACKEND", value)
    specification = importlib.util.spec_from_file_location("pytransformer.ops.second_backend", module.__file__)
    second = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, specification.name, second)
    specification.loader.exec_module(second)
    monkeypatch.delenv("PYTRANSFORMER_BACKEND")
    assert second.requested_backend(None) == named


def test_interpreted_kernels_serve_on_request_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(module, "_triton_compiles", lambda: False)
    choice = BackendChoice("halve", (Backend("triton", halve), Backend("reference", halve)))
    assert choice.select(2, "cpu") == "reference"
    assert choice.select(2, "cpu", "triton") == "triton"


@pytest.mark.parametrize(
    ("device_type", "interpret", "installed", "compiles", "reason"),
    [
        ("cpu", "1", True, False, None),
        ("cpu", "1", True, True, "TRITON_INTERPRET=1 was set after triton had been imported"),
        ("cpu", "0", True, True, "Triton needs a GPU"),
        ("cuda", "0", True, True, None),
        ("cuda", "1", True, False, "TRITON_INTERPRET=1 is set"),
        ("mps", "0", True, True, "device type 'cuda', not 'mps'"),
        ("cuda", "0", False, False, "triton is not installed"),
    ],
)
def test_when_triton_is_there(device_type, interpret, installed, compiles, reason, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(module, "_is_triton_installed", lambda: installed)
    monkeypatch.setattr(module, "_triton_compiles", lambda: compiles)
    found = unavailable("triton", device_type)
    assert (found is None) if reason is None else (reason in found)


def test_the_report_says_what_serves_and_what_does_not(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(module.extension, "_load", lambda: "the CUDA extension was not built")
    assert CHOICE.report("cpu") == {
        "cuda": "the CUDA extension was not built",
        "triton": "Triton needs a GPU; on a CPU its interpreter serves when TRITON_INTERPRET=1 is set before triton is imported",
        "torch": "serves, except odd numbers",
        "reference": "serves",
    }
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(module, "_triton_compiles", lambda: False)
    assert CHOICE.report("cpu")["triton"] == "there is no triton implementation of halve yet"


def test_the_overview_names_every_op():
    table = backends("cpu")
    assert list(table) == [choice.op for choice in CHOICES]
    assert len(table) == 13
    for row in table.values():
        assert set(row) == {"cuda", "triton", "torch", "reference"}
        assert row["reference"] == "serves"
    assert set(backends()) == set(table)


def test_a_warning_is_given_once(monkeypatch):
    monkeypatch.setattr(module, "_given_warnings", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for message in ("one", "two", "one"):
            warn_once(message)
    assert [str(warning.message) for warning in caught] == ["one", "two"]
    assert all(warning.category is RuntimeWarning for warning in caught)


def test_a_warning_is_given_while_tracing(monkeypatch):
    monkeypatch.setattr(module, "_given_warnings", set())

    def function(x):
        warn_once("while tracing")
        return x + 1

    torch._dynamo.reset()
    with pytest.warns(RuntimeWarning, match="while tracing"):
        assert torch.compile(function, fullgraph=True, backend="eager")(torch.zeros(1)) == 1


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def test_what_is_plain():
    x = torch.zeros(2)
    seen = []
    assert is_plain(x, None, torch.nn.Parameter(x), x.requires_grad_())
    assert not is_plain(x, x.as_subclass(Subclass))
    with Mode():
        assert not is_plain(x)
    with torch.overrides.TorchFunctionMode():
        assert not is_plain(x)
    torch.func.grad(lambda x: (seen.append(is_plain(x)), x.sum())[1])(torch.zeros(2))
    torch.func.vmap(lambda x: (seen.append(is_plain(x)), x)[1])(torch.zeros(2))
    assert seen == [False, False]
    compiled = torch.compile(lambda x: x + (2 if is_plain(x) else 1), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(1)), torch.ones(1))
