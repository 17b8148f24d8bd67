"""The hall: the one way from a public function to its kernel, walked by every operation.

A public function hands over its arguments as they were given, a tuple in the order of the op's call. Then:

1. **seen before**: an eager call on plain tensors that is like one that passed the checks goes straight to its launch;
2. **check**: each argument, on the host; what is left is the call, a value;
3. **choose**: the backend that was named, or the first that can serve;
4. **keep** the launch, for 1;
5. traced: the **registered** op; recorded for a backward pass: the **autograd Function**; else the backend **directly**.

An op is one :class:`Op` in its room (ops/<op>/), with a :class:`Backend` for each way to compute it.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pytransformer.ops import backend as choice
from pytransformer.ops import checks
from pytransformer.ops.backend import (
    PLAIN_TYPES,
    Backend,
    BackendChoice,
    Outputs,
    dispatch_modes,
    forward_ad,
    functorch_level,
    is_any_autocast_enabled,
    is_function_mode_enabled,
    is_plain,
    is_traced,
    mark_changed,
)
from pytransformer.ops.launches import Launches, forget_kept
from pytransformer.ops.precision import is_autocasting
from pytransformer.ops.registered import Differentiable, RegisteredOp

_is_grad_enabled = torch.is_grad_enabled


class Op:
    """An operation.

    Args:
        name: of the public function.
        registered: what torch.compile and dispatch modes see; its call's arguments are the op's.
        check: returns the checked call of one as given, or raises what the public function documents. That what is written shares no
            memory with another argument is checked here.
        backends: best first.
        result: what the public function returns, of a checked call and the outputs; by default the first output.
        rule: the op under autograd; ``None`` = it has no gradient.
        grads: names of the tensors that have a gradient, or that are refused if they want one.
        values: names of the tensors whose values the checks read, where they may be read: launches of such calls are not kept.
        lengths, check_lengths: names of further such tensors, and the check of their values, which is made again before each kept launch.
        varying: the last argument is an int that differs from call to call, for the launch to look at.
        casts: whether autocast changes the call.
    """

    def __init__(
        self,
        name: str,
        registered: RegisteredOp,
        check: Callable[[Any], Any],
        backends: Sequence[Backend],
        *,
        result: Callable[[Any, Outputs], Any] = lambda call, outputs: outputs[0],
        rule: Differentiable | None = None,
        grads: Sequence[str] = (),
        values: Sequence[str] = (),
        lengths: Sequence[str] = (),
        check_lengths: Callable[[Any], None] | None = None,
        varying: bool = False,
        casts: bool = False,
    ) -> None:
        self.name, self.registered, self.check, self.result = name, registered, check, result
        self.rule, self.casts, self.grads, self.varying = rule, casts, tuple(grads), varying
        self.call, self.num_tensors = registered.call, registered.num_tensors
        self.choice = BackendChoice(name, tuple(backends))
        self._backends = {backend.name: backend for backend in backends}
        self._grads, self._values = _getter(self.call, grads), _getter(self.call, values)
        self._lengths, self._check_lengths = _getter(self.call, lengths), check_lengths
        self._written = _getter(self.call, registered.written) if registered.written else None
        # By the name of a backend: launches of calls without a gradient, and what checked calls with one become.
        self._launches: dict[str | None, Launches[Callable[[Any], Any]]] = {}
        self._recorded: dict[str | None, Launches[tuple[Any, ...]]] = {}
        self._direct: dict[tuple[str | None, bool], Callable[..., Any] | None] = {}
        _EVERY.append(self)

    def __call__(self, given: tuple[Any, ...], backend: str | None) -> Any:
        """The public result of arguments as given."""
        error = direct = None
        # A dual tensor is plain by its type, and would lose its tangent.
        if (
            not is_traced()
            and functorch_level() is None
            and dispatch_modes() == 0
            and not is_function_mode_enabled()
            and forward_ad._current_level < 0
            and not (self.casts and is_any_autocast_enabled())
        ):
            named = backend or choice._override.name or choice._environment
            try:
                if _is_grad_enabled() and requires_grad(self._grads(given)):
                    rest = self._recorded[named].find(given)
                    if rest is not None:
                        args = (*given[: self.num_tensors], *rest)
                        return self.result(self.call(*args[:-1]), self.rule(*args))  # type: ignore[misc]
                else:
                    direct = self._direct[named, given[0].is_cuda]
                    # A subclass should see the registered op; kept launches are of plain tensors anyway.
                    if direct is not None and type(given[0]) in PLAIN_TYPES:
                        return direct(*given)
                    launch = self._launches[named].find(given)
                    if launch is not None:
                        return launch(given)
            except Exception as raised:
                # Nothing is kept yet, or an argument is not as it should be: the checks say which. If they find nothing, a launch has
                # failed, which must not be tried another way; ValueError is what a launch says of a call that it leaves to others.
                error = raised
        call = self.check(self.call(*given))
        self.registered.check_apart(call)
        # What the direct way refuses may be beyond its backend: an error of its own, or another backend's to serve.
        if error is not None and not isinstance(error, (KeyError, ValueError)):
            chosen = self._backends[self.choice.select(call, call[0].device.type, backend)]
            # A direct op may not know numpy's numbers, which the checks have made Python's.
            if direct is None or (chosen.direct is direct and not self._has_foreign_numbers(given)):
                raise error
        return self._walk(given, call, backend)

    def _walk(self, given: tuple[Any, ...], call: Any, backend: str | None) -> Any:
        """Choose, keep, run: for a checked call."""
        if self.rule is None and _is_grad_enabled():
            checks.refuse_grad(self.name, **{name: getattr(call, name) for name in self.grads})
        device_type = call[0].device.type
        chosen = self._backends[self.choice.select(call, device_type, backend)]
        if not torch.compiler.is_compiling():
            self._keep(given, call, chosen, backend)
        if is_autocasting(device_type):
            # Whatever is cast has been; what a backend computes in float32 inside must stay so.
            with torch.autocast(device_type, enabled=False):
                outputs = self._run(call, chosen)
        else:
            outputs = self._run(call, chosen)
        return self.result(call, outputs)

    def _run(self, call: Any, backend: Backend) -> Outputs:
        tensors = call[: self.num_tensors]
        # On the meta device there are no values to read, as some backends do: the fake tensors of the registered op are all that is wanted.
        is_meta = tensors[0].is_meta
        if backend.is_transparent(call) and not (is_meta and self.rule is not None):
            return backend.run(call)
        if torch.compiler.is_compiling():
            return self.registered.listed(self.registered.op(*call, backend.name))
        # Inside functorch a tensor does not always know that it is differentiated, and a dual tensor must meet the rule, which has no jvp.
        recorded = functorch_level() is not None or forward_ad._current_level >= 0
        if self.rule is not None and (recorded or (_is_grad_enabled() and requires_grad(self._grads(call)))):
            return self.rule(*call, backend.name)
        if is_meta or not is_plain(*tensors):
            return self.registered.listed(self.registered.op(*call, backend.name))
        outputs = backend.run(call)
        if self._written is not None:
            mark_changed(self._written(call))
        return outputs

    def _keep(self, given: tuple[Any, ...], call: Any, backend: Backend, asked: str | None) -> None:
        """Keeps the launch of a checked call, unless values were read for its checks or tensors replaced."""
        tensors = call[: self.num_tensors]
        if checks.DEBUG or not is_plain(*tensors) or call[0].is_meta or (self.casts and is_any_autocast_enabled()):
            return
        named = choice.requested_backend(asked)
        if named not in self._launches:
            self._launches[named] = Launches(varying=-1 if self.varying else None)
            self._recorded[named] = Launches()
        is_cuda = given[0].is_cuda
        if (named, is_cuda) not in self._direct:
            first = self.choice.first(given[0].device.type, named)
            self._direct[named, is_cuda] = None if first is None else self._backends[first].direct
        if any(before is not after for before, after in zip(given, tensors)) or self._has_foreign_numbers(given):
            return
        if _any_readable(self._values(call)):
            return
        if self.rule is not None and _is_grad_enabled() and requires_grad(self._grads(given)):
            if not backend.is_transparent(call):
                self._recorded[named].add(given, (*call[self.num_tensors :], backend.name))
        elif backend.plan is not None:
            launch = backend.plan(call)
            if launch is None:
                return
            if self._check_lengths is not None and _any_readable(self._lengths(call)):
                launch = _after(self._check_lengths, self.call, launch)
            self._launches[named].add(given, launch if self._written is None else _marking(launch, self._written))

    def _has_foreign_numbers(self, given: tuple[Any, ...]) -> bool:
        """Whether an option is a number of numpy's or a tensor: checked calls have Python's, and launches are kept for those alone."""
        return any(hasattr(option, "dtype") for option in given[self.num_tensors :])

    def forget(self) -> None:
        """Forgets what was kept: launches depend on which GPU they are for, and on which backends there are."""
        for kept in (self._launches, self._recorded, self._direct):
            kept.clear()


_EVERY: list[Op] = []


def forget_launches() -> None:
    """Forgets every launch that was kept, for tests and for compiling ahead of time."""
    for op in _EVERY:
        op.forget()
    forget_kept()


@contextlib.contextmanager
def triton_compiles_for_cpu_tensors() -> Iterator[None]:
    """Inside, Triton takes tensors of the CPU, as kernels are only compiled (pytransformer/precompile.py)."""
    forget_launches()
    choice._compiles_for_cpu_tensors = True
    try:
        yield
    finally:
        choice._compiles_for_cpu_tensors = False
        forget_launches()


def _getter(call: Any, names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """Takes the arguments of these names out of a call, or out of a tuple in its order."""
    places = [call._fields.index(name) for name in names]
    if len(places) > 1:
        return operator.itemgetter(*places)
    return operator.itemgetter(slice(places[0], places[0] + 1) if places else slice(0, 0))


def requires_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether one of the tensors requires a gradient; whether grad mode is on is the caller's to ask, first."""
    for tensor in tensors:  # noqa: SIM110 (a generator takes longer than the questions)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _any_readable(tensors: tuple[Tensor | None, ...]) -> bool:
    return any(tensor is not None and checks.readable(tensor) for tensor in tensors)


def _after(check: Callable[[Any], None], call: Any, launch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def check_and_launch(given: tuple[Any, ...]) -> Any:
        checked = call(*given)
        check(checked)
        return launch(checked)

    return check_and_launch


def _marking(launch: Callable[[Any], Any], written: Callable[[Any], tuple[Tensor, ...]]) -> Callable[[Any], Any]:
    def launch_and_mark(given: tuple[Any, ...]) -> Any:
        result = launch(given)
        mark_changed(written(given))
        return result

    return launch_and_mark
