"""A kernel's functions as generators, so that a partition can wait in the middle of a function that another one called.

The function is compiled anew from its source with one change: a call whose result is a generator is run as a part of
the caller. Lines stay as they are.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any

from .source import MARK
from .tasks import Steps

_RESULT, _TYPE, _GENERATOR, _NOW = "__result__", "__type__", "__generator__", "__now__"


class _Calls(ast.NodeTransformer):
    """``f(x)`` as ``(yield from result) if type(result := f(x)) is generator else result``.

    Where that cannot stand, in comprehensions and lambdas, as ``now(f(x))``, which may not wait.
    """

    def __init__(self) -> None:
        self._nested = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if self._nested:
            made: ast.expr = ast.Call(ast.Name(_NOW, ast.Load()), [node], [])
        else:
            named = ast.NamedExpr(ast.Name(_RESULT, ast.Store()), node)
            test = ast.Compare(
                ast.Call(ast.Name(_TYPE, ast.Load()), [named], []), [ast.Is()], [ast.Name(_GENERATOR, ast.Load())]
            )
            result = ast.Name(_RESULT, ast.Load())
            made = ast.IfExp(test, ast.YieldFrom(result), result)
        ast.copy_location(made, node)
        for child in ast.walk(made):
            if not hasattr(child, "lineno"):
                ast.copy_location(child, node)
        return made

    def _inside(self, node: ast.AST) -> ast.AST:
        self._nested += 1
        self.generic_visit(node)
        self._nested -= 1
        return node

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_Lambda = _inside


def now(result: Any) -> Any:
    """A result; of a generator, that of its end.

    Raises:
        NotImplementedError: it would have to wait.
    """
    if not isinstance(result, types.GeneratorType):
        return result
    try:
        while True:
            if next(result) is not None:
                raise NotImplementedError(
                    "the Gluon interpreter cannot wait in a comprehension, a lambda or a reduction"
                )
    except StopIteration as end:
        return end.value


def as_steps(
    function: Callable[..., Any], translate: Callable[[Any], Any], names: dict[str, Any]
) -> Callable[..., Steps]:
    """The function as one that returns a generator.

    Args:
        function: of a kernel, undecorated.
        translate: what it sees in place of a global value.
        names: what it sees by these names, if it has no globals of that name.
    """
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    ast.increment_lineno(tree, first - 1)
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    definition.decorator_list, definition.returns = [], None
    definition.args.defaults = [ast.copy_location(ast.Constant(None), node) for node in definition.args.defaults]
    definition.args.kw_defaults = [
        node and ast.copy_location(ast.Constant(None), node) for node in definition.args.kw_defaults
    ]
    definition.body = [_Calls().visit(statement) for statement in definition.body]
    # Even a function that calls nothing is to be a generator.
    never = ast.parse("if False: yield").body[0]
    definition.body.append(ast.copy_location(never, definition.body[-1]))
    ast.fix_missing_locations(tree)
    seen = _globals(function, translate, names)
    exec(compile(tree, inspect.getfile(function), "exec"), seen)
    made: Any = seen[definition.name]
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    own = function.__globals__.get(definition.name, made)
    seen[definition.name] = translate(own)  # what its own name means in it
    steps: Callable[..., Steps] = made
    return steps


def _globals(function: Any, translate: Callable[[Any], Any], names: dict[str, Any]) -> dict[str, Any]:
    code = function.__code__
    known = function.__globals__
    found = {name: known[name] for name in _names(code) if name in known}
    for name, cell in zip(code.co_freevars, function.__closure__ or ()):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not bound yet, as a function that is defined further down
            continue
    seen = {**names, **{name: translate(value) for name, value in found.items()}}
    seen |= {MARK: True, _TYPE: type, _GENERATOR: types.GeneratorType, _NOW: now}
    seen |= {"__builtins__": builtins, "__name__": known.get("__name__", "")}
    return seen


def _names(code: types.CodeType) -> set[str]:
    nested = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*nested)
