"""Attention as a module, to the sequence itself or to another one: projections to q, k and v, the attention op, one projection back."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer.ops.attention import attention
from pytransformer.ops.rope import rope
from pytransformer.reference import attention as reference_attention

from .linear import Linear, RowBlocks
from .norm import RMSNorm
from .position import AlibiSlopes, RelativeKeys, RotaryEmbedding


class LayerCache(Protocol):
    """What :class:`Attention` asks of a cache: one layer's keys and values of the tokens so far. Made above and handed down."""

    def append(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        rotary: RotaryEmbedding | None,
        positions: Tensor | None,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
    ) -> Tensor:
        """Writes k and v behind what is there, k normalised and rotated; returns q normalised and rotated likewise.

        ``positions``: rows of the tables of ``rotary``, where they are not the places in the sequence.
        """
        ...

    def attend(
        self,
        q: Tensor,
        *,
        softmax_scale: float | None,
        window: tuple[int, int],
        softcap: float,
        alibi_slopes: Tensor | None,
        bias: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Causal attention of the appended tokens' q to everything in the cache: (batch, seqlen, num_heads, head_dim)."""
        ...


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention: self-attention, causal unless told otherwise, or cross-attention to a memory.

    Args:
        hidden_size: width of the input and output.
        num_heads, num_kv_heads, head_dim: ``num_kv_heads`` divides ``num_heads`` (``None`` = equal); ``head_dim`` ``None`` =
            ``hidden_size / num_heads``.
        bias: on the projections to q, k and v, and unless ``output_bias`` says otherwise on the one back.
        output_bias: on the projection back; ``None`` = ``bias``.
        causal, window, softmax_scale, softcap: see :func:`pytransformer.attention`.
        rotary: tables shared by the layers, or ``None``. Self-attention only.
        alibi: ALiBi slopes shared by the layers, or ``None``.
        qk_norm_eps: RMSNorm over each head of q and k before RoPE, with this epsilon; ``None`` = no norm.
        qk_norm_weight_offset: as of :class:`pytransformer.nn.RMSNorm`.
        qk_norm_whole: the norm is over all heads together instead.
        sinks: a learned logit for each head joins the denominators.
        relative_keys: vectors of the distances, or ``None``. Self-attention of whole sequences only, with as many key heads as heads.
        dropout: rate on the attention probabilities, in training.
        memory_size: width of the memory, if it has one of its own: the module is then for cross-attention alone.

    Weights: ``qkv_proj`` ((num_heads + 2 · num_kv_heads) · head_dim, hidden) with rows [q; k; v], with ``memory_size`` instead ``q_proj``
    (num_heads · head_dim, hidden) and ``kv_proj`` (2 · num_kv_heads · head_dim, memory_size); ``out_proj`` (hidden,
    num_heads · head_dim); ``q_norm``, ``k_norm`` (head_dim, or with ``qk_norm_whole`` that of all heads); ``sinks`` (num_heads).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        output_bias: bool | None = None,
        causal: bool = True,
        window: tuple[int, int] = (-1, -1),
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        rotary: RotaryEmbedding | None = None,
        alibi: AlibiSlopes | None = None,
        qk_norm_eps: float | None = None,
        qk_norm_weight_offset: float = 0.0,
        qk_norm_whole: bool = False,
        sinks: bool = False,
        relative_keys: RelativeKeys | None = None,
        dropout: float = 0.0,
        memory_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {self.num_kv_heads}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads when head_dim is not given, got {hidden_size} and {num_heads}"
            )
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.causal = causal
        self.window = window
        self.softmax_scale = softmax_scale
        self.softcap = softcap
        self.dropout = dropout
        self.memory_size = memory_size
        width = self.head_dim * num_heads
        kv_width = 2 * self.head_dim * self.num_kv_heads
        if memory_size is None:
            self.qkv_proj: Linear | RowBlocks = Linear(
                hidden_size, width + kv_width, bias=bias, device=device, dtype=dtype
            )
        else:
            if rotary is not None:
                raise ValueError("rotary is for self-attention: give rotary=None with memory_size")
            self.q_proj = Linear(hidden_size, width, bias=bias, device=device, dtype=dtype)
            self.kv_proj = Linear(memory_size, kv_width, bias=bias, device=device, dtype=dtype)
        has_output_bias = bias if output_bias is None else output_bias
        self.out_proj = Linear(width, hidden_size, bias=has_output_bias, device=device, dtype=dtype)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        self.qk_norm_whole = qk_norm_whole
        if qk_norm_eps is not None:
            widths = (width, kv_width // 2) if qk_norm_whole else (self.head_dim, self.head_dim)
            self.q_norm, self.k_norm = (
                RMSNorm(norm_width, qk_norm_eps, weight_offset=qk_norm_weight_offset, device=device, dtype=dtype)
                for norm_width in widths
            )
        self.sinks = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype)) if sinks else None
        if relative_keys is not None and (memory_size is not None or self.num_kv_heads != num_heads):
            raise ValueError("relative_keys are for self-attention with num_kv_heads = num_heads")
        self.relative_keys = relative_keys
        self.rotary = rotary
        self.alibi = alibi

    @property
    def alibi_slopes(self) -> Tensor | None:
        """(num_heads), or ``None``."""
        return None if self.alibi is None else self.alibi.slopes

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        causal: bool | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        memory_cu_seqlens: Tensor | None = None,
        memory_max_seqlen: int | None = None,
        keys_and_values: tuple[Tensor, Tensor] | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """(batch, seqlen, hidden), or packed (total, hidden) with ``cu_seqlens`` -> the same shape.

        Args:
            memory: (batch, memory_seqlen, hidden or memory_size): keys and values come from here instead of x. Packed: (total, …) with
                ``memory_cu_seqlens``.
            causal: instead of the module's. A causal module must be told with a memory: ``False`` sees all of it, ``True`` takes x for
                the last tokens of the memory (bottom-right alignment).
            mask, bias, key_padding_mask: see :func:`pytransformer.attention`; True = attend. The keys are those of the memory, if any.
            positions: int32 or int64 (seqlen) or (batch, seqlen), packed (total): for RoPE, where they do not simply count from 0
                (left padding), or with a cache from its length.
            cu_seqlens, memory_cu_seqlens, max_seqlen, memory_max_seqlen: packed sequences; see :func:`pytransformer.attention`.
            keys_and_values: what :meth:`keys_and_values` made of a memory before, instead of the memory: it serves many calls.
            cache: the tokens before x, to which x is appended; not differentiable. ``None`` = x is the whole sequence.

        Raises:
            ValueError: arguments that do not go together, or that the module was not made for.
            Others: see :func:`pytransformer.attention`.
        """
        given: dict[str, Any] = {
            "memory": memory, "causal": causal, "mask": mask, "key_padding_mask": key_padding_mask, "cu_seqlens": cu_seqlens,
            "max_seqlen": max_seqlen, "memory_cu_seqlens": memory_cu_seqlens, "memory_max_seqlen": memory_max_seqlen,
            "keys_and_values": keys_and_values,
        }  # fmt: skip
        if cache is not None:
            attended = self._attend_in_cache(x, cache, positions, bias, given)
        else:
            q, k, v, options = self._prepare(x, **given, bias=bias, positions=positions)
            attended = attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, **options)  # type: ignore[assignment]
        return self.out_proj(attended.flatten(-2))  # type: ignore[no-any-return]

    def weights(self, x: Tensor, memory: Tensor | None = None, **options: Any) -> Tensor:
        """The attention probabilities, for inspection: (batch, num_heads, seqlen, memory_seqlen), computed plainly, rows summing to 1.

        They are read off the naive attention by giving it the identity matrix as values, so they obey every option.

        Args:
            x, memory, options: as of :meth:`forward`, not packed and without a cache.
        """
        for name in ("cu_seqlens", "memory_cu_seqlens", "cache"):
            if options.pop(name, None) is not None:
                raise ValueError(f"weights are for sequences that are not packed and not in a cache: leave {name} out")
        q, k, _, prepared = self._prepare(x, memory, **options)
        batch, seqlen_k = k.shape[:2]
        identity = torch.eye(seqlen_k, dtype=q.dtype, device=q.device)
        values = identity[None, :, None, :].expand(batch, seqlen_k, self.num_kv_heads, seqlen_k)
        probabilities = reference_attention(q, k, values, **prepared)
        assert isinstance(probabilities, Tensor)
        return probabilities.transpose(1, 2)

    def keys_and_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """k and v of a memory, each (batch, memory_seqlen, num_kv_heads, head_dim), for many calls that attend to it."""
        if self.memory_size is not None:
            k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.kv_proj(memory).chunk(2, dim=-1))
        else:
            _, k, v = self._project(memory[..., :0, :] if memory.ndim > 2 else memory[:0], memory)
        return (k if self.k_norm is None else self._norm(self.k_norm, k)), v

    def _attend_in_cache(
        self, x: Tensor, cache: LayerCache, positions: Tensor | None, bias: Tensor | None, given: dict[str, Any]
    ) -> Tensor:
        refused = [name for name, value in given.items() if value is not None]
        if refused:
            raise ValueError(f"a cache knows the sequence and its positions: leave {', '.join(refused)} out")
        if self.relative_keys is not None:
            raise ValueError("a module with relative_keys attends to whole sequences: give it no cache")
        q, k, v = self._project(x, None)
        q_norm, k_norm = self.q_norm, self.k_norm
        if self.qk_norm_whole and q_norm is not None and k_norm is not None:
            q, k = self._norm(q_norm, q), self._norm(k_norm, k)
            q_norm = k_norm = None
        q = cache.append(q, k, v, rotary=self.rotary, positions=positions, q_norm=q_norm, k_norm=k_norm)
        return cache.attend(
            q,
            softmax_scale=self.softmax_scale,
            window=self.window,
            softcap=self.softcap,
            alibi_slopes=self.alibi_slopes,
            bias=bias,
            sinks=self.sinks,
        )

    def _norm(self, norm: RMSNorm, heads: Tensor) -> Tensor:
        """The norm of q or k: over each head, or over all of them together."""
        normalised: Tensor = norm(heads.flatten(-2) if self.qk_norm_whole else heads)
        return normalised.view(heads.shape)

    def _prepare(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        causal: bool | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        memory_cu_seqlens: Tensor | None = None,
        memory_max_seqlen: int | None = None,
        keys_and_values: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """q, k, v, normalised and rotated, and the options with which they attend."""
        if memory is not None and keys_and_values is not None:
            raise ValueError("keys_and_values stand for a memory: give one of the two")
        is_cross = memory is not None or keys_and_values is not None
        if not is_cross:
            if memory_cu_seqlens is not None or memory_max_seqlen is not None:
                raise ValueError("memory_cu_seqlens and memory_max_seqlen describe a memory, and there is none")
            memory_cu_seqlens, memory_max_seqlen = cu_seqlens, max_seqlen
        elif self.causal and causal is None:
            raise ValueError(
                "this module is causal: to attend to a memory say causal=False (all of it) or causal=True (x are its last tokens), "
                "or make the module with causal=False"
            )
        if is_cross and self.rotary is not None:
            raise ValueError("RoPE needs positions that q and k share: a module with rotary attends to no memory")
        if positions is not None and self.rotary is None:
            raise ValueError("positions are for RoPE, and this module has rotary=None")
        if keys_and_values is None:
            q, k, v = self._project(x, memory)
            k = k if self.k_norm is None else self._norm(self.k_norm, k)
        else:
            q, (k, v) = self._queries(x), keys_and_values
        q = q if self.q_norm is None else self._norm(self.q_norm, q)
        if self.rotary is not None:
            q, k = self._rotate(q, k, positions, cu_seqlens)
        if self.relative_keys is not None:
            if is_cross or cu_seqlens is not None:
                raise ValueError(
                    "a module with relative_keys attends to whole sequences: give it no memory and no cu_seqlens"
                )
            scale = self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
            scores = self.relative_keys.scores(q, k) * scale
            bias = scores if bias is None else scores + bias
        options = {
            "causal": self.causal if causal is None else causal, "window": self.window, "softmax_scale": self.softmax_scale,
            "softcap": self.softcap, "alibi_slopes": self.alibi_slopes, "sinks": self.sinks, "mask": mask, "bias": bias,
            "key_padding_mask": key_padding_mask, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": memory_cu_seqlens,
            "max_seqlen_q": max_seqlen, "max_seqlen_k": memory_max_seqlen,
        }  # fmt: skip
        return q, k, v, options

    def _project(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        width, heads = self.head_dim * self.num_heads, (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        if self.memory_size is not None:
            if memory is None:
                raise ValueError("this module was made with memory_size, for cross-attention alone: pass memory")
            projected = self.q_proj(x), *self.kv_proj(memory).chunk(2, dim=-1)
        elif memory is None:
            qkv = self.qkv_proj(x)
            # Not unflatten and split, which torch wraps in Python: they take four times as long where a token is all there is.
            q, k, v = qkv.view(*qkv.shape[:-1], sum(heads), self.head_dim).split_with_sizes(heads, -2)
            return q, k, v
        elif isinstance(self.qkv_proj, RowBlocks) and len(self.qkv_proj.rows) == 3:
            q = self.qkv_proj.some_rows(x, 0, 1)
            projected = q, *self.qkv_proj.some_rows(memory, 1, 3).chunk(2, dim=-1)
        elif type(self.qkv_proj) in (Linear, nn.Linear):
            weight, bias = self.qkv_proj.weight, self.qkv_proj.bias
            bias_q, bias_kv = (None, None) if bias is None else (bias[:width], bias[width:])
            keys_and_values = F.linear(memory, weight[width:], bias_kv)
            projected = F.linear(x, weight[:width], bias_q), *keys_and_values.chunk(2, dim=-1)
        else:  # something else has been put in its place (an adapter): it is called, and half of the work is thrown away
            projected = self.qkv_proj(x)[..., :width], *self.qkv_proj(memory)[..., width:].chunk(2, dim=-1)
        q, k, v = (tensor.unflatten(-1, (-1, self.head_dim)) for tensor in projected)
        return q, k, v

    def _queries(self, x: Tensor) -> Tensor:
        if self.memory_size is not None:
            q = self.q_proj(x)
        elif isinstance(self.qkv_proj, RowBlocks) and len(self.qkv_proj.rows) == 3:
            q = self.qkv_proj.some_rows(x, 0, 1)
        elif type(self.qkv_proj) in (Linear, nn.Linear):
            width, bias = self.head_dim * self.num_heads, self.qkv_proj.bias
            q = F.linear(x, self.qkv_proj.weight[:width], None if bias is None else bias[:width])
        else:
            q = self.qkv_proj(x)[..., : self.head_dim * self.num_heads]
        heads: Tensor = q.unflatten(-1, (-1, self.head_dim))
        return heads

    def _rotate(
        self, q: Tensor, k: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert self.rotary is not None
        if cu_seqlens is None or positions is not None:
            rotated_q, rotated_k = self.rotary(q, k, positions=positions)
            return rotated_q, rotated_k
        tables, interleaved = (self.rotary.cos, self.rotary.sin), self.rotary.interleaved
        rotated_q, rotated_k = rope(q, k, *tables, cu_seqlens=cu_seqlens, interleaved=interleaved)
        assert rotated_k is not None
        return rotated_q, rotated_k

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, window={self.window}"
