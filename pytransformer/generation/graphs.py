"""The decode step as a CUDA graph: recorded once in a call of ``generate``, replayed for every token after.

A step launches some ten kernels a layer, and for few sequences the host takes longer to launch them than the GPU to run them. A replay
launches all at once. It runs the same kernels on the same addresses, so whatever changes from step to step must be read from tensors that
stay where they are: the tokens, the lengths (``cache.lengths``, written in place) and the block tables. What the host does between two
steps, such as handing out pages, stays outside. Grids follow the cache's capacity, never its lengths, so nothing is recorded anew.

:func:`record` is the only part that needs a GPU; tests replay the step itself with every number of the host frozen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pytransformer.model.transformer import Transformer
from pytransformer.ops import checks
from pytransformer.ops.backend import requested_backend

from .caches import SequenceCache

# Recording costs about two steps, and some milliseconds for the graph itself.
WORTHWHILE_TOKENS = 8
# Of a head: beyond it the ops go to torch, which reads the lengths.
_LARGEST_HEAD_DIM = 256


def why_not_recorded(model: Transformer) -> str | None:
    """The reason why the decode step of this model cannot be a CUDA graph here and now, or ``None``."""
    weight = model.model.embed_tokens.weight
    if weight.device.type != "cuda":
        return f"the model is on {weight.device.type}, and CUDA graphs are for CUDA devices"
    if (backend := requested_backend(None)) not in (None, "triton", "cuda"):
        return f"the backend {backend!r} was asked for, which reads the lengths on the host"
    if checks.DEBUG:
        return "PYTRANSFORMER_DEBUG=1 reads what lies on the device in each step"
    if weight.dtype == torch.float64 or model.config.head_dim > _LARGEST_HEAD_DIM:
        return f"float64, and a head_dim above {_LARGEST_HEAD_DIM}, are served by torch, which reads the lengths on the host"
    if torch.is_autocast_enabled("cuda") or torch.compiler.is_compiling():
        return "autocast and torch.compile have machinery of their own"
    return why_step_varies(model)


def why_step_varies(model: Transformer) -> str | None:
    """The reason why a step of this model depends on numbers that the host has, or ``None``; whatever the device."""
    stack, config = model.model, model.config
    if any(rotary.depends_on_length for rotary in stack.rotaries):
        return "RoPE's frequencies depend on the length, which the host looks at in each step"
    if stack.alibi_bias is not None or stack.relative_bias is not None:
        return "the bias that is added to the scores grows with the longest sequence"
    if config.is_encoder_decoder:
        return "the decoder of an encoder-decoder is not recorded"
    if config.num_experts:
        return "experts are not recorded: on some paths the host counts their tokens"
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "a global module hook is set, which a replay would not call"
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a forward hook is set on a {type(module).__name__}, which a replay would not call"
    return None


class RecordedStep:
    """One token of each sequence through the model: recorded in the first call, replayed in those after.

    Args:
        decoder, head: hidden states of tokens (batch, 1), and their logits; as :func:`pytransformer.generation.bound.bind` gives them.
        cache: filled by a prefill; its tensors must stay where they are, and :meth:`SequenceCache.advance` is the caller's to call.
        required: whether a recording that fails is an error; else each step is launched by the host then, after one warning.
    """

    def __init__(
        self,
        decoder: Callable[..., Tensor],
        head: Callable[[Tensor], Tensor],
        cache: SequenceCache,
        *,
        required: bool = False,
    ) -> None:
        self._decoder, self._head, self._cache, self._required = decoder, head, cache, required
        self._tokens = torch.zeros(cache.batch, dtype=torch.int64, device=cache.lengths.device)
        self._replay: Callable[[], Tensor] | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (batch, vocab_size) behind the tokens (batch), which go into the cache; the caller's to keep.

        Raises:
            ValueError: they would not fit; nothing is written then.
            PoolExhausted: see :meth:`PagedCache.reserve`.
            RuntimeError: the recording failed, where it is required.
        """
        self._cache.reserve(1)
        self._tokens.copy_(tokens)
        if self._replay is None:
            self._replay = self._record()
        return self._replay().clone()

    def _record(self) -> Callable[[], Tensor]:
        try:
            return record(self._step)
        except RuntimeError as error:
            if self._required:
                raise
            warnings.warn(
                f"the decode step could not be recorded as a CUDA graph and is launched by the host: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return self._step

    def _step(self) -> Tensor:
        """What is recorded. It may run any number of times before the lengths advance: it writes the same cells each time."""
        self._cache.forget_step()
        hidden = self._decoder(self._tokens[:, None], cache=self._cache)
        return self._head(hidden[:, 0])


def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a function that replays it; the tensor it returns is the same each time, and overwritten."""
    # Compiling, loading and choosing of kernels, and cuBLAS's workspace, must not fall into the recording.
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def check_option(cuda_graph: Any, model: Transformer, use_cache: bool) -> bool | None:
    """The option of :func:`pytransformer.generation.generate`; TypeError or ValueError where it cannot be."""
    if cuda_graph is not None and not isinstance(cuda_graph, bool):
        raise TypeError(f"cuda_graph must be True, False or None (where it can be), got {cuda_graph!r}")
    if cuda_graph:
        reason = "use_cache=False computes whole sequences" if not use_cache else why_not_recorded(model)
        if reason is not None:
            raise ValueError(f"cuda_graph=True asks for a CUDA graph of the decode step, but {reason}")
    return cuda_graph
