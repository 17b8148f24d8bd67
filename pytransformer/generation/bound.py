"""The decode step on a CPU without machinery: the model's own forward code over stand-ins whose parts are bound once.

One decoded token streams every weight through the caches and throws out whatever Python had there, so each call of a module, each argument
check and each choice of a backend costs several times what it costs in a loop of its own: 12 ms of a GPT-2 124M's 37 ms per token were
measured to be that. Within one call of ``generate`` nothing changes but the tokens and the lengths, so all of it can be settled before.

A stand-in has the attributes of a module and the functions of its class (``Block.forward`` is ``Block.forward``), but is a plain object:
calling it does not go through ``nn.Module``. Linear layers and norms are replaced by functions with their weights bound. What a model
computes is therefore written down in one place only, in nn/ and model/.

The prompt goes the same way: there it is oneDNN's products, which apply GELU before they write their result, that save time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pytransformer.model.block import Block
from pytransformer.model.heads import LMHead, QuantizedLMHead
from pytransformer.model.stack import Stack
from pytransformer.model.transformer import Transformer
from pytransformer.nn import Attention, FeedForward, LayerNorm, Linear, QuantizedLinear, RMSNorm, RowBlocks
from pytransformer.ops.backend import requested_backend

# Modules whose forward code may run over a stand-in; a subclass may do anything, so exactly these.
_LAYERS = (Linear, RowBlocks, QuantizedLinear)
_STAND_INS: tuple[type[nn.Module], ...] = (Stack, Block, Attention, FeedForward)


def bind(model: Transformer, *, packed: bool = True) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
    """(decoder, head) that compute what ``model.model`` and ``model.lm_head`` do, as long as no parameter changes.

    ``packed``: from packed copies of the weights where there are some, which must be up to date. Where :func:`why_not_bound` has a reason
    these are the modules themselves.
    """
    if why_not_bound(model) is not None:
        return model.model, model.lm_head
    return _bound(model.model, packed), _bound_head(model.lm_head, packed)


def why_not_bound(model: Transformer) -> str | None:
    """The reason why a step of this model must go through its modules, or ``None``."""
    weight = model.model.embed_tokens.weight
    if weight.device.type != "cpu":
        return "binding is for CPUs; on a GPU the host runs ahead of the device"
    if requested_backend(None) not in (None, "torch"):
        return "a backend other than torch was asked for"
    if model.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return "training, autograd, autocast and torch.compile need the modules"
    if any(type(parameter) is not nn.Parameter or parameter.dtype != weight.dtype for parameter in _parameters(model)):
        return "parameters of several dtypes, or of a subclass of nn.Parameter"
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "a global module hook is set"
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a forward hook is set on a {type(module).__name__}"
        if "forward" in vars(module):
            return f"a {type(module).__name__} has been given a forward of its own"
    return None


def _parameters(model: Transformer) -> Iterator[nn.Parameter]:
    """All but codes and their scales, which have dtypes of their own."""
    for module in model.modules():
        own = [module.bias] if isinstance(module, QuantizedLinear) else module._parameters.values()
        yield from (parameter for parameter in own if parameter is not None)


def _bound(module: nn.Module, packed: bool) -> Any:
    """The stand-in of a module, or the module itself where it has none."""
    if isinstance(module, _LAYERS) and type(module) in _LAYERS:
        return module.product(packed=packed)
    if type(module) is LayerNorm or type(module) is RMSNorm:
        return _bound_norm(module)
    if type(module) is FeedForward and (product := module.product(packed=packed)) is not None:
        return product
    if isinstance(module, nn.ModuleList):
        return [_bound(child, packed) for child in module]
    if type(module) not in _STAND_INS:
        return module
    stand_in = _stand_in_class(type(module))()  # type: ignore[arg-type]
    # Hooks, parameters and the rest of nn.Module's own attributes begin with an underscore.
    vars(stand_in).update((name, value) for name, value in vars(module).items() if not name.startswith("_"))
    for name, child in module.named_children():
        # The norms of q and k are not called but handed to the cache, which fuses them.
        keep = isinstance(module, Attention) and not isinstance(child, _LAYERS)
        setattr(stand_in, name, child if keep else _bound(child, packed))
    for name in (name for name, child in module._modules.items() if child is None):
        setattr(stand_in, name, None)
    for name, parameter in module._parameters.items():
        setattr(stand_in, name, parameter)
    return stand_in


@functools.cache
def _stand_in_class(kind: type[nn.Module]) -> type:
    functions = {name: value for name, value in vars(kind).items() if not name.startswith("__")}
    return type(f"Bound{kind.__name__}", (), {**functions, "__call__": kind.forward})


def _bound_head(module: LMHead | QuantizedLMHead, packed: bool) -> Callable[[Tensor], Tensor]:
    product, softcap = module.product(packed=packed), module.softcap
    if module.transform is None and module.scale_of_features == 1.0:
        return product if softcap == 0.0 else lambda x: softcap * torch.tanh(product(x) / softcap)
    return module


def _bound_norm(module: LayerNorm | RMSNorm) -> Callable[..., Any]:
    if len(module.normalized_shape) != 1 or (isinstance(module, RMSNorm) and module.weight_offset != 0.0):
        return module
    shape, weight = module.normalized_shape, module.weight
    norm: Callable[[Tensor], Tensor]
    # Those of torch.nn.functional are Python before they are these.
    if isinstance(module, RMSNorm):
        rms_norm, eps = torch.rms_norm, torch.finfo(torch.float32).eps if module.eps is None else module.eps
        norm = lambda x: rms_norm(x, shape, weight, eps)  # noqa: E731
    else:
        layer_norm, bias, eps = torch.layer_norm, module.bias, module.eps
        norm = lambda x: layer_norm(x, shape, weight, bias, eps)  # noqa: E731

    def add_and_norm(x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return norm(x)
        total = x + residual
        return norm(total), total

    return add_and_norm
