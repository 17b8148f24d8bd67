"""FlashInfer: decode attention, prefill, norms, RoPE, paged append. Signatures as of flashinfer-python 0.7.2.

Its wheel on the package index has sources only: every kernel is compiled with nvcc at its first use, a minute or more each.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pytransformer.benchmarks.definitions.cases import AppendCase, AttentionCase, DecodeCase, NormCase, RopeCase
from pytransformer.benchmarks.harness.rows import Inputs, Variant
from pytransformer.benchmarks.peers.base import Factory, Peer, kept

WORKSPACE_BYTES = 128 * 2**20
# A contiguous cache is read through a table of pages of this many slots.
CONTIGUOUS_PAGE = 16


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    """Calls run one after another, so they may share it."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _attention(case: AttentionCase) -> Factory | None:
    if case.options - {"window", "softcap"} or case.backward or case.both or case.batch > 1:
        return None
    if case.window[1] >= 0 and not case.causal:
        return None

    def make() -> Variant:
        from flashinfer import single_prefill_with_kv_cache

        def call(inputs: Inputs) -> Tensor:
            q, k, v = (inputs[name][0] for name in "qkv")
            return single_prefill_with_kv_cache(
                q, k, v, causal=case.causal, window_left=case.window[0], logits_soft_cap=case.softcap or None
            )[None]

        return call

    return make


def _decode(case: DecodeCase) -> Factory | None:
    if case.cache_dtype != "bf16" or (not case.page_size and case.keys % CONTIGUOUS_PAGE):
        return None
    page_size = case.page_size or CONTIGUOUS_PAGE
    pages = case.keys // page_size

    def make() -> Variant:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        def plan(inputs: Inputs) -> Any:
            device = inputs["q"].device
            starts = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * pages
            table = inputs.get("block_table")
            indices = torch.arange(case.batch * pages, dtype=torch.int32, device=device)
            wrapper = BatchDecodeWithPagedKVCacheWrapper(
                _workspace(device),
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=case.num_heads // case.num_kv_heads >= 4,
                paged_kv_indptr_buffer=starts.clone(),
                paged_kv_indices_buffer=indices.clone(),
                paged_kv_last_page_len_buffer=torch.empty(case.batch, dtype=torch.int32, device=device),
            )
            wrapper.plan(
                starts,
                indices if table is None else table.flatten(),
                torch.full((case.batch,), page_size, dtype=torch.int32, device=device),
                case.num_heads,
                case.num_kv_heads,
                case.head_dim,
                page_size,
                q_data_type=torch.bfloat16,
                kv_data_type=torch.bfloat16,
            )
            return wrapper

        def call(inputs: Inputs) -> Tensor:
            wrapper = kept(inputs, "flashinfer", lambda: plan(inputs))
            caches = tuple(
                inputs[name].view(-1, page_size, case.num_kv_heads, case.head_dim) for name in ("k_cache", "v_cache")
            )
            return wrapper.run(inputs["q"][:, 0], caches)[:, None]

        return call

    return make


def _rms_norm(case: NormCase) -> Factory | None:
    if case.backward:
        return None

    def make() -> Variant:
        import flashinfer

        def call(inputs: Inputs) -> Any:
            if not case.residual:
                return flashinfer.norm.rmsnorm(inputs["x"], inputs["weight"], case.eps)
            # It writes the sum over the residual and y over x: it gets copies, made anew for the first call, which is checked.
            x, residual = kept(inputs, "flashinfer", lambda: [inputs["x"].clone(), inputs["residual"].clone()])
            flashinfer.norm.fused_add_rmsnorm(x, residual, inputs["weight"], case.eps)
            return x, residual

        return call

    return make


def _rope(case: RopeCase) -> Factory:
    def make() -> Variant:
        from flashinfer.rope import apply_rope_with_cos_sin_cache

        def prepare(inputs: Inputs) -> tuple[Tensor, Tensor]:
            positions = torch.arange(case.tokens, device=inputs["q"].device)
            return positions, torch.cat((inputs["cos"], inputs["sin"]), -1)

        def call(inputs: Inputs) -> tuple[Tensor, Tensor]:
            positions, tables = kept(inputs, "flashinfer", lambda: prepare(inputs))
            q, k = inputs["q"], inputs["k"]
            found = apply_rope_with_cos_sin_cache(positions, q[0].flatten(1), k[0].flatten(1), case.head_dim, tables)
            return found[0].view(q.shape), found[1].view(k.shape)

        return call

    return make


def _append(case: AppendCase) -> Factory | None:
    if case.fused or not case.page_size or case.cache_dtype != "bf16":
        return None

    def make() -> Variant:
        from flashinfer.page import append_paged_kv_cache

        def prepare(inputs: Inputs) -> dict[str, Tensor]:
            device, tokens = inputs["k"].device, case.batch * case.tokens
            starts = inputs["cache_seqlens"]
            pages = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * (case.capacity // case.page_size)
            batch = torch.arange(tokens, dtype=torch.int32, device=device) // case.tokens
            positions = starts[batch.long()] + torch.arange(tokens, dtype=torch.int32, device=device) % case.tokens
            full = torch.full((case.batch,), case.page_size, dtype=torch.int32, device=device)
            return {
                "batch_indices": batch,
                "positions": positions,
                "kv_indices": inputs["block_table"].flatten(),
                "kv_indptr": pages,
                "kv_last_page_len": full,
            }

        def call(inputs: Inputs) -> None:
            where = kept(inputs, "flashinfer", lambda: prepare(inputs))
            caches = (inputs["k_cache"], inputs["v_cache"])
            append_paged_kv_cache(inputs["k"].flatten(0, 1), inputs["v"].flatten(0, 1), paged_kv_cache=caches, **where)

        return call

    return make


def _gated(function_name: str) -> Any:
    def build(case: Any) -> Factory | None:
        if getattr(case, "backward", False):
            return None

        def make() -> Variant:
            from flashinfer import activation

            function = getattr(activation, function_name)

            def call(inputs: Inputs) -> Tensor:
                # It takes gate and up beside each other.
                return function(kept(inputs, "flashinfer", lambda: torch.cat((inputs["gate"], inputs["up"]), -1)))

            return call

        return make

    return build


PEER = Peer(
    "flashinfer",
    "flashinfer-python",
    "flashinfer",
    {
        "attention": _attention,
        "decode_attention": _decode,
        "rms_norm": _rms_norm,
        "rope": _rope,
        "kv_append": _append,
        "swiglu": _gated("silu_and_mul"),
        "geglu": _gated("gelu_and_mul"),
    },
    needs=("tvm_ffi", "requests", "tabulate"),
    slow_start=True,
    notes={"rms_norm": "with residual: in place, on copies of its own"},
)
