"""Ops as torch.library has them: one factory for schema, implementation, fake tensors, autograd, vmap, no double backward."""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pytransformer.ops.backend import PLAIN_TYPES, Backend, Outputs, functorch_level, is_plain, is_traced
from pytransformer.ops.overlap import Apart

Spec = tuple[Sequence[int], torch.dtype] | None

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    str: "str",
    tuple[int, int]: "SymInt[2]",
    torch.dtype | None: "ScalarType?",
}


class RegisteredOp:
    """``torch.ops.pytransformer.<name>``: a call's arguments and the name of a backend, to a fixed number of tensors.

    Called in eager mode on plain tensors, the backend runs without the dispatcher's detour.

    Args:
        name: of the op.
        call: the NamedTuple of its arguments, tensors (or None) first; its annotations are the schema.
        backends: what computes it.
        outputs: of a call and a backend's name the (shape, dtype) of each output, ``None`` likewise.
        num_outputs: how many.
        written: names of the arguments that the op changes.
        refusal: of a call, what refuses calls laid out like it that share memory which is written; by default in the words of the fields.
    """

    def __init__(
        self,
        name: str,
        call: Any,
        backends: Sequence[Backend],
        outputs: Callable[[Any, str], Sequence[Spec]],
        num_outputs: int,
        *,
        written: Sequence[str] = (),
        refusal: Callable[[Any], Apart] | None = None,
    ) -> None:
        self.refusal = refusal or (self._apart if written else None)
        self.name, self.call, self.outputs, self.num_outputs, self.written = name, call, outputs, num_outputs, written
        self.runs = {backend.name: backend.run for backend in backends}
        types = typing.get_type_hints(call)
        self.num_tensors = sum(kind in (Tensor, Tensor | None) for kind in types.values())
        aliases = iter("abcdefgh")
        arguments = []
        for argument, kind in types.items():
            schema = _SCHEMA_TYPES[kind]
            if argument in written:
                schema = schema.replace("Tensor", f"Tensor({next(aliases)}!)")
            arguments.append(f"{schema} {argument}")
        results = ("()", "Tensor")[num_outputs] if num_outputs < 2 else f"({', '.join(['Tensor'] * num_outputs)})"
        full = f"pytransformer::{name}"
        schema = f"({', '.join(arguments)}, str backend) -> {results}"
        torch.library.define(full, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(full, "CompositeExplicitAutograd", self._implementation)
        torch.library.register_fake(full, self._fake)
        self.op: Any = getattr(torch.ops.pytransformer, name).default
        REGISTERED.append(self)

    def __call__(self, *args: Any) -> Any:
        """Outputs of a flat call, which ends with the backend's name."""
        if is_plain(*args[: self.num_tensors]) and not args[0].is_meta:
            return self.runs[args[-1]](self.call(*args[:-1]))
        return self.listed(self.op(*args))

    def listed(self, outputs: Any) -> Outputs:
        """What torch returns for this op, as a tuple whatever the number of outputs."""
        if self.num_outputs > 1:
            return tuple(outputs)
        return () if outputs is None else (outputs,)

    def filled(self, outputs: Outputs, like: Tensor) -> tuple[Tensor, ...]:
        """An op returns a fixed number of tensors: what there is none of is an empty one."""
        return tuple(like.new_empty(0) if output is None else output for output in outputs)

    def _apart(self, call: Any) -> Apart:
        return Apart(call._fields[: self.num_tensors], self.written, call[: self.num_tensors])

    def check_apart(self, call: Any) -> None:
        """ValueError if a tensor that is written shares memory with another; where tensors have no addresses (traced, mapped) the op's
        implementation asks again."""
        if self.refusal is None or is_traced() or functorch_level() is not None:
            return
        if PLAIN_TYPES.issuperset(map(type, call[: self.num_tensors])):
            self.refusal(call)(call)

    def _returned(self, tensors: Sequence[Tensor]) -> Any:
        return tuple(tensors) if self.num_outputs > 1 else tensors[0] if tensors else None

    def _implementation(self, *args: Any) -> Any:
        if self.refusal is not None:
            self.check_apart(self.call(*args[:-1]))
        outputs = self.filled(self.runs[args[-1]](self.call(*args[:-1])), args[0])
        # Views and other layouts would break the promise of the fake tensors.
        return self._returned([output.contiguous() for output in outputs])

    def _fake(self, *args: Any) -> Any:
        like: Tensor = args[0]
        specs = self.outputs(self.call(*args[:-1]), args[-1])
        return self._returned(
            [
                like.new_empty(0) if spec is None else torch.empty(spec[0], dtype=spec[1], device=like.device)
                for spec in specs
            ]
        )


REGISTERED: list[RegisteredOp] = []


def like(tensor: Tensor | None) -> Spec:
    """The (shape, dtype) of a tensor."""
    return None if tensor is None else (tensor.shape, tensor.dtype)


class Differentiable:
    """The gradient of a registered op: an ``autograd.Function`` for eager mode and torch.func, the same rule registered for torch.compile.

    Args:
        op: the op.
        save: puts what the backward pass needs into the context; of (ctx, call, outputs).
        gradients: by name of an argument; of (ctx, run, gradient of each output). A gradient is None where nothing flows back, as of an
            output that was not used or whose user (a reentrant checkpoint, say) has none for it; never are all of them. ``run`` is
            ``backward``, recorded if need be.
        backward: the backward pass, of flat arguments; ``None`` = the op itself, which is then differentiable any number of times.
        title: of the public functions, for the refusal of a second derivative.
    """

    def __init__(
        self,
        op: RegisteredOp,
        save: Callable[[Any, Any, tuple[Tensor, ...]], None],
        gradients: Callable[..., dict[str, Tensor | None]],
        backward: Callable[..., Any] | None = None,
        title: str = "",
    ) -> None:
        once = None if backward is None else _once(backward, title)
        fields = op.call._fields

        def forward(*args: Any) -> tuple[Tensor, ...]:
            return op.filled(op(*args), args[0])

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.backend = inputs[-1]
            # An output that was not used costs no tensor of zeros.
            ctx.set_materialize_grads(False)
            save(ctx, op.call(*inputs[:-1]), op.listed(output))  # type: ignore[arg-type]

        def differentiate(ctx: Any, *dout: Tensor | None) -> tuple[Tensor | None, ...]:
            if all(gradient is None for gradient in dout):
                return (None,) * (len(fields) + 1)
            recorded = records_backward()
            run = (backward or op) if not recorded else (once or self.function).apply
            found = gradients(ctx, run, *dout)
            return (*map(found.get, fields), None)

        self.function = _function(op.name, forward, setup_context, differentiate)
        # What Function.apply comes to where no functorch transform is at work, without binding the arguments to forward's signature first:
        # that takes the host as long as all else here.
        self._apply: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, self.function).apply  # type: ignore[misc]
        # torch.compile sees the op rather than the Function. (In eager mode the Function comes first: torch.func refuses registered rules.)
        torch.library.register_autograd(f"pytransformer::{op.name}", differentiate, setup_context=setup_context)

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        """Outputs of a flat call that is recorded."""
        if functorch_level() is None:
            return self._apply(*args)
        outputs: tuple[Tensor, ...] = self.function.apply(*args)
        return outputs


def _function(name: str, forward: Any, setup_context: Any, backward: Any) -> Any:
    """An ``autograd.Function`` whose nodes in a graph have the name of its op."""

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return vmap_by_loop(function, info, in_dims, *args)

    parts = {"forward": forward, "setup_context": setup_context, "backward": backward, "vmap": vmap}
    function = type(name, (torch.autograd.Function,), {key: staticmethod(part) for key, part in parts.items()})
    return function


def _once(backward: Callable[..., Any], title: str) -> Any:
    """A backward pass where it is itself recorded: a second derivative is refused rather than wrong."""

    def forward(*args: Any) -> tuple[Tensor, ...]:
        like = next(arg for arg in args if isinstance(arg, Tensor))
        return tuple(like.new_empty(0) if output is None else output for output in backward(*args))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.num_inputs = len(inputs)
        ctx.set_materialize_grads(False)

    def refuse(ctx: Any, *gradients: Tensor | None) -> Any:
        if all(gradient is None for gradient in gradients):
            return (None,) * ctx.num_inputs
        raise RuntimeError(
            f"{title} has no double backward: its gradient was computed by a fused kernel; use backend='reference' "
            "where second derivatives are needed"
        )

    return _function(f"{title} backward", forward, setup_context, refuse)


def vmap_by_loop(function: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """A vmap rule for a ``torch.autograd.Function``: applies it to one slice after another and stacks the results.

    Returns:
        The stacked outputs and their batch dimensions (all 0), as the ``vmap`` staticmethod of a Function must.
    """
    results = []
    for index in range(info.batch_size):
        sliced = [
            arg.select(dim, index) if isinstance(arg, Tensor) and dim is not None else arg
            for arg, dim in zip(args, in_dims)
        ]
        results.append(function.apply(*sliced))
    return tuple(torch.stack(outputs) for outputs in zip(*results)), (0,) * len(results[0])


def records_backward() -> bool:
    """Whether a backward pass is itself being recorded (create_graph=True, functorch); the compiler differentiates once only."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


@contextlib.contextmanager
def autograd_inside_an_op() -> Iterator[None]:
    """Lets the implementation of an op use autograd: inside a dispatch mode it runs below it, where nothing is recorded."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield
