"""Attention, forward and backward, over tiles: the loops. tiles.py has the scores.

Sources: Milakov & Gimelshein 2018 (online softmax); Rabe & Staats 2021 (linear memory); Dao et al. 2022 (the backward pass from
lse).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer.ops.attention.blocks import Heads, Piece, pieces
from pytransformer.ops.attention.call import AttentionCall
from pytransformer.ops.attention.scratch import Scratch
from pytransformer.ops.attention.tiles import Problem, Tile, add_to_part, largest_of

Keys = Callable[[slice, slice], tuple[Tensor, Tensor]]


def attend(call: AttentionCall, first_sequence: int = 0, heads: Heads | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of dense sequences: (batch, seqlen_q, num_heads, value head_dim), (batch, num_heads, seqlen_q)."""
    if several := pieces(call):
        return _attend_pieces(call, several, first_sequence)
    problem = Problem(call, call.k.shape[1], call.k.shape[2], first_sequence, heads)
    k, v = problem.heads_first(call.k), problem.heads_first(call.v)
    largest = largest_of(k)

    def keys(sequences: slice, cols: slice) -> tuple[Tensor, Tensor]:
        which = problem.kv_heads(sequences)
        return k[which, cols], v[which, cols]

    return attend_keys(problem, keys, call.v.shape[-1], largest)


def _attend_pieces(call: AttentionCall, several: list[Piece], first_sequence: int) -> tuple[Tensor, Tensor]:
    """The same, of calls whose sequences or heads have block masks of their own."""
    batch, seqlen_q, num_heads, _ = call.q.shape
    out = call.q.new_empty((*call.q.shape[:-1], call.v.shape[-1]))
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    lse = torch.empty((batch, num_heads, seqlen_q), dtype=dtype, device=call.q.device)
    for piece in several:
        place = first_sequence + piece.sequences.start, Heads(piece.heads.start, num_heads)
        out_piece, lse_piece = attend(piece.of_call(call), *place)
        piece.of_rows(out).copy_(out_piece)
        piece.of_statistics(lse).copy_(lse_piece)
    return out, lse


def attend_keys(problem: Problem, keys: Keys, value_dim: int, largest_k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same, of keys and values that come a slice of sequences and positions at a time, as ``Problem.heads_first`` gives them."""
    call, dtype = problem.call, problem.dtype
    out = call.q.new_empty((*call.q.shape[:-1], value_dim))
    lse = torch.empty((problem.batch, problem.num_heads, problem.seqlen_q), dtype=dtype, device=call.q.device)
    memory = Scratch(dtype, call.q.device)
    for sequences, rows in problem.row_blocks():
        q = problem.block("q", call.q, sequences, rows, memory).mul_(problem.factor)
        if largest_k is not None:
            problem.trust(q, largest_k)
        maximum, total = _start(problem, q, rows.stop - rows.start)
        accumulator = memory.take("accumulator", *problem.block_shape(sequences, rows, value_dim)).zero_()
        for tile in problem.tiles(sequences, rows):
            k, v = _side_by_side([keys(sequences, run) for run in tile.runs], memory)
            weights, _ = problem.scores(q, k, tile, memory)
            before = maximum
            maximum = torch.maximum(before, weights.amax(dim=-1, keepdim=True))
            problem.exp_(weights.sub_(maximum))
            rescale = problem.exp_(before - maximum)
            total = total.mul_(rescale).add_(weights.sum(dim=-1, keepdim=True))
            kept = problem.kept(tile, memory)
            if kept is not None:
                problem.by_head(weights, tile).mul_(kept)
            accumulator.mul_(rescale).baddbmm_(weights, v)
        empty = total == 0
        accumulator.div_(total.masked_fill_(empty, 1.0))
        if call.dropout_p > 0:
            accumulator.mul_(_kept_scale(call.dropout_p))
        out[sequences, rows] = problem.unblock(accumulator, sequences, rows)
        total.log_().add_(maximum.div_(problem.unit)).masked_fill_(empty, -math.inf)
        lse[sequences, :, rows] = total.view(-1, problem.num_heads, rows.stop - rows.start)
    return out, lse


def _side_by_side(runs: list[tuple[Tensor, Tensor]], memory: Scratch) -> tuple[Tensor, Tensor]:
    """Keys and values of a tile's runs, (sequences · num_kv_heads, cols, dim)."""
    if len(runs) == 1:
        return runs[0]
    k, v = zip(*runs)
    return _joined("k", k, memory), _joined("v", v, memory)


def _joined(name: str, parts: tuple[Tensor, ...], memory: Scratch) -> Tensor:
    shape = parts[0].shape[0], sum(one.shape[1] for one in parts), parts[0].shape[2]
    return torch.cat(parts, dim=1, out=memory.take(name, *shape))


def _start(problem: Problem, q: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Maximum and sum of a row before its first key: those of its sink. Finite, so that a row of -inf alone meets no inf - inf."""
    lowest = torch.finfo(problem.dtype).min
    sinks = problem.call.sinks
    shape = (*q.shape[:2], 1)
    if sinks is None:
        return q.new_full(shape, lowest), q.new_zeros(shape)
    logits = _by_row(sinks.to(problem.dtype) * problem.unit, problem, num_rows, shape)
    maximum = logits.clamp(min=lowest)
    return maximum, problem.exp_(logits - maximum)


def _by_row(per_head: Tensor, problem: Problem, num_rows: int, shape: Any) -> Tensor:
    """(num_heads) for each row of a block."""
    return (
        per_head.view(1, -1, 1)
        .expand(-1, -1, num_rows)
        .reshape(problem.num_kv_heads, -1, 1)
        .repeat(shape[0] // problem.num_kv_heads, 1, 1)
    )


def _kept_scale(dropout_p: float) -> float:
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


class Gradients(NamedTuple):
    """What the backward pass returns: of k, v and what is added up in the dtype of the scores; None for what is not wanted or not there."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None


def no_gradients(given: Any, call: AttentionCall) -> Gradients:
    """Zeros, for what is summed over sequences."""
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    bias, slopes = call.bias if given.wants_bias else None, call.alibi_slopes if given.wants_slopes else None
    dq, dk, dv = (torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in call[:3])
    return Gradients(dq, dk, dv, *(_zeros(tensor, dtype) for tensor in (bias, call.sinks, slopes)))


def backward(given: Any, call: AttentionCall, first_sequence: int = 0, heads: Heads | None = None) -> Gradients:
    """Gradients of dense sequences from ``given``: dout, dlse (or None), out, lse, wants_bias, wants_slopes."""
    if several := pieces(call):
        return _backward_of_pieces(given, call, several, first_sequence)
    return _Backward(given, call, first_sequence, heads).walk()


def _backward_of_pieces(given: Any, call: AttentionCall, several: list[Piece], first_sequence: int) -> Gradients:
    """The same, of calls whose sequences or heads have block masks of their own; heads that share keys add to the same gradients."""
    sums = no_gradients(given, call)
    for piece in several:
        place = first_sequence + piece.sequences.start, Heads(piece.heads.start, call.q.shape[2])
        found = backward(piece.of_gradients(given), piece.of_call(call), *place)
        piece.of_rows(sums.q).copy_(found.q)
        piece.of_rows(sums.k, kv=True).add_(found.k)
        piece.of_rows(sums.v, kv=True).add_(found.v)
        if sums.bias is not None and found.bias is not None:
            piece.of_scores(sums.bias).add_(found.bias)
        if sums.sinks is not None and found.sinks is not None:
            sums.sinks[piece.heads].add_(found.sinks)
        if sums.alibi_slopes is not None and found.alibi_slopes is not None:
            piece.of_slopes(sums.alibi_slopes).add_(found.alibi_slopes)
    return sums


class _Backward:
    def __init__(self, given: Any, call: AttentionCall, first_sequence: int, heads: Heads | None) -> None:
        problem = self.problem = Problem(call, call.k.shape[1], call.k.shape[2], first_sequence, heads)
        if given.wants_slopes and call.q.dtype != problem.dtype:
            # Distances would multiply what the rounding of out leaves in delta.
            wide, _ = attend(call._replace(q=call.q.to(problem.dtype)), first_sequence, heads)
            given = given._replace(out=wide)
        self.given, self.call = given, call
        self.k, self.v = problem.heads_first(call.k), problem.heads_first(call.v)
        self.largest_k = largest_of(self.k)
        self.dk, self.dv = torch.zeros_like(self.k), torch.zeros_like(self.v)
        self.dbias = _zeros(problem.bias if given.wants_bias else None, problem.dtype)
        self.dslopes = _zeros(problem.slopes if given.wants_slopes else None, problem.dtype)
        self.dsinks = _zeros(call.sinks, problem.dtype)
        self.memory = Scratch(problem.dtype, call.q.device)

    def walk(self) -> Gradients:
        call, problem = self.call, self.problem
        dq = torch.empty_like(call.q, memory_format=torch.contiguous_format)
        for sequences, rows in problem.row_blocks():
            q = problem.block("q", call.q, sequences, rows, self.memory).mul_(problem.factor)
            dout = problem.block("dout", self.given.dout, sequences, rows, self.memory)
            problem.trust(q, self.largest_k)
            delta = self._delta(dout, sequences, rows)
            if call.dropout_p > 0:
                # What is kept is multiplied by this, and meets dout in either product.
                dout.mul_(_kept_scale(call.dropout_p))
            lse = self.given.lse[sequences, :, rows].to(problem.dtype)
            if self.dsinks is not None:
                logits = call.sinks.to(problem.dtype)[:, None]  # type: ignore[union-attr]
                self.dsinks -= (torch.exp(logits - lse) * delta.view(lse.shape)).nan_to_num_(0.0).sum(dim=(0, 2))
            # A row that sees nothing has lse -inf: with +inf its weights are 0.
            lse = lse.masked_fill(lse == -math.inf, math.inf).mul_(problem.unit).view(*q.shape[:2], 1)
            dq_block = self.memory.take("dq", *q.shape).zero_()
            for tile in problem.tiles(sequences, rows):
                self._add_tile(tile, q, dout, lse, delta, dq_block)
            dq[sequences, rows] = problem.unblock(dq_block.mul_(call.softmax_scale), sequences, rows)
        if call.softmax_scale != 0:
            self.dk.mul_(call.softmax_scale / problem.factor)
        dslopes = None if self.dslopes is None else self.dslopes.view(call.alibi_slopes.shape)  # type: ignore[union-attr]
        dbias = None if self.dbias is None else self.dbias.view(call.bias.shape)  # type: ignore[union-attr]
        return Gradients(dq, self._heads_last(self.dk), self._heads_last(self.dv), dbias, self.dsinks, dslopes)

    def _add_product(self, sum_: Tensor, tile: Tile, a: Tensor, b: Tensor) -> None:
        """sum += aᵀ b for the tile's keys, parts of a larger tensor, for which the fused form has no fast path."""
        product = self.memory.take("product", a.shape[0], a.shape[2], b.shape[2])
        torch.bmm(a.transpose(1, 2), b, out=product)
        for run, cols in tile.places:
            sum_[:, run].add_(product[:, cols])

    def _delta(self, dout: Tensor, sequences: slice, rows: slice) -> Tensor:
        """Σ_j weight · its gradient, by row; what comes in through lse counts against it."""
        out = self.problem.block("out", self.given.out, sequences, rows, self.memory)
        delta = out.mul_(dout).sum(dim=-1, keepdim=True)
        if self.given.dlse is not None:
            dlse = self.given.dlse[sequences, :, rows].to(delta.dtype)
            delta -= dlse.reshape(delta.shape)
        return delta

    def _add_tile(self, tile: Tile, q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, dq: Tensor) -> None:
        problem, memory = self.problem, self.memory
        which = problem.kv_heads(tile.sequences)
        k, v = _side_by_side([(self.k[which, run], self.v[which, run]) for run in tile.runs], memory)
        dk, dv = self.dk[which], self.dv[which]
        weights, tanh = problem.scores(q, k, tile, memory)
        problem.exp_(weights.sub_(lse))
        dscores = torch.bmm(dout, v.transpose(1, 2), out=memory.take("dscores", *weights.shape))
        kept = problem.kept(tile, memory)
        if kept is None:
            self._add_product(dv, tile, weights, dout)
        else:
            problem.by_head(dscores, tile).mul_(kept)
            remaining = memory.take("remaining", *weights.shape)
            torch.mul(problem.by_head(weights, tile), kept, out=problem.by_head(remaining, tile))
            self._add_product(dv, tile, remaining, dout)
        dscores.sub_(delta).mul_(weights)
        self._add_terms(problem.by_head(dscores, tile), tile)
        if tanh is not None:
            # d tanh(x) = (1 - tanh²) dx
            dscores.addcmul_(tanh.square_(), dscores, value=-1)
        self._add_product(dk, tile, dscores, q)
        dq.baddbmm_(dscores, k)

    def _add_terms(self, dscores: Tensor, tile: Tile) -> None:
        """The gradients of what is added to the scores."""
        if self.dbias is not None:
            add_to_part(self.dbias, tile, dscores)
        if self.dslopes is not None:
            rows_and_cols = dscores.flatten(2).matmul(self.problem.distance(tile).abs_().flatten())
            add_to_part(self.dslopes, tile, -rows_and_cols[..., None, None])

    def _heads_last(self, tensor: Tensor) -> Tensor:
        """(batch · num_kv_heads, seqlen, dim) as (batch, seqlen, num_kv_heads, dim)."""
        return tensor.view(self.problem.batch, self.problem.num_kv_heads, *tensor.shape[1:]).transpose(1, 2)


def _zeros(like: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if like is None else torch.zeros(like.shape, dtype=dtype, device=like.device)
