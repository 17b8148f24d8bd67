"""PyTorch's attention: scaled_dot_product_attention with each of its backends forced, its packed attention, and FlexAttention."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pytransformer.benchmarks.definitions.cases import AttentionCase, DecodeCase
from pytransformer.benchmarks.harness.rows import Inputs, Variant
from pytransformer.benchmarks.peers.base import Factory, Peer, compiled, kept

# Scores that the math backend may materialise, in elements: 512 MB of float32, with the softmax and its gradient beside them.
LARGEST_SCORES = 2**27


def _transposed(inputs: Inputs, names: tuple[str, str, str]) -> list[Tensor]:
    return [inputs[name].transpose(1, 2) for name in names]


def _sdpa(case: AttentionCase, backend: SDPBackend | None) -> Factory:
    def call(inputs: Inputs) -> Tensor:
        q, k, v = _transposed(inputs, ("q", "k", "v"))
        options: dict[str, Any] = {"is_causal": case.causal, "dropout_p": case.dropout_p, "enable_gqa": case.is_grouped}
        if case.bias:
            # It takes a mask or the flag; the mask says both.
            options.update(
                attn_mask=kept(inputs, "sdpa_bias", lambda: _causal_bias(inputs["bias"], case)), is_causal=False
            )
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    return lambda: call if backend is None else _forced(call, backend)


def _forced(call: Variant, backend: SDPBackend) -> Variant:
    def forced(inputs: Inputs) -> Any:
        with sdpa_kernel(backend):
            return call(inputs)

    return forced


def _causal_bias(bias: Tensor, case: AttentionCase) -> Tensor:
    if not case.causal:
        return bias
    hidden = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu(1)
    return bias.masked_fill(hidden, -math.inf)


def _attention(backend: SDPBackend | None, served: frozenset[str], *, grouped: bool = True, small: bool = False) -> Any:
    def build(case: AttentionCase) -> Factory | None:
        if case.options - served or (case.is_grouped and not grouped):
            return None
        if small and case.batch * case.num_heads * case.seqlen**2 > LARGEST_SCORES:
            return None
        return _sdpa(case, backend)

    return build


def _decode(backend: SDPBackend | None, *, grouped: bool = True, small: bool = False) -> Any:
    def build(case: DecodeCase) -> Factory | None:
        is_grouped = case.num_heads != case.num_kv_heads
        if small and case.cache_bytes > 2**28:
            return None
        if case.page_size or case.cache_dtype != "bf16" or (is_grouped and not grouped):
            return None

        def call(inputs: Inputs) -> Tensor:
            q, k, v = _transposed(inputs, ("q", "k_cache", "v_cache"))
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=is_grouped).transpose(1, 2)

        return lambda: call if backend is None else _forced(call, backend)

    return build


def _sdpa_peer(
    name: str,
    backend: SDPBackend | None,
    served: set[str],
    *,
    always: bool = False,
    grouped: bool = True,
    small: bool = False,
) -> Peer:
    ops = {
        "attention": _attention(backend, frozenset(served), grouped=grouped, small=small),
        "decode_attention": _decode(backend, grouped=grouped, small=small),
    }
    # Without a backend it takes one of the others, on an H200 cuDNN's: on a GPU each of those is measured instead.
    return Peer(
        name,
        "torch",
        "torch",
        ops,
        always=always,
        on_gpu=backend is not None,
        least_capability=None if backend is None else (8, 0),
    )


# --- packed sequences -----------------------------------------------------------------------------------------------------------------


def _packed(case: AttentionCase) -> Factory | None:
    if "packed" not in case.options or case.options - {"packed", "window"}:
        return None

    def make() -> Variant:
        from torch.nn.attention.varlen import varlen_attn

        known = inspect.signature(varlen_attn).parameters
        options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known and case.is_grouped else {}
        if "window_size" in known:
            options["window_size"] = (case.window[0], 0 if case.causal else case.window[1])
        elif case.window == (-1, -1):
            options["is_causal"] = case.causal
        else:
            raise NotImplementedError(f"varlen_attn of torch {torch.__version__} has no window")

        def call(inputs: Inputs) -> Any:
            starts = inputs["cu_seqlens"]
            return varlen_attn(
                inputs["q"], inputs["k"], inputs["v"], starts, starts, case.seqlen, case.seqlen, **options
            )

        return call

    return make


# --- FlexAttention --------------------------------------------------------------------------------------------------------------------

Mod = Callable[..., Tensor]


def _mask_mod(case: AttentionCase, inputs: Inputs) -> Mod | None:
    """Which (query, key) pairs may meet, as FlexAttention wants it said; ``None`` = all."""
    left, right = case.window[0], 0 if case.causal else case.window[1]
    if left < 0 and right < 0 and not case.lengths:
        return None
    document = None
    if case.lengths:
        counts = torch.tensor(case.lengths, device=inputs["q"].device)
        document = torch.repeat_interleave(torch.arange(case.batch, device=counts.device), counts)

    def may_meet(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = query >= 0
        if left >= 0:
            visible = visible & (query - key <= left)
        if right >= 0:
            visible = visible & (key - query <= right)
        if document is not None:
            visible = visible & (document[query] == document[key])
        return visible

    return may_meet


def _score_mod(case: AttentionCase, inputs: Inputs) -> Mod | None:
    bias, slopes = inputs.get("bias"), inputs.get("alibi_slopes")
    if not case.options & {"softcap", "bias", "alibi"}:
        return None

    def modified(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if case.softcap:
            score = case.softcap * torch.tanh(score / case.softcap)
        if bias is not None:
            score = score + bias[0, head, query, key]
        if slopes is not None:
            score = score - slopes[head] * (query - key).abs()
        return score

    return modified


def _flex(case: AttentionCase) -> Factory | None:
    if case.options & {"sinks", "dropout", "deterministic"}:
        return None

    def make() -> Variant:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        attention = compiled(flex_attention)
        # One mask for all input sets.
        blocks: list[Any] = []

        def block_mask(inputs: Inputs) -> Any:
            if not blocks:
                mask, seqlen = _mask_mod(case, inputs), case.total_tokens if case.lengths else case.seqlen
                device = inputs["q"].device
                blocks.append(mask and create_block_mask(mask, None, None, seqlen, seqlen, device=device))
            return blocks[0]

        def call(inputs: Inputs) -> Tensor:
            mask, score_mod = block_mask(inputs), kept(inputs, "flex", lambda: _score_mod(case, inputs))
            q, k, v = (
                (inputs[name][None] if case.lengths else inputs[name]).transpose(1, 2) for name in ("q", "k", "v")
            )
            out = attention(q, k, v, score_mod=score_mod, block_mask=mask, enable_gqa=case.is_grouped)
            out = out.transpose(1, 2)
            return out[0] if case.lengths else out

        return call

    return make


PEERS = (
    _sdpa_peer("sdpa", None, {"bias"}, always=True),
    _sdpa_peer("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION, {"bias"}, always=True),
    # With deterministic algorithms asked for, flash and cuDNN take other paths: `deterministic` rows compare packages that say so per call.
    _sdpa_peer("sdpa_flash", SDPBackend.FLASH_ATTENTION, set(), always=True),
    _sdpa_peer("sdpa_efficient", SDPBackend.EFFICIENT_ATTENTION, {"bias"}, grouped=False),
    _sdpa_peer("sdpa_math", SDPBackend.MATH, {"bias"}, small=True),
    Peer(
        "torch_varlen",
        "torch",
        "torch.nn.attention.varlen",
        {"attention": _packed},
        always=True,
    ),
    Peer(
        "flex",
        "torch",
        "torch.nn.attention.flex_attention",
        {"attention": _flex},
        slow_start=True,
        notes={"attention": "the block mask is made outside the timing"},
    ),
)
