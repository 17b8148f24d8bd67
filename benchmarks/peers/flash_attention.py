"""flash-attn: version 2 (`flash_attn`), 3 (`flash_attn_interface`, Hopper) and 4 (`flash_attn.cute`, CuTe DSL).

Signatures as of flash_attn 2.8, of hopper/flash_attn_interface.py at the same sources, and of flash-attn-4 4.0.0b36.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer.benchmarks.definitions.cases import AttentionCase, DecodeCase, RopeCase
from pytransformer.benchmarks.harness.rows import Inputs, Variant
from pytransformer.benchmarks.peers.base import Factory, Peer, kept


def _first(result: Any) -> Any:
    """Some versions return (out, lse, …), some only out."""
    return result[0] if isinstance(result, tuple) else result


def _packed_arguments(case: AttentionCase, inputs: Inputs) -> dict[str, Any]:
    starts = inputs["cu_seqlens"]
    return {
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "max_seqlen_q": case.seqlen,
        "max_seqlen_k": case.seqlen,
    }


# --- version 2 ------------------------------------------------------------------------------------------------------------------------


def _attention_2(case: AttentionCase) -> Factory | None:
    # Dropout is left out: its mask is its own, so that the result could not be checked.
    if case.options - {"window", "softcap", "alibi", "deterministic", "packed"}:
        return None

    def make() -> Variant:
        from flash_attn import flash_attn_func, flash_attn_varlen_func

        options: dict[str, Any] = {
            "causal": case.causal,
            "window_size": case.window,
            "deterministic": case.deterministic,
        }
        if case.softcap:
            options["softcap"] = case.softcap

        def call(inputs: Inputs) -> Tensor:
            extra = {"alibi_slopes": inputs["alibi_slopes"]} if case.alibi else {}
            q, k, v = inputs["q"], inputs["k"], inputs["v"]
            if case.lengths:
                return flash_attn_varlen_func(q, k, v, **_packed_arguments(case, inputs), **options, **extra)
            return flash_attn_func(q, k, v, **options, **extra)

        return call

    return make


def _decode_2(case: DecodeCase) -> Factory | None:
    if case.cache_dtype != "bf16" or case.page_size % 256:
        return None

    def make() -> Variant:
        from flash_attn import flash_attn_with_kvcache

        def call(inputs: Inputs) -> Tensor:
            return flash_attn_with_kvcache(
                inputs["q"],
                inputs["k_cache"],
                inputs["v_cache"],
                cache_seqlens=inputs["cache_seqlens"],
                block_table=inputs.get("block_table"),
                causal=True,
            )

        return call

    return make


def _rope_2(case: RopeCase) -> Factory:
    def make() -> Variant:
        from flash_attn.layers.rotary import apply_rotary_emb

        def call(inputs: Inputs) -> tuple[Tensor, Tensor]:
            # Its kernel wants the tables in the dtype of q.
            cos, sin = kept(
                inputs, "flash_attn_2", lambda: [inputs[name].to(inputs["q"].dtype) for name in ("cos", "sin")]
            )
            return apply_rotary_emb(inputs["q"], cos, sin), apply_rotary_emb(inputs["k"], cos, sin)

        return call

    return make


# --- version 3 ------------------------------------------------------------------------------------------------------------------------


def _attention_3(case: AttentionCase) -> Factory | None:
    if case.options - {"window", "softcap", "deterministic", "packed"}:
        return None

    def make() -> Variant:
        from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

        options: dict[str, Any] = {
            "causal": case.causal,
            "window_size": case.window,
            "softcap": case.softcap,
            "deterministic": case.deterministic,
        }

        def call(inputs: Inputs) -> Tensor:
            q, k, v = inputs["q"], inputs["k"], inputs["v"]
            if case.lengths:
                return _first(flash_attn_varlen_func(q, k, v, **_packed_arguments(case, inputs), **options))
            return _first(flash_attn_func(q, k, v, **options))

        return call

    return make


def _decode_3(case: DecodeCase) -> Factory | None:
    if case.cache_dtype != "bf16":
        return None

    def make() -> Variant:
        from flash_attn_interface import flash_attn_with_kvcache

        def call(inputs: Inputs) -> Tensor:
            return _first(
                flash_attn_with_kvcache(
                    inputs["q"],
                    inputs["k_cache"],
                    inputs["v_cache"],
                    cache_seqlens=inputs["cache_seqlens"],
                    page_table=inputs.get("block_table"),
                    causal=True,
                )
            )

        return call

    return make


# --- version 4 ------------------------------------------------------------------------------------------------------------------------


def _window_4(window: tuple[int, int]) -> tuple[int | None, int | None]:
    """Unlimited is None there, not -1."""
    left, right = (None if side < 0 else side for side in window)
    return left, right


def _attention_4(case: AttentionCase) -> Factory | None:
    if case.options - {"window", "softcap", "sinks", "deterministic", "packed"}:
        return None

    def make() -> Variant:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        options: dict[str, Any] = {
            "causal": case.causal,
            "window_size": _window_4(case.window),
            "softcap": case.softcap,
            "deterministic": case.deterministic,
        }

        def call(inputs: Inputs) -> Tensor:
            q, k, v = inputs["q"], inputs["k"], inputs["v"]
            extra = {"learnable_sink": inputs["sinks"]} if case.sinks else {}
            if case.lengths:
                return _first(flash_attn_varlen_func(q, k, v, **_packed_arguments(case, inputs), **options, **extra))
            return _first(flash_attn_func(q, k, v, **options, **extra))

        return call

    return make


def _decode_4(case: DecodeCase) -> Factory | None:
    if case.cache_dtype != "bf16":
        return None

    def make() -> Variant:
        from flash_attn.cute import flash_attn_varlen_func

        def call(inputs: Inputs) -> Tensor:
            # On Hopper it does not split the keys of a sequence over programs (num_splits must be 1).
            return _first(
                flash_attn_varlen_func(
                    inputs["q"],
                    inputs["k_cache"],
                    inputs["v_cache"],
                    seqused_k=inputs["cache_seqlens"],
                    page_table=inputs.get("block_table"),
                    causal=True,
                    num_splits=0 if _splits_on_this_gpu() else 1,
                )
            )

        return call

    return make


def _splits_on_this_gpu() -> bool:
    return torch.cuda.get_device_capability()[0] >= 10


PEERS = (
    Peer(
        "flash_attn_2",
        "flash-attn",
        "flash_attn_2_cuda",
        {"attention": _attention_2, "decode_attention": _decode_2, "rope": _rope_2},
        notes={"rope": "two launches, tables in bfloat16"},
    ),
    Peer(
        "flash_attn_3",
        "flash-attn-3",
        "flash_attn_interface",
        {"attention": _attention_3, "decode_attention": _decode_3},
        least_capability=(9, 0),
    ),
    Peer(
        "flash_attn_4",
        "flash-attn-4",
        "flash_attn.cute",
        {"attention": _attention_4, "decode_attention": _decode_4},
        needs=("cutlass", "quack"),
        least_capability=(8, 0),
    ),
)
