"""Compiles the Triton kernels of a model's shapes before they are needed, for the GPU that is here or for another one.

Triton keeps what it has compiled on disk (TRITON_CACHE_DIR, ~/.triton/cache by default) under a key made of the kernel's source, what it
was specialised for, the options, the architecture, the versions of Triton and ptxas, and the environment variables of :func:`environment`:
nothing else of the machine. So a container image can be built with its kernels compiled, and finds them if it runs with the same of these
variables, best with none. Sequence lengths, batch sizes and cache lengths are no part of the key: one of each is enough.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pytransformer import extension
from pytransformer.model.config import TransformerConfig
from pytransformer.ops.backend import WIDEST_HEAD, use_backend
from pytransformer.ops.op import triton_compiles_for_cpu_tensors

_MANY_TOKENS = 1024  # a prefill: more than a few for each SM, from where on kv_append takes larger tiles
_LONG_CACHE = 8192  # a decode step over so many keys is split


@dataclass(frozen=True)
class Shapes(TransformerConfig):
    """A model's configuration, with what its kernels are compiled for besides.

    Attributes:
        dtype: of activations, weights and cache.
        page_size: of a paged KV cache; None = a contiguous one.
    """

    dtype: torch.dtype = torch.bfloat16
    page_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page_size is not None and self.page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {self.page_size}")

    @staticmethod
    def of(config: TransformerConfig, dtype: torch.dtype = torch.bfloat16, page_size: int | None = None) -> Shapes:
        """The shapes of a model."""
        return Shapes(**config.to_dict(), dtype=dtype, page_size=page_size)


@dataclass(frozen=True)
class Compiled:
    """One kernel that is now on disk.

    Attributes:
        op: the op that launches it.
        kernel: its name.
        found: whether it was there before.
        seconds: that finding or compiling it took.
    """

    op: str
    kernel: str
    found: bool
    seconds: float


# These become options of the compilation; the others are those that Triton's library lists itself.
_OPTION_VARIABLES = (
    "TRITON_DEBUG",
    "TRITON_INSTRUMENTATION_MODE",
    "TRITON_OVERRIDE_ARCH",
    "TRITON_LIBDEVICE_PATH",
    "TRITON_PTXAS_PATH",
    "TRITON_PTXAS_BLACKWELL_PATH",
    "PTXAS_OPTIONS",
)


def environment() -> dict[str, str]:
    """The environment variables that are set and in the key of whatever Triton compiles, even at the values that are their defaults.

    A kernel is found by processes that have the same of them set to the same values. Triton reads them for every kernel, whatever options
    a launch names (a variable for the default of fused multiply-adds counts although each launch of ours says that it wants them), so that
    nothing here can leave them out.
    """
    from triton._C.libtriton import get_cache_invalidating_env_vars

    found = {name: os.environ[name] for name in _OPTION_VARIABLES if name in os.environ}
    return dict(sorted((found | get_cache_invalidating_env_vars()).items()))


def warmup(
    shapes: Shapes | TransformerConfig,
    *,
    ops: Iterable[str] | None = None,
    training: bool = False,
    arch: int | None = None,
    load: bool = False,
    progress: Callable[[str, int, int], object] | None = None,
) -> list[Compiled]:
    """Compiles what the ops launch for these shapes into Triton's cache on disk. Without ``load`` launches nothing and needs no GPU.

    Args:
        shapes: of the model, or its configuration (then for bfloat16 and a contiguous cache; :meth:`Shapes.of` takes others).
        ops: names out of :data:`OPS`; None = those of :data:`MODEL_OPS`.
        training: the backward passes too.
        arch: compute capability as major · 10 + minor, for another GPU than the one here; None = the current GPU.
        load: also load the kernels onto the current GPU, so that a first call of this process neither compiles nor loads, as it must not
            while a CUDA graph is captured. Those of the CUDA extension, where it is built, are launched for that, on zeros.
        progress: called before each call of an op with its name, the number of calls done and of all.

    Returns:
        Each kernel that was looked up on disk, once; with ``load`` those are not among them that this process had already.

    Raises:
        ValueError: an unknown op or arch, no ``arch`` on a machine without a GPU, or ``load`` there or together with an ``arch``.
        RuntimeError: TRITON_INTERPRET is set.
        ImportError: Triton is not installed.
    """
    shapes = shapes if isinstance(shapes, Shapes) else Shapes.of(shapes)
    names = MODEL_OPS if ops is None else tuple(ops)
    for name in names:
        if name not in OPS:
            raise ValueError(f"ops must be among {', '.join(OPS)}, got {name!r}")
    if load and (arch is not None or not torch.cuda.is_available()):
        here = "this machine has none" if arch is None else f"arch must be None, got {arch}"
        raise ValueError(f"load=True loads kernels onto the current GPU, and {here}")
    if arch is None and not torch.cuda.is_available():
        raise ValueError("arch must be given on a machine without a GPU, e.g. 90 for an H100 or H200")
    calls = [(name, call) for name in names for call in OPS[name](shapes, training)]
    compiled: dict[str, Compiled] = {}
    with _compiling(arch, load) as looked_up, torch.set_grad_enabled(True), use_backend("triton"):
        for index, (name, call) in enumerate(calls):
            if progress is not None:
                progress(name, index, len(calls))
            start, before = time.perf_counter(), len(looked_up)
            for _ in range(2):  # the second by the launch that was kept, which may leave out what only a gradient needs
                call()
            seconds = (time.perf_counter() - start) / max(len(looked_up) - before, 1)
            for key, kernel, found in looked_up[before:]:
                compiled.setdefault(key, Compiled(name, kernel, found, seconds))
    if load and extension.why_not("cuda") is None:
        run_extension(shapes, names, training=training)
    return list(compiled.values())


def run_extension(shapes: Shapes, ops: Iterable[str], *, training: bool) -> None:
    """Runs what the CUDA extension serves of these shapes once, on zeros, so that its kernels are loaded and may have their shared memory.

    CUDA's runtime loads a kernel when it is first launched or asked about (CUDA programming guide, "Lazy Loading"), which drivers before
    12.3 may refuse while a stream is captured (documentation of NVIDIA Warp, ``capture_begin``).
    """
    found = extension.extension()
    assert found is not None
    with torch.device(found.device_type), torch.set_grad_enabled(True), use_backend("cuda"):
        for name in ops:
            for call in OPS[name](shapes, training) if name in EXTENSION_OPS else ():
                # What is not served, float32 attention for one, has nothing to load.
                with contextlib.suppress(NotImplementedError):
                    call()


@contextlib.contextmanager
def _compiling(arch: int | None, load: bool = False) -> Iterator[list[tuple[str, str, bool]]]:
    """Inside, the ops take tensors of the CPU with backend "triton", and their kernels are compiled for ``arch`` but not launched.

    ``load``: they are kept for the current GPU, and loaded onto it.

    Yields the list of what Triton's compiler was asked for so far: (key, kernel, whether it was found on disk).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from pytransformer.kernels import launch

    if launch.interpreting():
        raise RuntimeError("TRITON_INTERPRET is set, and interpreted kernels are not compiled: unset it")
    looked_up: list[tuple[str, str, bool]] = []
    device = object()  # Triton keeps what it has compiled by device: this is a new one, for which it looks on the disk
    run, active, listener = JITFunction.run, driver._active, triton.knobs.compilation.listener
    with launch.assume_arch(arch) if arch is not None else launch.assume_current_gpu() as limits:

        class Compiler:
            """As much of a driver as Triton asks before it launches."""

            get_current_target = staticmethod(lambda: GPUTarget("cuda", limits.arch, 32))
            get_current_device = staticmethod(lambda: device)
            get_current_stream = staticmethod(lambda device: 0)

        def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
            if load:
                compiled[grid]  # what would launch it: its module is loaded for that
            return compiled

        def note(*, src: Any, metadata: Any, cache_hit: bool, **others: Any) -> None:
            looked_up.append((metadata["hash"], src.name, cache_hit))

        JITFunction.run = compile_only
        if not load:
            driver.set_active(Compiler())
        triton.knobs.compilation.listener = note
        try:
            with triton_compiles_for_cpu_tensors():
                yield looked_up
        finally:
            JITFunction.run, driver._active, triton.knobs.compilation.listener = run, active, listener


# --- What each op launches. Only shapes, strides and dtypes matter; lengths do not. ------------------------------------------------------

Calls = Iterator[Callable[[], object]]


def _zeros(shapes: Shapes, *sizes: int, grad: bool = False) -> Tensor:
    return torch.zeros(sizes, dtype=shapes.dtype, requires_grad=grad)


def _with_backward(call: Callable[..., Any], *inputs: Tensor) -> Callable[[], object]:
    """The call with and without a gradient for its inputs, which require one; of all its results."""

    def both() -> None:
        with torch.no_grad():
            call(*inputs)
        results = call(*inputs)
        outputs = [result for result in (results if isinstance(results, tuple) else (results,)) if result is not None]
        torch.autograd.grad(outputs, inputs, [torch.zeros_like(output) for output in outputs])

    return both


def _norm(shapes: Shapes, training: bool) -> Calls:
    from pytransformer.ops.norm import layer_norm, rms_norm

    def hidden_norm(x: Tensor, weight: Tensor, *others: Tensor) -> Any:
        if shapes.norm == "rms_norm":
            offset = shapes.norm_weight_offset
            return rms_norm(x, weight, weight_offset=offset, residual=others[0] if others else None)
        bias, *residual = others
        return layer_norm(x, weight, bias, residual=residual[0] if residual else None)

    x, residual = (_zeros(shapes, 2, 4, shapes.hidden_size, grad=training) for _ in range(2))
    vectors = [_zeros(shapes, shapes.hidden_size, grad=training) for _ in range(1 if shapes.norm == "rms_norm" else 2)]
    for inputs in ((x, *vectors), (x, *vectors, residual)):
        yield _with_backward(hidden_norm, *inputs) if training else functools.partial(hidden_norm, *inputs)
    if not shapes.qk_norm:
        return
    head_norm = functools.partial(rms_norm, weight_offset=shapes.norm_weight_offset)
    weight = _zeros(shapes, shapes.head_dim, grad=training)
    for heads in (shapes.num_heads, shapes.num_kv_heads):
        fused = _zeros(shapes, 2, 4, shapes.num_heads + 2 * shapes.num_kv_heads, shapes.head_dim)[:, :, :heads]
        for x in (_zeros(shapes, 2, 4, heads, shapes.head_dim), fused):
            x = x.detach().requires_grad_(training)
            yield _with_backward(head_norm, x, weight) if training else functools.partial(head_norm, x, weight)


def _heads(shapes: Shapes, batch: int, seqlen: int, *, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    q = _zeros(shapes, batch, seqlen, shapes.num_heads, shapes.head_dim, grad=grad)
    k, v = (_zeros(shapes, batch, seqlen, shapes.num_kv_heads, shapes.head_dim, grad=grad) for _ in range(2))
    return q, k, v


def _tables(shapes: Shapes, length: int) -> tuple[Tensor, Tensor] | None:
    if shapes.positions != "rope":
        return None
    return torch.zeros(length, shapes.rotary_dim // 2), torch.zeros(length, shapes.rotary_dim // 2)


def _rope(shapes: Shapes, training: bool) -> Calls:
    from pytransformer.ops.rope import rope

    tables = _tables(shapes, 64)
    if tables is None:
        return
    q, k, _ = _heads(shapes, 2, 4)
    options: dict[str, Any] = {"interleaved": shapes.rope_interleaved}
    yield lambda: rope(q, k, *tables, **options)
    yield lambda: rope(q, k, *tables, inplace=True, **options)
    positions = torch.zeros(2, 4, dtype=torch.int64)
    yield lambda: rope(q, k, *tables, positions=positions, **options)
    if training:
        yield _with_backward(lambda q, k: rope(q, k, *tables, **options), *_heads(shapes, 2, 4, grad=True)[:2])


def _cache(shapes: Shapes, capacity: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """k_cache, v_cache and block_table for two sequences."""
    if shapes.page_size is None:
        k_cache, v_cache = (_zeros(shapes, 2, capacity, shapes.num_kv_heads, shapes.head_dim) for _ in range(2))
        return k_cache, v_cache, None
    pages = -(-capacity // shapes.page_size)
    sizes = (2 * pages, shapes.page_size, shapes.num_kv_heads, shapes.head_dim)
    table = torch.arange(2 * pages, dtype=torch.int32).view(2, pages)
    return _zeros(shapes, *sizes), _zeros(shapes, *sizes), table


def _kv_append(shapes: Shapes, training: bool) -> Calls:
    from pytransformer.ops.kv_append import kv_append

    lengths = torch.zeros(2, dtype=torch.int32)
    for seqlen in (1, _MANY_TOKENS):
        q, k, v = _heads(shapes, 2, seqlen)
        k_cache, v_cache, table = _cache(shapes, seqlen)
        options: dict[str, Any] = {"cache_seqlens": lengths, "block_table": table}
        tables = _tables(shapes, seqlen)
        if tables is not None:
            options |= {"q": q, "cos": tables[0], "sin": tables[1], "interleaved": shapes.rope_interleaved}
        if shapes.qk_norm:
            weight = _zeros(shapes, shapes.head_dim)
            options |= {"q": q, "q_norm_weight": weight, "k_norm_weight": weight.clone()}
            options["norm_weight_offset"] = shapes.norm_weight_offset
        yield functools.partial(kv_append, k, v, k_cache, v_cache, **options)


def _attention(shapes: Shapes, training: bool) -> Calls:
    from pytransformer.ops.attention import attention

    if shapes.head_dim > WIDEST_HEAD:  # torch serves
        return

    def call(window: tuple[int, int], q: Tensor, k: Tensor, v: Tensor) -> Any:
        options: dict[str, Any] = {"causal": shapes.causal, "window": window, "softcap": shapes.attention_softcap}
        return attention(q, k, v, **options)

    for window in dict.fromkeys(map(shapes.window, range(shapes.num_layers))):
        for seqlen in (1, 16):
            attend = functools.partial(call, window)
            inputs = _heads(shapes, 2, seqlen, grad=training)
            yield _with_backward(attend, *inputs) if training else functools.partial(attend, *inputs)


def _decode_attention(shapes: Shapes, training: bool) -> Calls:
    from pytransformer.ops.decode_attention import decode_attention

    if shapes.head_dim > WIDEST_HEAD:
        return
    options: dict[str, Any] = {"window": shapes.window(0), "softcap": shapes.attention_softcap}
    for capacity, seqlen in itertools.product((64, _LONG_CACHE), (1, 48)):
        q, _, _ = _heads(shapes, 2, seqlen)
        k_cache, v_cache, table = _cache(shapes, capacity)
        lengths = torch.full((2,), seqlen, dtype=torch.int32)
        yield functools.partial(decode_attention, q, k_cache, v_cache, lengths, block_table=table, **options)


def _activation(shapes: Shapes, training: bool) -> Calls:
    from pytransformer.ops import activation

    op = getattr(activation, shapes.activation.removesuffix("_tanh"), None)
    if op is None:  # "relu" is torch's own
        return
    options: dict[str, Any] = {}
    if shapes.activation.endswith("_tanh"):
        options["approximate"] = "tanh"
    # Gate and up are in one tensor, as a feed-forward has them.
    width = shapes.intermediate_size * (2 if shapes.is_gated else 1)
    x = _zeros(shapes, 2, 4, width, grad=training)
    call = functools.partial(op, **options)
    yield _with_backward(call, x) if training else functools.partial(call, x)


def _linear_cross_entropy(shapes: Shapes, training: bool) -> Calls:
    """The kernel alone: around it are torch's matrix products, which compile nothing and would take long here."""
    from pytransformer.kernels.linear_cross_entropy import cross_entropy, logits_buffer

    logits, losses = logits_buffer(2, shapes.vocab_size, _zeros(shapes, 1)), torch.zeros(2)
    targets = torch.zeros(2, dtype=torch.int64)
    options: dict[str, Any] = {
        "ignore_index": -100,
        "label_smoothing": 0.0,
        "softcap": shapes.logit_softcap,
        "z_loss": 0.0,
    }
    for wants_gradient in (False, True) if training else (False,):
        yield functools.partial(
            cross_entropy,
            logits,
            shapes.vocab_size,
            targets,
            None,
            None,
            losses,
            wants_gradient=wants_gradient,
            **options,
        )


def _grouped_linear(shapes: Shapes, training: bool) -> Calls:
    """Both products of the experts, for a few tokens and for many: each of the tiles that the mean size of a group chooses from."""
    from pytransformer.ops.grouped_linear import grouped_linear

    if shapes.num_experts == 0:
        return
    groups, hidden, inner = shapes.num_experts, shapes.hidden_size, shapes.expert_size
    for mean, (num_in, num_out) in itertools.product(
        (1, 32, 128), ((hidden, inner * (2 if shapes.is_gated else 1)), (inner, hidden))
    ):
        inputs = [
            _zeros(shapes, mean * groups, num_in, grad=training),
            _zeros(shapes, groups, num_out, num_in, grad=training),
        ]
        if shapes.mlp_bias:
            inputs.append(_zeros(shapes, groups, num_out, grad=training))
        offsets = torch.arange(groups + 1, dtype=torch.int32) * mean

        def call(x: Tensor, weight: Tensor, bias: Tensor | None = None, offsets: Tensor = offsets) -> Tensor:
            return grouped_linear(x, weight, offsets, bias=bias)

        yield _with_backward(call, *inputs) if training else functools.partial(call, *inputs)


def _linear_attention(shapes: Shapes, training: bool) -> Calls:
    """Causal, with a decay and without: a token with a state, and chunks."""
    from pytransformer.ops.linear_attention import linear_attention

    if shapes.head_dim > WIDEST_HEAD:
        return
    decay = torch.ones(shapes.num_kv_heads)
    options: dict[str, Any] = {"return_state": True}
    sizes = (2, shapes.num_kv_heads, shapes.head_dim)
    state = (torch.zeros(*sizes, shapes.head_dim), torch.zeros(sizes))
    for factors in (None, decay):
        yield functools.partial(
            linear_attention, *_heads(shapes, 2, 1), decay=factors, initial_state=state, **options
        )  # fmt: skip
        call = functools.partial(linear_attention, decay=factors)
        inputs = _heads(shapes, 2, _MANY_TOKENS, grad=training)
        yield _with_backward(call, *inputs) if training else functools.partial(call, *inputs)


def _quantized_linear(shapes: Shapes, training: bool) -> Calls:
    """The layers of a quantised model, each width once, for each of the tiles that the number of rows chooses from."""
    from pytransformer.model.transformer import Transformer
    from pytransformer.nn.quantized import QuantizedLinear
    from pytransformer.ops.quantized_linear import quantized_linear

    if shapes.quantization is None:
        return
    config = TransformerConfig(**{field.name: getattr(shapes, field.name) for field in fields(TransformerConfig)})
    modules = Transformer(config, device="meta").modules()
    layers = {
        (layer.in_features, layer.out_features, layer.bias is not None): layer
        for layer in modules
        if isinstance(layer, QuantizedLinear)
    }
    for layer, rows in itertools.product(layers.values(), (1, 64, 128)):
        tensors = [layer.weight, layer.scale, layer.zero_point]
        weight, scale, zero = (None if t is None else torch.zeros(t.shape, dtype=t.dtype) for t in tensors)
        inputs = [_zeros(shapes, rows, layer.in_features, grad=training)]
        if layer.bias is not None:
            inputs.append(_zeros(shapes, layer.out_features, grad=training))

        def call(
            x: Tensor, bias: Tensor | None = None, weight: Any = weight, scale: Any = scale, zero: Any = zero
        ) -> Tensor:
            return quantized_linear(x, weight, scale, zero_point=zero, bias=bias)

        yield _with_backward(call, *inputs) if training else functools.partial(call, *inputs)


# By name: the calls of an op (``training``: with a gradient too).
OPS: dict[str, Callable[[Shapes, bool], Calls]] = {
    "attention": _attention,
    "decode_attention": _decode_attention,
    "kv_append": _kv_append,
    "rope": _rope,
    "norm": _norm,
    "activation": _activation,
    "grouped_linear": _grouped_linear,
    "quantized_linear": _quantized_linear,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_attention": _linear_attention,
}
# What the models of this package are made of.
MODEL_OPS = tuple(name for name in OPS if name != "linear_attention")
# What the CUDA extension has kernels for.
EXTENSION_OPS = ("attention", "decode_attention", "kv_append", "rope", "norm")
