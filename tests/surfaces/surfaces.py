"""Every public op, module and interface, as calls that the properties of docs/surfaces.md are tried on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pytransformer
import pytransformer.nn as ptnn
from pytransformer.interop import flash_attn
from pytransformer.interop import torch as interop_torch

Tensors = dict[str, Tensor]

IN_PLACE = "it writes into its arguments, which vmap gives to each call at once"
NO_NUMBERS = "it takes no numbers"
A_CONTEXT = "it is entered and left: there is nothing to copy"


@dataclass(frozen=True)
class Surface:
    """One row.

    Attributes:
        group: heading of the row.
        inputs: of (batch, seqlen), the tensors of a call.
        build: of numbers by name, what is called: a function or a module.
        apply: of that and the tensors, the outputs.
        numbers: options by name, Python's numbers and flags.
        reasons: why a property does not hold, by its name.
        refusals: by the name of a property, the exception (type, part of the message) that shows the reason, where one can.
        differentiable: whether the tensors get gradients.
    """

    group: str
    inputs: Callable[[int, int], Tensors]
    build: Callable[..., Any]
    apply: Callable[[Any, Tensors], Any] = lambda target, tensors: target(**tensors)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    refusals: Mapping[str, tuple[type[Exception], str]] = field(default_factory=dict)
    differentiable: bool = True

    @property
    def without(self) -> Mapping[str, str]:
        """The reasons, with those that follow from the rest."""
        return self.reasons if self.numbers else {"numpy scalar": NO_NUMBERS, **self.reasons}


# --- Tensors ----------------------------------------------------------------------------------------------------------------------------


def qkv(batch: int, seqlen: int) -> Tensors:
    return {
        "q": torch.randn(batch, seqlen, 4, 16),
        "k": torch.randn(batch, seqlen, 2, 16),
        "v": torch.randn(batch, seqlen, 2, 16),
    }


def packed(batch: int, seqlen: int) -> Tensors:
    tensors = {name: tensor.flatten(0, 1) for name, tensor in qkv(batch, seqlen).items()}
    starts = torch.arange(batch + 1, dtype=torch.int32) * seqlen
    return {**tensors, "cu_seqlens_q": starts, "cu_seqlens_k": starts.clone()}


def caches(batch: int) -> Tensors:
    return {"k_cache": torch.randn(batch, 8, 2, 16), "v_cache": torch.randn(batch, 8, 2, 16)}


def lengths(batch: int) -> Tensor:
    return torch.full((batch,), 3, dtype=torch.int32)


def sequence(batch: int, seqlen: int) -> Tensors:
    return {"x": torch.randn(batch, seqlen, 16)}


def heads_first(batch: int, seqlen: int) -> Tensors:
    return {name: torch.randn(batch, 2, seqlen, 16) for name in ("query", "key", "value")}


def tables() -> Tensors:
    cos, sin = pytransformer.rope_tables(16, 16)
    return {"cos": cos, "sin": sin}


# --- Calls that are more than a function of the tensors ---------------------------------------------------------------------------------


def function_of(function: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    return lambda **numbers: functools.partial(function, **fixed, **numbers)


def positional(target: Any, tensors: Tensors) -> Any:
    return target(*tensors.values())


def rotate(**numbers: Any) -> Callable[..., Any]:
    def call(q: Tensor, k: Tensor) -> Any:
        cos, sin = (table.to(q.device) for table in tables().values())
        return pytransformer.rope(q, k, cos, sin, **numbers)

    return call


def rotate_theirs(**numbers: Any) -> Callable[..., Any]:
    def call(x: Tensor) -> Tensor:
        cos, sin = (table.to(x.device) for table in tables().values())
        return flash_attn.apply_rotary_emb(x, cos, sin, **numbers)

    return call


def loss(**numbers: Any) -> Callable[..., Any]:
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        targets = torch.ones(x.shape[:-1], dtype=torch.int64, device=x.device)
        return pytransformer.linear_cross_entropy(x, weight, targets, bias=bias, **{"reduction": "sum", **numbers})

    return call


def append(**numbers: Any) -> Callable[..., Any]:
    def call(
        k: Tensor, v: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, weight: Tensor
    ) -> Any:
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
        weights = {"q_norm_weight": weight, "k_norm_weight": weight}
        new = pytransformer.kv_append(k, v, k_cache, v_cache, cache_seqlens=cache_seqlens, q=q, **weights, **numbers)
        return new, k_cache, v_cache

    return call


def append_and_attend(**numbers: Any) -> Callable[..., Any]:
    def call(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor) -> Any:
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
        out = flash_attn.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, causal=True, **numbers
        )
        return out, k_cache, v_cache

    return call


def varlen(function: Callable[..., Any], count: int, sides: int) -> Callable[..., Callable[..., Any]]:
    """A packed function of flash_attn: ``count`` tensors, starts of ``sides`` sides."""

    def build(max_seqlen: Any = 8, **numbers: Any) -> Callable[..., Any]:
        return lambda *tensors: function(
            *tensors[:count], *tensors[count : count + sides], *(max_seqlen,) * sides, causal=True, **numbers
        )

    return build


def stacked(count: int) -> Callable[[int, int], Tensors]:
    """qkv or kv as one tensor with an axis for them, packed sequences of which ``count`` are behind each other."""

    def inputs(batch: int, seqlen: int) -> Tensors:
        parts = {"q": torch.randn(batch, seqlen, 2, 16)} if count == 2 else {}
        return {**parts, "stack": torch.randn(batch, seqlen, count, 2, 16)}

    return inputs


def packed_stacked(count: int) -> Callable[[int, int], Tensors]:
    def inputs(batch: int, seqlen: int) -> Tensors:
        tensors = {name: tensor.flatten(0, 1) for name, tensor in stacked(count)(batch, seqlen).items()}
        starts = torch.arange(batch + 1, dtype=torch.int32) * seqlen
        return {**tensors, **{f"starts_{side}": starts.clone() for side in range(4 - count)}}

    return inputs


def patched(eps: float, dropout: float) -> nn.Module:
    """All that ``patch`` serves, as torch has it."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout, batch_first=True, layer_norm_eps=eps)
    model = nn.Sequential(layer, nn.RMSNorm(16, eps=eps))
    assert len(ptnn.patch(model).replaced) == 4
    return model


def inside_patch_sdpa(**numbers: Any) -> Callable[..., Any]:
    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with interop_torch.patch_sdpa():
            return F.scaled_dot_product_attention(query, key, value, **numbers)

    return call


def attend_with_itself(target: Any, tensors: Tensors) -> Any:
    x = tensors["x"]
    return target(x, x, x, need_weights=False)[0]


def rotary(**numbers: Any) -> nn.Module:
    return ptnn.RotaryEmbedding(**{"rotary_dim": 16, "max_seqlen": 16, **numbers})


def model(**numbers: Any) -> nn.Module:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "max_seqlen": 8}
    return pytransformer.Transformer(pytransformer.TransformerConfig.llama(**{**sizes, **numbers}))


CONTEXT = dict.fromkeys(("deepcopy", "pickle"), A_CONTEXT)
SURFACES: dict[str, Surface] = {
    # --- ops ---
    "attention": Surface(
        "Ops", qkv, function_of(pytransformer.attention),
        numbers={"causal": True, "window": (3, 0), "softmax_scale": 0.3, "dropout_p": 0.0},
    ),
    "attention, packed": Surface(
        "Ops", packed, function_of(pytransformer.attention), numbers={"max_seqlen_q": 8, "max_seqlen_k": 8, "causal": True},
    ),
    "decode_attention": Surface(
        "Ops", lambda batch, seqlen: {"q": torch.randn(batch, 1, 4, 16), **caches(batch), "cache_seqlens": lengths(batch)},
        function_of(pytransformer.decode_attention), numbers={"softmax_scale": 0.3, "window": (2, 0), "num_splits": 0},
        differentiable=False,
    ),
    "kv_append": Surface(
        "Ops",
        lambda batch, seqlen: {
            **{name: torch.randn(batch, 1, 2, 16) for name in "kvq"}, **caches(batch), "cache_seqlens": lengths(batch),
            "weight": torch.randn(16),
        },
        append, numbers={"norm_eps": 1e-5, "norm_weight_offset": 1.0}, differentiable=False,
        reasons={"vmap": IN_PLACE}, refusals={"vmap": (RuntimeError, "kv_append")},
    ),
    "rope": Surface(
        "Ops", lambda batch, seqlen: {"q": torch.randn(batch, seqlen, 2, 32), "k": torch.randn(batch, seqlen, 1, 32)}, rotate,
        numbers={"offsets": 2, "interleaved": True},
    ),
    "layer_norm": Surface(
        "Ops", lambda batch, seqlen: {**sequence(batch, seqlen), "weight": torch.randn(16), "bias": torch.randn(16)},
        function_of(pytransformer.layer_norm), numbers={"eps": 0.125},
    ),
    "rms_norm": Surface(
        "Ops", lambda batch, seqlen: {**sequence(batch, seqlen), "weight": torch.randn(16), "residual": torch.randn(batch, seqlen, 16)},
        function_of(pytransformer.rms_norm), numbers={"eps": 0.125, "weight_offset": 1.0},
    ),
    **{
        name: Surface("Ops", lambda batch, seqlen: {"x": torch.randn(batch, seqlen, 32)}, function_of(getattr(pytransformer, name)),
                      positional)
        for name in ("swiglu", "geglu", "gelu")
    },
    "linear_cross_entropy": Surface(
        "Ops", lambda batch, seqlen: {**sequence(batch, seqlen), "weight": torch.randn(9, 16), "bias": torch.randn(9)}, loss,
        numbers={"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "ignore_index": -7},
    ),
    "grouped_linear": Surface(
        "Ops",
        lambda batch, seqlen: {
            "x": torch.randn(batch * seqlen, 16), "weight": torch.randn(3, 8, 16),
            "offsets": torch.tensor([0, batch * seqlen // 2, batch * seqlen // 2, batch * seqlen], dtype=torch.int32),
            "bias": torch.randn(3, 8),
        },
        function_of(pytransformer.grouped_linear),
    ),
    "quantized_linear": Surface(
        "Ops",
        lambda batch, seqlen: {
            **sequence(batch, seqlen), "weight": (torch.arange(128).view(8, 16) * 37 % 255 - 127).to(torch.int8),
            "scale": torch.rand(8) / 64,
            "bias": torch.randn(8),
        },
        function_of(pytransformer.quantized_linear),
        lambda target, tensors: target(**{**tensors, "scale": tensors["scale"].detach()}),
    ),
    "linear_attention": Surface("Ops", qkv, function_of(pytransformer.linear_attention), numbers={"causal": True, "normalize": True}),
    # --- modules ---
    "nn.Attention": Surface(
        "Modules", sequence, lambda **numbers: ptnn.Attention(16, 2, rotary=ptnn.RotaryEmbedding(8, 16), **numbers),
        numbers={"window": (3, 0), "softmax_scale": 0.3, "qk_norm_eps": 1e-5},
    ),
    "nn.MultiheadAttention": Surface(
        "Modules", sequence, lambda **numbers: ptnn.MultiheadAttention(**{"embed_dim": 16, "num_heads": 2, **numbers}), attend_with_itself,
        numbers={"embed_dim": 16, "num_heads": 2, "dropout": 0.0, "batch_first": True},
    ),
    "nn.LayerNorm": Surface(
        "Modules", sequence, ptnn.LayerNorm, positional, numbers={"normalized_shape": 16, "eps": 0.125}
    ),
    "nn.RMSNorm": Surface(
        "Modules", sequence, ptnn.RMSNorm, positional,
        numbers={"normalized_shape": 16, "eps": 0.125, "weight_offset": 1.0},
    ),
    "nn.FeedForward": Surface(
        "Modules", sequence, lambda **numbers: ptnn.FeedForward(activation="swiglu", **numbers),
        numbers={"hidden_size": 16, "intermediate_size": 24, "dropout": 0.0},
    ),
    "nn.MixtureOfExperts": Surface(
        "Modules", sequence, lambda **numbers: ptnn.MixtureOfExperts(**{"num_experts": 4, "experts_per_token": 2, **numbers}),
        numbers={"hidden_size": 16, "expert_size": 8, "num_experts": 4, "norm_topk_prob": True, "dropout": 0.0},
    ),
    "nn.Linear": Surface(
        "Modules", sequence, ptnn.Linear, positional, numbers={"in_features": 16, "out_features": 8}
    ),
    "nn.QuantizedLinear": Surface(
        "Modules", sequence, lambda **numbers: ptnn.QuantizedLinear.of(torch.nn.Linear(numbers["in_features"], numbers["out_features"])),
        positional, numbers={"in_features": 16, "out_features": 8},
    ),
    "nn.RowBlocks": Surface(
        "Modules", sequence, lambda: ptnn.RowBlocks([torch.randn(8, 16), torch.randn(4, 16)], torch.randn(12)), positional
    ),
    "nn.RotaryEmbedding": Surface(
        "Modules", lambda batch, seqlen: {"q": torch.randn(batch, seqlen, 2, 16), "k": torch.randn(batch, seqlen, 1, 16)}, rotary,
        numbers={"rotary_dim": 16, "max_seqlen": 16, "base": 100.0, "interleaved": True},
    ),
    "nn.AlibiSlopes": Surface(
        "Modules", qkv, lambda **numbers: ptnn.AlibiSlopes(**{"num_heads": 4, **numbers}),
        lambda target, tensors: pytransformer.attention(**tensors, alibi_slopes=target.slopes), numbers={"num_heads": 4},
    ),
    "nn.AlibiBias": Surface(
        "Modules", lambda batch, seqlen: {"places": torch.arange(seqlen).repeat(batch, 1)},
        ptnn.AlibiBias, positional, numbers={"num_heads": 4, "scale": 0.5}, differentiable=False,
    ),
    "nn.RelativeBias": Surface(
        "Modules", lambda batch, seqlen: {"distance": torch.arange(seqlen).repeat(batch, seqlen, 1)},
        ptnn.RelativeBias, positional, numbers={"num_buckets": 8, "num_heads": 4, "max_distance": 16}, differentiable=False,
    ),
    "nn.RelativeKeys": Surface(
        "Modules", qkv, ptnn.RelativeKeys, lambda target, tensors: target.scores(tensors["q"], tensors["q"]),
        numbers={"max_seqlen": 16, "head_dim": 16},
    ),
    "nn.SinusoidalPositions": Surface(
        "Modules", lambda batch, seqlen: {"positions": torch.arange(seqlen).repeat(batch, 1)},
        ptnn.SinusoidalPositions, positional, numbers={"max_seqlen": 16, "hidden_size": 16},
        differentiable=False,
    ),
    "Transformer": Surface(
        "Modules", lambda batch, seqlen: {"input_ids": torch.arange(batch * seqlen).view(batch, seqlen) % 32}, model, positional,
        numbers={"hidden_size": 16, "num_heads": 2, "norm_eps": 1e-4, "rope_base": 100.0}, differentiable=False,
    ),
    # --- torch ---
    "nn.patch": Surface("torch", sequence, patched, positional, numbers={"eps": 0.125, "dropout": 0.0}),
    "scaled_dot_product_attention": Surface(
        "torch", heads_first, function_of(interop_torch.scaled_dot_product_attention),
        numbers={"scale": 0.3, "dropout_p": 0.0},
    ),
    "patch_sdpa": Surface("torch", heads_first, inside_patch_sdpa, numbers={"scale": 0.3, "dropout_p": 0.0}, reasons=CONTEXT),
    # --- flash_attn ---
    "flash_attn_func": Surface(
        "flash_attn", qkv, function_of(flash_attn.flash_attn_func), positional,
        numbers={"causal": True, "window_size": (3, 0), "softmax_scale": 0.3, "softcap": 2.0, "dropout_p": 0.0},
    ),
    "flash_attn_kvpacked_func": Surface(
        "flash_attn", stacked(2), function_of(flash_attn.flash_attn_kvpacked_func), positional, numbers={"softmax_scale": 0.3}
    ),
    "flash_attn_qkvpacked_func": Surface(
        "flash_attn", stacked(3), function_of(flash_attn.flash_attn_qkvpacked_func), positional, numbers={"softmax_scale": 0.3}
    ),
    **{
        f"flash_attn_varlen_{name}func": Surface(
            "flash_attn", inputs, varlen(getattr(flash_attn, f"flash_attn_varlen_{name}func"), count, sides), positional,
            numbers={"max_seqlen": 8, "softmax_scale": 0.3},
        )
        for name, inputs, count, sides in (
            ("", packed, 3, 2), ("kvpacked_", packed_stacked(2), 2, 2), ("qkvpacked_", packed_stacked(3), 1, 1),
        )
    },
    "flash_attn_with_kvcache": Surface(
        "flash_attn",
        lambda batch, seqlen: {
            "q": torch.randn(batch, 1, 4, 16), "k": torch.randn(batch, 1, 2, 16), "v": torch.randn(batch, 1, 2, 16), **caches(batch),
            "cache_seqlens": lengths(batch),
        },
        append_and_attend, numbers={"softmax_scale": 0.3, "window_size": (4, 0), "num_splits": 0}, differentiable=False,
        reasons={"vmap": IN_PLACE}, refusals={"vmap": (RuntimeError, "kv_append")},
    ),
    "apply_rotary_emb": Surface(
        "flash_attn", lambda batch, seqlen: {"x": torch.randn(batch, seqlen, 2, 32)}, rotate_theirs,
        numbers={"seqlen_offsets": 2, "interleaved": True},
    ),
}  # fmt: skip
# Public names that are no rows, and why.
NO_ROWS = {
    "TransformerConfig": "data", "backends": "a report", "use_backend": "a context", "rope_tables": "takes no tensors",
    "load": "a file", "save": "a file", "warmup": "compiles",
    "nn.LayerCache": "a protocol", "nn.PatchReport": "data", "nn.unpatch": "undoes patch",
    "nn.Experts": "a part of nn.MixtureOfExperts", "register_flash_attention": "a registration",
}  # fmt: skip
