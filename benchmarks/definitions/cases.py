"""What a benchmark row computes: one frozen dataclass per op, with the shapes, the options and the minimum of work that follows from them.

A case is what the suites (ours) and the adapters (peers) have in common: a suite turns it into inputs, our variants and a float64 check, an
adapter into a call of its package. All tensors are laid out as in the public functions: (batch, seqlen, num_heads, head_dim).

FLOP of attention: 4 · head_dim for each visible (query, key) pair and head, counted exactly; 2.5 times that for the backward pass, which
has five matrix products instead of two. Bytes: every input read once, every output written once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch

from pytransformer.block_masks import local_global_blocks

UNLIMITED = (-1, -1)
QUANTISED = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


def visible_pairs(seqlen: int, causal: bool, window: tuple[int, int] = UNLIMITED) -> int:
    """(query, key) pairs that may meet in a sequence of equal lengths."""
    left, right = window
    if causal:
        right = 0
    query = torch.arange(seqlen)
    first = torch.zeros_like(query) if left < 0 else (query - left).clamp_min(0)
    last = torch.full_like(query, seqlen - 1) if right < 0 else (query + right).clamp_max(seqlen - 1)
    return int((last - first + 1).clamp_min(0).sum())


def skewed_lengths(total: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """Sequence lengths as in text corpora: log-normal (median longest / 10, a few very long ones), adding up to ``total``."""
    draw = random.Random(seed)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        drawn = round(draw.lognormvariate(0.0, 1.2) * longest / 10)
        lengths.append(min(max(drawn, 16), longest, left))
    return tuple(lengths)


@dataclass(frozen=True)
class AttentionCase:
    """Self-attention over equal or packed sequences.

    Attributes:
        bias: an additive bias (1, num_heads, seqlen, seqlen) in bfloat16.
        blocks: block-sparse: how many positions a block has, and the numbers of local and global blocks of ``local_global_blocks``.
        lengths: of packed sequences; then batch is their number and seqlen the longest.
        backward: only the backward pass is timed; ``both``: forward and backward.
    """

    batch: int
    seqlen: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool = True
    window: tuple[int, int] = UNLIMITED
    softcap: float = 0.0
    sinks: bool = False
    bias: bool = False
    alibi: bool = False
    blocks: tuple[int, int, int] | None = None
    dropout_p: float = 0.0
    deterministic: bool = False
    lengths: tuple[int, ...] = ()
    backward: bool = False
    both: bool = False

    op: ClassVar[str] = "attention"
    dropout_seed: ClassVar[int] = 1234

    @staticmethod
    def packed(
        lengths: tuple[int, ...], num_heads: int, num_kv_heads: int, head_dim: int, **options: bool
    ) -> AttentionCase:
        """Packed sequences of these lengths."""
        return AttentionCase(
            len(lengths),
            max(lengths),
            num_heads,
            num_kv_heads,
            head_dim,
            lengths=lengths,
            **options,  # type: ignore[arg-type]
        )

    @property
    def row_op(self) -> str:
        if self.both:
            return "attention_both"
        return "attention_backward" if self.backward else "attention_forward"

    @property
    def options(self) -> frozenset[str]:
        """Names of the options in use; an adapter looks here for what it does not serve."""
        used = {
            "window": self.window != UNLIMITED,
            "softcap": self.softcap > 0,
            "sinks": self.sinks,
            "bias": self.bias,
            "alibi": self.alibi,
            "blocks": self.blocks is not None,
            "dropout": self.dropout_p > 0,
            "deterministic": self.deterministic,
            "packed": bool(self.lengths),
        }
        return frozenset(name for name, is_used in used.items() if is_used)

    @property
    def total_tokens(self) -> int:
        return sum(self.lengths) if self.lengths else self.batch * self.seqlen

    @property
    def cu_seqlens(self) -> list[int]:
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return starts

    @property
    def is_grouped(self) -> bool:
        return self.num_heads != self.num_kv_heads

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head, all sequences together."""
        if self.blocks is not None:
            return self.batch * self._pairs_of_blocks(self.blocks[0])
        lengths = self.lengths or (self.seqlen,) * self.batch
        found = {length: visible_pairs(length, self.causal, self.window) for length in set(lengths)}
        return sum(found[length] for length in lengths)

    def block_mask(self, device: torch.device) -> torch.Tensor:
        """Of ``blocks``, for the call."""
        assert self.blocks is not None
        size, local, count = self.blocks
        return local_global_blocks(
            self.seqlen, self.seqlen, size, local=local, global_=count, causal=self.causal, device=device
        )

    def _pairs_of_blocks(self, size: int) -> int:
        query = torch.arange(self.seqlen)[:, None]
        start = torch.arange(0, self.seqlen, size)
        stop = (start + size).clamp_max(self.seqlen)
        seen = (torch.minimum(stop, query + 1) if self.causal else stop) - start
        listed = self.block_mask(torch.device("cpu"))[0, 0].repeat_interleave(size, 0)[: self.seqlen]
        return int((seen.clamp_min(0) * listed).sum())

    @property
    def flop(self) -> float:
        forward = 4.0 * self.num_heads * self.head_dim * self.pairs
        return forward * {(False, False): 1.0, (True, False): 2.5}.get((self.backward, self.both), 3.5)

    @property
    def moved_bytes(self) -> float:
        query = 2.0 * self.total_tokens * self.num_heads * self.head_dim
        key = 2.0 * self.total_tokens * self.num_kv_heads * self.head_dim
        bias = 2.0 * self.num_heads * visible_pairs(self.seqlen, self.causal, self.window) if self.bias else 0.0
        # Forward: q, k, v in, out. Backward: q, k, v, out, dout in, dq, dk, dv out. (lse is a head_dim-th of a tensor: left out.)
        forward, backward = 2 * query + 2 * key + bias, 4 * query + 4 * key + bias
        if self.both:
            return forward + backward
        return backward if self.backward else forward

    @property
    def shape(self) -> str:
        where = (
            f"packed {self.batch} sequences, {self.total_tokens} tokens, longest {self.seqlen}"
            if self.lengths
            else f"B{self.batch} L{self.seqlen}"
        )
        heads = f"H{self.num_heads}/{self.num_kv_heads}" if self.is_grouped else f"H{self.num_heads}"
        options = {
            "window": f"window {self.window[0]},{self.window[1]}",
            "softcap": f"softcap {self.softcap:g}",
            "dropout": f"dropout {self.dropout_p:g}",
        }
        if self.blocks is not None:
            options["blocks"] = "blocks of {}, {} local, {} global".format(*self.blocks)
        said = [options.get(name, name) for name in sorted(self.options - {"packed"})]
        return " ".join(["causal" if self.causal else "full", where, heads, f"d{self.head_dim}", "bf16", *said])


@dataclass(frozen=True)
class DecodeCase:
    """One new query per sequence over a cache of ``keys`` keys; ``page_size`` 0 is a contiguous cache."""

    batch: int
    keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 0
    cache_dtype: str = "bf16"

    op: ClassVar[str] = "decode_attention"

    @property
    def flop(self) -> float:
        return 4.0 * self.batch * self.num_heads * self.keys * self.head_dim

    @property
    def cache_bytes(self) -> float:
        """Keys and values, with a float32 scale for each token and head where there is one (int8)."""
        element = QUANTISED[self.cache_dtype].itemsize * self.head_dim + (4 if self.cache_dtype == "int8" else 0)
        return 2.0 * self.batch * self.keys * self.num_kv_heads * element

    @property
    def moved_bytes(self) -> float:
        return self.cache_bytes + 2.0 * 2 * self.batch * self.num_heads * self.head_dim

    @property
    def shape(self) -> str:
        place = f"pages of {self.page_size}" if self.page_size else "contiguous"
        heads = (
            f"H{self.num_heads}/{self.num_kv_heads}" if self.num_heads != self.num_kv_heads else f"H{self.num_heads}"
        )
        return f"B{self.batch} kv{self.keys} {heads} d{self.head_dim} {self.cache_dtype} {place}"


@dataclass(frozen=True)
class NormCase:
    """RMSNorm, or LayerNorm with bias, over the last dimension of (tokens, width)."""

    op: str
    tokens: int
    width: int
    residual: bool = False
    backward: bool = False
    name: str = ""

    eps: ClassVar[float] = 1e-6

    @property
    def row_op(self) -> str:
        return f"{self.op}_{'backward' if self.backward else 'forward'}"

    @property
    def moved_bytes(self) -> float:
        # Forward: x in, y out, with residual: that in, the sum out. Backward: x (or the sum) and dy in, dx out, with residual: ds in.
        tensors = (3 if self.backward else 2) + ((1 if self.backward else 2) if self.residual else 0)
        parameters = (2 if self.op == "layer_norm" else 1) * (2 if self.backward else 1)
        return 2.0 * self.width * (self.tokens * tensors + parameters)

    @property
    def shape(self) -> str:
        return f"{self.tokens}×{self.width} bf16{' + residual' if self.residual else ''}{self.name and ' ' + self.name}"


@dataclass(frozen=True)
class RopeCase:
    """RoPE of q and k, half layout, every feature rotated, float32 tables."""

    tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    op: ClassVar[str] = "rope"

    @property
    def moved_bytes(self) -> float:
        heads = self.num_heads + self.num_kv_heads
        return 2.0 * 2 * self.tokens * heads * self.head_dim + 2.0 * 4 * self.tokens * (self.head_dim // 2)

    @property
    def shape(self) -> str:
        return f"{self.tokens} tokens H{self.num_heads}+{self.num_kv_heads} d{self.head_dim} bf16"


@dataclass(frozen=True)
class AppendCase:
    """New keys and values written into a cache; ``fused``: QK-norm and RoPE on the way, and q returned with both."""

    batch: int
    tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    fused: bool = False
    page_size: int = 0
    cache_dtype: str = "bf16"

    op: ClassVar[str] = "kv_append"

    @property
    def capacity(self) -> int:
        """Slots of a sequence: there is room before and after what is appended."""
        return -(-(2 * self.tokens + 64) // max(self.page_size, 1)) * max(self.page_size, 1)

    @property
    def moved_bytes(self) -> float:
        heads = self.batch * self.tokens * self.num_kv_heads
        written = QUANTISED[self.cache_dtype].itemsize * self.head_dim + (4 if self.cache_dtype == "int8" else 0)
        q = 2.0 * 2 * self.batch * self.tokens * self.num_heads * self.head_dim if self.fused else 0.0
        # The tables are read once for each position; sequences that stand at the same position share a row.
        tables = 2.0 * 4 * self.tokens * (self.head_dim // 2) if self.fused else 0.0
        return 2.0 * heads * (2 * self.head_dim + written) + q + tables

    @property
    def shape(self) -> str:
        place = f"pages of {self.page_size}" if self.page_size else "contiguous"
        fused = f" with QK-norm and RoPE, H{self.num_heads}" if self.fused else ""
        return f"B{self.batch} {self.tokens} tokens Hkv{self.num_kv_heads} d{self.head_dim} {self.cache_dtype} {place}{fused}"


@dataclass(frozen=True)
class LinearCrossEntropyCase:
    """Mean cross-entropy of x Wᵀ; ``both``: with its gradients for x and W."""

    tokens: int
    hidden_size: int
    vocab_size: int
    both: bool = True

    op: ClassVar[str] = "linear_cross_entropy"

    @property
    def row_op(self) -> str:
        return f"linear_cross_entropy_{'both' if self.both else 'forward'}"

    @property
    def flop(self) -> float:
        return (6.0 if self.both else 2.0) * self.tokens * self.hidden_size * self.vocab_size

    @property
    def moved_bytes(self) -> float:
        operands = 2.0 * self.hidden_size * (self.tokens + self.vocab_size)
        return operands * (2 if self.both else 1) + 8.0 * self.tokens

    @property
    def shape(self) -> str:
        return f"{self.tokens} tokens × {self.hidden_size} × vocabulary {self.vocab_size} bf16"


@dataclass(frozen=True)
class LinearAttentionCase:
    """Causal linear attention with elu's features and the normaliser; ``decay``: a factor for each key head."""

    batch: int
    seqlen: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    decay: bool = False
    backward: bool = False

    op: ClassVar[str] = "linear_attention"

    @property
    def row_op(self) -> str:
        return f"linear_attention_{'backward' if self.backward else 'forward'}"

    @property
    def flop(self) -> float:
        # As a recurrence: a product of a query, or of a key, with a state. Forward one each, backward two and three.
        of_queries, of_keys = (
            2.0 * self.batch * self.seqlen * heads * self.head_dim**2 for heads in (self.num_heads, self.num_kv_heads)
        )
        return 2 * of_queries + 3 * of_keys if self.backward else of_queries + of_keys

    @property
    def moved_bytes(self) -> float:
        query, key = (
            2.0 * self.batch * self.seqlen * heads * self.head_dim for heads in (self.num_heads, self.num_kv_heads)
        )
        # Forward: q, k, v in, out. Backward: those and dout in, dq, dk, dv out.
        return 4 * query + 4 * key if self.backward else 2 * query + 2 * key

    @property
    def shape(self) -> str:
        heads = (
            f"H{self.num_heads}/{self.num_kv_heads}" if self.num_heads != self.num_kv_heads else f"H{self.num_heads}"
        )
        return f"B{self.batch} L{self.seqlen} {heads} d{self.head_dim} bf16{' decay' if self.decay else ''}"


@dataclass(frozen=True)
class ActivationCase:
    """What a feed-forward network does between its projections: "swiglu", "geglu" (gate and up, two tensors) or "gelu" (one)."""

    op: str
    tokens: int
    width: int
    backward: bool = False

    @property
    def row_op(self) -> str:
        return f"{self.op}_{'backward' if self.backward else 'forward'}"

    @property
    def moved_bytes(self) -> float:
        # Forward: inputs in, one output. Backward: inputs and dout in, a gradient for each input out.
        inputs = 1 if self.op == "gelu" else 2
        return 2.0 * self.tokens * self.width * (2 * inputs + 1 if self.backward else inputs + 1)

    @property
    def shape(self) -> str:
        return f"{self.tokens}×{self.width} bf16"
