"""``torch.nn.MultiheadAttention`` and the function below it, served by our attention."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer.ops.checks import FLOAT_DTYPES
from pytransformer.ops.precision import is_autocasting

from .functional import attend

_HOOK = "pytransformer"  # key of a hook; torch's are numbers


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention``: its constructor, state_dict, arguments and results.

    In the masks True means *ignore*, as torch's module has it. They are not merged, expanded or turned into floats, so that padding costs
    (batch, seqlen_k) booleans and a float mask gets its gradient at its own shape. A query with nothing to attend to gives
    ``out_proj.bias`` (its weights are 0), where torch gives NaN.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as torch's.
    """

    def __init__(self, embed_dim: int, num_heads: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(embed_dim, num_heads, *args, **kwargs)
        call_forward(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        call_forward(self)  # of files that older versions wrote

    def _reset_parameters(self) -> None:
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``torch.nn.MultiheadAttention.forward``.

        Args:
            query: (seqlen_q, batch, embed_dim), (batch, seqlen_q, embed_dim) with ``batch_first``, or without a batch
                (seqlen_q, embed_dim).
            key, value: likewise, of widths kdim and vdim.
            key_padding_mask: (batch, seqlen_k), or (seqlen_k): True = ignore; floating = added to the scores.
            need_weights: return the weights too. They are then computed plainly; ``False`` is the fast way.
            attn_mask: (seqlen_q, seqlen_k) or (batch · num_heads, seqlen_q, seqlen_k): True = ignore; floating = added to the scores.
            average_attn_weights: return the mean of the weights over the heads instead of each head's.
            is_causal: a promise that ``attn_mask``, which must be given, is the causal mask, so that it need not be read.

        Returns:
            The output in the layout of the query, and the weights, (batch, seqlen_q, seqlen_k) or (batch, num_heads, seqlen_q, seqlen_k)
            (without a batch where the query has none), or ``None``.

        Raises:
            AssertionError, RuntimeError: as torch, for shapes and dtypes that do not fit.
            NotImplementedError: nested tensors.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._by_torch(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        else:  # TorchScript leaves out the branch that is not taken, and only that
            weights = Weights(
                self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight, self.in_proj_bias,
                self.bias_k, self.bias_v, self.out_proj.weight, self.out_proj.bias,
            )  # fmt: skip
            options = Options(
                self.embed_dim, self.num_heads, self.add_zero_attn, self.dropout if self.training else 0.0, need_weights,
                average_attn_weights, is_causal, self.batch_first,
            )  # fmt: skip
            return _multi_head_attention(query, key, value, weights, options, key_padding_mask, attn_mask)

    def _by_torch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """What TorchScript runs, which cannot see into our ops: torch's function."""
        batch_first = self.batch_first and query.dim() == 3
        if batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        if self._qkv_same_embed_dim:
            attended, weights = F.multi_head_attention_forward(
                query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias, self.bias_k, self.bias_v,
                self.add_zero_attn, self.dropout, self.out_proj.weight, self.out_proj.bias, training=self.training,
                key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
                average_attn_weights=average_attn_weights, is_causal=is_causal,
            )  # fmt: skip
        else:
            attended, weights = F.multi_head_attention_forward(
                query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias, self.bias_k, self.bias_v,
                self.add_zero_attn, self.dropout, self.out_proj.weight, self.out_proj.bias, training=self.training,
                key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask, use_separate_proj_weight=True,
                q_proj_weight=self.q_proj_weight, k_proj_weight=self.k_proj_weight, v_proj_weight=self.v_proj_weight,
                average_attn_weights=average_attn_weights, is_causal=is_causal,
            )  # fmt: skip
        return (attended.transpose(0, 1) if batch_first else attended), weights


def call_forward(module: nn.MultiheadAttention) -> None:
    """Keeps torch's encoder layers from handing a module's weights to one fused function of torch's, in eval mode, past its forward: they
    do so where no module in them has a hook. ``out_proj`` is never called as a module, in torch either, so a hook there costs nothing."""
    module.out_proj._forward_pre_hooks.setdefault(_HOOK, _never_called)  # type: ignore[arg-type]


def leave_forward(module: nn.MultiheadAttention) -> None:
    """Undoes :func:`call_forward`."""
    module.out_proj._forward_pre_hooks.pop(_HOOK, None)  # type: ignore[call-overload]


def _never_called(self: Any, input: tuple[Tensor]) -> None:  # TorchScript wants the type that a Linear is called with
    pass


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``torch.nn.functional.multi_head_attention_forward``: sequences first; see there and :class:`MultiheadAttention`."""
    if use_separate_proj_weight:
        in_proj_weight = None
    else:
        q_proj_weight = k_proj_weight = v_proj_weight = None
    weights = Weights(
        in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight, in_proj_bias, bias_k, bias_v, out_proj_weight,
        out_proj_bias, static_k, static_v,
    )  # fmt: skip
    options = Options(
        embed_dim_to_check, num_heads, add_zero_attn, dropout_p if training else 0.0, need_weights, average_attn_weights,
        is_causal, False,
    )  # fmt: skip
    return _multi_head_attention(query, key, value, weights, options, key_padding_mask, attn_mask)


class Weights(NamedTuple):
    """The weights of one call: one packed input projection or three, what is appended to the keys, the output projection."""

    in_proj_weight: Tensor | None
    q_proj_weight: Tensor | None
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    static_k: Tensor | None = None
    static_v: Tensor | None = None


class Options(NamedTuple):
    """Everything of one call that is not a tensor."""

    embed_dim: int
    num_heads: int
    add_zero_attn: bool
    dropout_p: float
    need_weights: bool
    average_attn_weights: bool
    is_causal: bool
    batch_first: bool


class Masks(NamedTuple):
    """What hides keys or is added to scores, as :func:`pytransformer.attention` takes it: True = attend."""

    mask: Tensor | None = None
    bias: Tensor | None = None
    key_padding_mask: Tensor | None = None


def _multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, weights: Weights, options: Options, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    batched = _check_inputs(query, key, value, weights, options)
    # Which of the three are the same tensor decides how many projections there are; views would hide it.
    same_kv, same_qk = key is value, query is key
    query = _batch_first(query, options, batched)
    key = query if same_qk else _batch_first(key, options, batched)
    value = key if same_kv else _batch_first(value, options, batched)
    if not batched and key_padding_mask is not None:
        key_padding_mask = key_padding_mask[None]

    batch, seqlen_q = query.shape[:2]
    top_left_causal = options.is_causal and key_padding_mask is None and not options.need_weights
    if options.is_causal and attn_mask is None:
        raise RuntimeError(
            "is_causal=True is a hint about attn_mask, which is None: pass the causal mask too "
            "(torch.nn.Transformer.generate_square_subsequent_mask makes one)"
        )
    masks = _masks(
        None if top_left_causal else attn_mask, key_padding_mask, (batch, seqlen_q, key.shape[1]), options, query.dtype
    )
    q, k, v = _project(query, key, value, weights, options)
    k, v, masks = _append_keys(k, v, masks, weights, options)

    attention_weights = None
    if options.need_weights:
        attended, attention_weights = _attend_plainly(q, k, v, masks, options)
    else:
        attended = attend(q, k, v, top_left_causal=top_left_causal, dropout_p=options.dropout_p, **masks._asdict())
    attended = attended.flatten(-2)
    if not batched:
        attended = attended[0]
        attention_weights = None if attention_weights is None else attention_weights[0]
    elif not options.batch_first:
        attended = attended.transpose(0, 1).contiguous()
    return F.linear(attended, weights.out_proj_weight, weights.out_proj_bias), attention_weights


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, weights: Weights, options: Options) -> bool:
    """Whether the input has a batch; raises as torch does where it fits neither way."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.is_nested:
            raise NotImplementedError(
                f"MultiheadAttention takes no nested tensors, {name} is one; pad it and pass key_padding_mask "
                "(torch.nn.TransformerEncoder makes them unless enable_nested_tensor=False)"
            )
    if query.dim() not in (2, 3):
        raise AssertionError(f"query must have 2 dimensions (without a batch) or 3, got shape {tuple(query.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != query.dim():
            raise AssertionError(
                f"{name} must have as many dimensions as query ({query.dim()}), got shape {tuple(tensor.shape)}"
            )
    if query.shape[-1] != options.embed_dim:
        raise AssertionError(
            f"query must end in the embedding dimension, embed_dim = {options.embed_dim}, got shape {tuple(query.shape)}"
        )
    if options.embed_dim % options.num_heads:
        raise AssertionError(f"embed_dim {options.embed_dim} is not divisible by num_heads {options.num_heads}")
    # Of separate projections only the lengths must agree, and not the widths.
    compared = slice(None) if weights.in_proj_weight is not None else slice(None, -1)
    if key.shape[compared] != value.shape[compared]:
        raise AssertionError(f"key shape {tuple(key.shape)} does not match value shape {tuple(value.shape)}")
    batch_dim = 0 if options.batch_first else 1
    if query.dim() == 3 and query.shape[batch_dim] != key.shape[batch_dim]:
        raise RuntimeError(
            f"query and key must have the same batch (dimension {batch_dim}), got shapes {tuple(query.shape)} and {tuple(key.shape)}"
        )
    return query.dim() == 3


def _batch_first(tensor: Tensor, options: Options, batched: bool) -> Tensor:
    """(batch, seqlen, width), a view."""
    if not batched:
        return tensor[None]
    return tensor if options.batch_first else tensor.transpose(0, 1)


def _masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, sizes: tuple[int, int, int], options: Options, dtype: torch.dtype
) -> Masks:  # fmt: skip
    """torch's masks (True = ignore, floating = added) as ours, at the shapes they have."""
    batch, seqlen_q, seqlen_k = sizes
    mask = bias = padding = None
    if attn_mask is not None:
        _check_mask_dtype("attn_mask", attn_mask, dtype)
        if attn_mask.dim() == 2:
            allowed = (seqlen_q, seqlen_k)
        elif attn_mask.dim() == 3:
            allowed = (batch * options.num_heads, seqlen_q, seqlen_k)  # type: ignore[assignment]
        else:
            raise RuntimeError(f"attn_mask must have 2 or 3 dimensions, got shape {tuple(attn_mask.shape)}")
        if tuple(attn_mask.shape) != allowed:
            raise RuntimeError(
                f"The shape of the {attn_mask.dim()}D attn_mask is {tuple(attn_mask.shape)}, but should be {allowed}."
            )
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.reshape(batch, options.num_heads, seqlen_q, seqlen_k)
        if attn_mask.is_floating_point():
            bias = attn_mask
        else:
            mask = ~attn_mask
    if key_padding_mask is not None:
        _check_mask_dtype("key_padding_mask", key_padding_mask, dtype)
        if tuple(key_padding_mask.shape) != (batch, seqlen_k):
            raise AssertionError(
                f"key_padding_mask must have shape (batch, seqlen_k) = {(batch, seqlen_k)}, got {tuple(key_padding_mask.shape)}"
            )
        if key_padding_mask.is_floating_point():
            added = key_padding_mask[:, None, None, :]
            bias = added if bias is None else bias + added
        else:
            padding = ~key_padding_mask
    return Masks(mask, bias, padding)


def _check_mask_dtype(name: str, mask: Tensor, dtype: torch.dtype) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise AssertionError(
            f"{name} must be boolean (True = ignore) or floating (added to the scores), got {mask.dtype}"
        )
    allowed = {dtype, torch.float32}
    if is_autocasting(mask.device.type):  # which casts the query, and the mask too
        allowed.update(FLOAT_DTYPES)
    if mask.is_floating_point() and mask.dtype not in allowed:
        raise RuntimeError(f"a floating {name} must have the dtype of query ({dtype}) or float32, got {mask.dtype}")


def _project(
    query: Tensor, key: Tensor, value: Tensor, weights: Weights, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v: (batch, seqlen, num_heads, head_dim), views of as few projections as there are different inputs."""
    weight, bias, width = weights.in_proj_weight, weights.in_proj_bias, options.embed_dim
    if weight is None:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        assert weights.q_proj_weight is not None and weights.k_proj_weight is not None
        assert weights.v_proj_weight is not None
        separate = (weights.q_proj_weight, weights.k_proj_weight, weights.v_proj_weight)
        projected = [_linear(*args) for args in zip((query, key, value), separate, biases)]
    elif query is key and key is value:
        projected = list(_linear(query, weight, bias).chunk(3, dim=-1))
    elif key is value:
        weight_q, weight_kv = weight[:width], weight[width:]
        bias_q, bias_kv = (None, None) if bias is None else (bias[:width], bias[width:])
        projected = [_linear(query, weight_q, bias_q), *_linear(key, weight_kv, bias_kv).chunk(2, dim=-1)]
    else:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        projected = [_linear(*args) for args in zip((query, key, value), weight.chunk(3), biases)]
    # Not -1, which an empty batch or sequence says nothing about.
    heads = (options.num_heads, width // options.num_heads)
    q, k, v = (tensor.reshape(*tensor.shape[:-1], *heads) for tensor in projected)
    static_k, static_v = (
        None if tensor is None else _static(name, tensor, q)
        for name, tensor in (("static_k", weights.static_k), ("static_v", weights.static_v))
    )
    return q, k if static_k is None else static_k, v if static_v is None else static_v


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``; a bias of another dtype is added in the wider one, as torch's module adds it, and the result has the weight's."""
    if bias is None or bias.dtype == weight.dtype or is_autocasting(x.device.type):
        return F.linear(x, weight, bias)
    product = F.linear(x, weight)
    return (product + bias).to(product.dtype)


def _static(name: str, tensor: Tensor, q: Tensor) -> Tensor:
    batch, _, num_heads, head_dim = q.shape
    if tensor.dim() != 3 or tensor.shape[0] != batch * num_heads or tensor.shape[2] != head_dim:
        raise AssertionError(
            f"{name} must have shape (batch * num_heads, seqlen_k, head_dim) = ({batch * num_heads}, any, {head_dim}), "
            f"got {tuple(tensor.shape)}"
        )
    return tensor.reshape(batch, num_heads, tensor.shape[1], head_dim).transpose(1, 2)


def _append_keys(
    k: Tensor, v: Tensor, masks: Masks, weights: Weights, options: Options
) -> tuple[Tensor, Tensor, Masks]:
    """bias_k and bias_v, then a key and value of zeros, behind the others; no mask hides them."""
    if (weights.bias_k is None) != (weights.bias_v is None):
        raise AssertionError("bias_k and bias_v go together: one of them is None")
    batch, _, num_heads, head_dim = k.shape
    appended = 0
    if weights.bias_k is not None and weights.bias_v is not None:
        if weights.static_k is not None or weights.static_v is not None:
            raise AssertionError("bias_k and bias_v cannot be added to static_k and static_v")
        shape = (batch, 1, num_heads, head_dim)
        k = torch.cat([k, weights.bias_k.reshape(1, 1, num_heads, head_dim).to(k.dtype).expand(shape)], dim=1)
        v = torch.cat([v, weights.bias_v.reshape(1, 1, num_heads, head_dim).to(v.dtype).expand(shape)], dim=1)
        appended += 1
    if options.add_zero_attn:
        k, v = (F.pad(tensor, (0, 0, 0, 0, 0, 1)) for tensor in (k, v))
        appended += 1
    if appended:
        values = (True, 0.0, True)
        masks = Masks(
            *(None if mask is None else F.pad(mask, (0, appended), value=value) for mask, value in zip(masks, values))
        )
    return k, v, masks


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, masks: Masks, options: Options) -> tuple[Tensor, Tensor]:
    """(batch, seqlen_q, num_heads, head_dim) and the weights, written out: whoever asks for the weights asks for their memory."""
    scores = (q * math.sqrt(1.0 / q.shape[-1])).transpose(1, 2) @ k.permute(0, 2, 3, 1)
    if masks.bias is not None:
        scores = scores + masks.bias.to(scores.dtype)
    for visible in (masks.mask, None if masks.key_padding_mask is None else masks.key_padding_mask[:, None, None, :]):
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
    if all(each is None for each in masks):
        weights = scores.softmax(dim=-1)
    else:
        # softmax over nothing is NaN, in the gradient too: such a row is made harmless first and erased afterwards.
        empty = (scores == -math.inf).all(dim=-1, keepdim=True)
        weights = scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)
    if options.dropout_p > 0.0:
        weights = F.dropout(weights, options.dropout_p)
    attended = (weights @ v.transpose(1, 2)).transpose(1, 2)
    return attended, weights.mean(dim=1) if options.average_attn_weights else weights
