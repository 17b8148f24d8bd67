"""PyTorch itself: its functions, and torch.compile of the plain formula."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pytransformer.benchmarks.definitions import formulas
from pytransformer.benchmarks.definitions.cases import (
    ActivationCase,
    AppendCase,
    LinearCrossEntropyCase,
    NormCase,
    RopeCase,
)
from pytransformer.benchmarks.harness.rows import Inputs, Variant
from pytransformer.benchmarks.peers.base import Factory, Peer, compiled

Formula = Callable[..., Any]


def _norm_function(case: NormCase) -> Factory:
    def norm(x: Tensor, inputs: Inputs) -> Tensor:
        shape = (case.width,)
        if case.op == "rms_norm":
            return F.rms_norm(x, shape, inputs["weight"], eps=case.eps)
        return F.layer_norm(x, shape, inputs["weight"], inputs["bias"], eps=case.eps)

    def call(inputs: Inputs) -> Any:
        if not case.residual:
            return norm(inputs["x"], inputs)
        total = inputs["x"] + inputs["residual"]
        return norm(total, inputs), total

    return lambda: call


def _eager(formula: Formula, arguments: Callable[[Inputs], tuple[Any, ...]]) -> Factory:
    return lambda: lambda inputs: formula(*arguments(inputs))


def _compiled(formula: Formula, arguments: Callable[[Inputs], tuple[Any, ...]]) -> Factory:
    def make() -> Variant:
        function = compiled(formula)
        return lambda inputs: function(*arguments(inputs))

    return make


def _norm_arguments(inputs: Inputs) -> tuple[Any, ...]:
    return inputs["x"], inputs["weight"], inputs.get("bias"), inputs.get("residual")


def _norm_formula(case: NormCase) -> Formula:
    return functools.partial(formulas.norm, centred=case.op == "layer_norm", eps=case.eps)


def _rope_arguments(inputs: Inputs) -> tuple[Any, ...]:
    return inputs["q"], inputs["k"], inputs["cos"], inputs["sin"]


def _append_arguments(inputs: Inputs) -> tuple[Any, ...]:
    names = ("k", "v", "k_cache", "v_cache", "cache_seqlens", "q", "cos", "sin", "q_norm_weight", "k_norm_weight")
    return tuple(inputs.get(name) for name in names)


def _append(wrap: Callable[..., Factory], case: AppendCase) -> Factory | None:
    if case.page_size or case.cache_dtype != "bf16":
        return None
    return wrap(formulas.append_, _append_arguments)


def _activation(wrap: Callable[..., Factory], case: ActivationCase) -> Factory:
    formula = getattr(formulas, case.op)
    if case.op == "gelu":
        return wrap(formula, lambda inputs: (inputs["x"],))
    return wrap(formula, lambda inputs: (inputs["gate"], inputs["up"]))


def _loss_arguments(inputs: Inputs) -> tuple[Any, ...]:
    return inputs["x"], inputs["weight"], inputs["targets"]


def _loss(wrap: Callable[..., Factory], case: LinearCrossEntropyCase) -> Factory | None:
    # Logits and their gradient in bfloat16, their float32 softmax: at 50 GB the eager way stops being one.
    if 10.0 * case.tokens * case.vocab_size > 50e9:
        return None
    return wrap(formulas.linear_cross_entropy, _loss_arguments)


def _compiled_rope(case: RopeCase) -> Factory:
    return _compiled(formulas.rope, _rope_arguments)


FUNCTIONS = Peer(
    "torch_function",
    "torch",
    "torch",
    {
        "rms_norm": _norm_function,
        "layer_norm": _norm_function,
        "rope": lambda case: _eager(formulas.rope, _rope_arguments),
        "kv_append": lambda case: _append(_eager, case),
        "linear_cross_entropy": lambda case: _loss(_eager, case),
        "swiglu": lambda case: _activation(_eager, case),
        "geglu": lambda case: _activation(_eager, case),
        "gelu": lambda case: _activation(_eager, case),
    },
    least_capability=None,
    always=True,
    notes={"rope": "the plain formula, one op after another", "kv_append": "the plain formula, one op after another"},
)

COMPILED = Peer(
    "torch_compile",
    "torch",
    "torch",
    {
        "rms_norm": lambda case: _compiled(_norm_formula(case), _norm_arguments),
        "layer_norm": lambda case: _compiled(_norm_formula(case), _norm_arguments),
        "rope": _compiled_rope,
        "kv_append": lambda case: _append(_compiled, case),
        "linear_cross_entropy": lambda case: _loss(_compiled, case),
        "swiglu": lambda case: _activation(_compiled, case),
        "geglu": lambda case: _activation(_compiled, case),
        "gelu": lambda case: _activation(_compiled, case),
    },
    always=True,
    slow_start=True,
)
