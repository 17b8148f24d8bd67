"""Weights of an encoder–decoder from common teaching code as those of ``pytransformer.Transformer``, and the configuration they need.

Such models differ in the spelling of their names (w_q, W_q, q_linear, linears.0, …) more than in what they compute. Names are first brought
into one form, ``encoder.0.self.q.weight``; a name that fits nothing, and one that is missing, is an error that lists them all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .positions import sinusoidal_positions
from .teaching import torch_norm_of

_PARAMETER = r"\.(?P<parameter>weight|bias)"
_NORM_PARAMETER = r"\.(?P<parameter>alpha|a_2|gamma|weight|bias|b_2|beta)"
_LAYER = r"(?P<side>encoder|decoder)(?:\.layers|_layers|\.blocks|_blocks)\.(?P<layer>\d+)\."
_SELF = r"(?:self_(?:attention_block|attention|attn|mha)|attention|attn|attn_1|mha|multi_head_attention)"
_CROSS = (
    r"(?:cross_(?:attention_block|attention|attn|mha)|attn_2|src_attn|(?:enc_dec|encoder|encoder_decoder)_attention)"
)
_FEED_FORWARD = r"(?:feed_forward_block|feed_forward|positionwise_feed_forward|position_wise_feed_forward|ffn|ff|mlp)"
_SRC, _TGT = r"(?:src|source|encoder|input)", r"(?:tgt|trg|target|decoder|output)"
_EMBEDDING = (
    r"(?:_embeddings?|_embed|\.embedding|\.embed|\.emb|\.tok_embedding|_tok_emb)(?:\.0)?"
    r"(?:\.embedding|\.embed|\.lut|\.tok_emb)?\.weight"
)
_HEAD = r"(?:projection_layer|projection|generator|decoder|final|output)?(?:\.|_)?(?:proj|linear|fc|fc_out|out|layer)?"

# The four projections of an attention, and the two of a feed-forward network, each with the names it goes by.
_PROJECTIONS = {
    "q": ("w_q", "W_q", "wq", "q_linear", "q_proj", "query", "fc_q", r"linears\.0"),
    "k": ("w_k", "W_k", "wk", "k_linear", "k_proj", "key", "fc_k", r"linears\.1"),
    "v": ("w_v", "W_v", "wv", "v_linear", "v_proj", "value", "fc_v", r"linears\.2"),
    "o": ("w_o", "W_o", "wo", "w_concat", "out_linear", "out_proj", "out", "fc_o", "fc_out", r"linears\.3"),
}
_LINEARS = {
    "first": ("linear_1", "linear1", "w_1", "fc1", "fc_1"),
    "second": ("linear_2", "linear2", "w_2", "fc2", "fc_2"),
}


def _names(choices: Mapping[str, tuple[str, ...]], group: str) -> str:
    return "(?:" + "|".join(f"(?P<{group}_{key}>{'|'.join(names)})" for key, names in choices.items()) + ")"


_PATTERNS = {
    "self": re.compile(_LAYER + _SELF + r"\." + _names(_PROJECTIONS, "part") + _PARAMETER),
    "cross": re.compile(_LAYER + _CROSS + r"\." + _names(_PROJECTIONS, "part") + _PARAMETER),
    "feed_forward": re.compile(_LAYER + _FEED_FORWARD + r"\." + _names(_LINEARS, "part") + _PARAMETER),
    # residual_connections.0.norm counts from 0, norm1 from 1
    "norm": re.compile(
        _LAYER
        + r"(?:(?:residual_connections?|sublayers?)\.(?P<index>\d)\.norm|(?:layer_?)?norm_?(?P<number>\d))"
        + _NORM_PARAMETER
    ),
    "last_norm": re.compile(r"(?P<side>encoder|decoder)\.(?:layer_?)?norm" + _NORM_PARAMETER),
    "src_embedding": re.compile(_SRC + _EMBEDDING),
    "tgt_embedding": re.compile(_TGT + _EMBEDDING),
    "src_pe": re.compile(_SRC + r"[\w.]*\.pe"),
    "tgt_pe": re.compile(_TGT + r"[\w.]*\.pe"),
    "pe": re.compile(r"pos\w*\.pe"),
    "head": re.compile(_HEAD + _PARAMETER),
}
_WEIGHT_NAMES = {"alpha": "teaching", "a_2": "teaching", "weight": "torch", "gamma": None}


def convert_teaching(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int,
    pre_norm: bool | None = None,
    norm: str | None = None,
    norm_eps: float | None = None,
    scale_embeddings: bool = True,
    activation: str = "relu",
    max_seqlen: int | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration's fields and the state dict of the same model here.

    ``model = Transformer(TransformerConfig(**fields)); model.load_state_dict(ours)`` then computes what the teaching model did, and
    ``model.generator`` its log-softmax. What weights do not tell is asked for; names may begin with "module." or "model.".

    Args:
        state_dict: the teaching model's. Tables of positions in it that are the sinusoidal ones are checked and left out, others are kept
            as learned positions. Equal source, target or head embeddings become one.
        num_heads: of its attention.
        pre_norm: norms stand before the sublayers, not behind the residual additions; ``None`` = if a norm stands behind each stack.
        norm: "teaching" (:class:`~pytransformer.reference.teaching.TeachingLayerNorm`, see ``torch_norm_of`` for what becomes of its
            weights) or "torch" (nn.LayerNorm); ``None`` = as its weight is called: alpha and a_2, or weight.
        norm_eps: of its norms; ``None`` = 1e-6 for "teaching", 1e-5 for "torch".
        scale_embeddings: whether embeddings are multiplied by sqrt(d_model).
        activation: of the feed-forward network.
        max_seqlen: context limit; ``None`` = the rows of the tables of positions, which must then be in the state dict.

    Returns:
        Fields of ``TransformerConfig`` (add dropout rates and token ids as you need), and tensors under the fused model's names.

    Raises:
        ValueError: names that are not known or missing (all are listed), shapes that do not fit, or something that must be said.
    """
    tensors, norm_names = _canonical_names(state_dict)
    _refuse_missing(tensors)
    norm = _norm_kind(norm, norm_names)
    layers = {side: _num_layers(tensors, side) for side in ("encoder", "decoder")}
    q_rows, hidden = tensors["decoder.0.self.q.weight"].shape
    if num_heads < 1 or q_rows % num_heads:
        raise ValueError(f"num_heads must divide the {q_rows} rows of the projection to q, got {num_heads}")
    eps = (1e-6 if norm == "teaching" else 1e-5) if norm_eps is None else norm_eps
    final_norm = "encoder.last_norm.weight" in tensors
    positions, tables = _positions(tensors, hidden, max_seqlen)
    src, tgt, head = tensors["src_embedding.weight"], tensors["tgt_embedding.weight"], tensors["head.weight"]
    fields: dict[str, Any] = {
        "architecture": "encoder-decoder",
        "vocab_size": len(tgt),
        "src_vocab_size": len(src),
        "hidden_size": hidden,
        "num_layers": layers["decoder"],
        "num_encoder_layers": layers["encoder"],
        "num_heads": num_heads,
        "head_dim": q_rows // num_heads,
        "intermediate_size": len(tensors["decoder.0.feed_forward.first.weight"]),
        "encoder_intermediate_size": len(tensors["encoder.0.feed_forward.first.weight"]),
        **positions,
        "norm": "layer_norm",
        "norm_eps": torch_norm_of(torch.ones(hidden), eps)[1] if norm == "teaching" else eps,
        "norm_bias": "decoder.0.norm.0.bias" in tensors,
        "norm_placement": "pre" if (final_norm if pre_norm is None else pre_norm) else "post",
        "final_norm": final_norm,
        "activation": activation,
        "attention_bias": "decoder.0.self.q.bias" in tensors,
        "attention_output_bias": "decoder.0.self.o.bias" in tensors,
        "mlp_bias": "decoder.0.feed_forward.first.bias" in tensors,
        "head_bias": "head.bias" in tensors,
        "share_embeddings": torch.equal(src, tgt),
        "tie_embeddings": torch.equal(head, tgt),
        "scale_embeddings": scale_embeddings,
    }

    def weight_of_norm(alpha: Tensor) -> Tensor:
        alpha = alpha.expand(hidden)  # some have one number for all features
        return torch_norm_of(alpha, eps)[0] if norm == "teaching" else alpha.clone()

    ours = {**tables, **_stacks(tensors, layers, weight_of_norm)}
    ours["model.embed_tokens.weight"] = tgt
    if not fields["share_embeddings"]:
        ours["encoder.embed_tokens.weight"] = src
    if not fields["tie_embeddings"]:
        ours["lm_head.weight"] = head
    if fields["head_bias"]:
        ours["lm_head.bias"] = tensors["head.bias"]
    return fields, ours


def _canonical_names(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors under one form of their names, and the names by which the norms' weights went."""
    tensors: dict[str, Tensor] = {}
    norm_names: set[str] = set()
    unknown, twice = [], []
    for name, tensor in state_dict.items():
        found = _canonical(re.sub(r"^(?:module\.|model\.)+", "", name), norm_names)
        if found is None:
            unknown.append(name)
        elif found in tensors:
            twice.append(name)
        else:
            tensors[found] = tensor
    if unknown or twice:
        faults = [f"unknown tensors: {', '.join(unknown)}"] if unknown else []
        faults += [f"tensors that mean what another one does: {', '.join(twice)}"] if twice else []
        raise ValueError("state_dict: " + "; ".join(faults))
    return tensors, norm_names


def _canonical(name: str, norm_names: set[str]) -> str | None:
    for kind, pattern in _PATTERNS.items():
        match = pattern.fullmatch(name)
        if match is None:
            continue
        groups = {key: value for key, value in match.groupdict().items() if value is not None}
        place = f"{groups['side']}.{groups['layer']}." if "layer" in groups else ""
        if kind in ("norm", "last_norm"):
            parameter = groups["parameter"]
            if parameter in _WEIGHT_NAMES:
                norm_names.add(parameter)
            parameter = "weight" if parameter in _WEIGHT_NAMES else "bias"
            if kind == "last_norm":
                return f"{groups['side']}.last_norm.{parameter}"
            index = groups["index"] if "index" in groups else int(groups["number"]) - 1
            return f"{place}norm.{index}.{parameter}"
        part = next((f".{key.removeprefix('part_')}" for key in groups if key.startswith("part_")), "")
        parameter = "" if kind.endswith("pe") else f".{groups.get('parameter', 'weight')}"
        return f"{place}{kind}{part}{parameter}"
    return None


def _norm_kind(norm: str | None, names: set[str]) -> str:
    if norm not in (None, "teaching", "torch"):
        raise ValueError(f'norm must be "teaching", "torch" or None, got {norm!r}')
    kinds = {_WEIGHT_NAMES[name] for name in names}
    if norm is None and (len(kinds) != 1 or None in kinds):
        raise ValueError(
            f'norm must be given: its weights are called {", ".join(sorted(names)) or "nothing"}, which does not tell "teaching" '
            '(divides by the unbiased std + eps) from "torch" (divides by sqrt(variance + eps))'
        )
    found = kinds.pop() if norm is None else norm
    assert found is not None
    return found


def _num_layers(tensors: Mapping[str, Tensor], side: str) -> int:
    return 1 + max((int(name.split(".")[1]) for name in tensors if re.match(rf"{side}\.\d", name)), default=-1)


def _refuse_missing(tensors: Mapping[str, Tensor]) -> None:
    """Every layer of a side must have what the first one of the decoder has, biases included, and every model its embeddings and head."""
    required = {"src_embedding.weight", "tgt_embedding.weight", "head.weight"}
    has_bias = {
        part: f"decoder.0.{part}.bias" in tensors
        for part in ("self.q", "self.o", "feed_forward.first", "norm.0")  # one stands for all of its kind
    }
    for side, attentions, norms in (("encoder", ("self",), 2), ("decoder", ("self", "cross"), 3)):
        parts = {f"{attention}.{part}": "self.q" for attention in attentions for part in "qkv"}
        parts |= {f"{attention}.o": "self.o" for attention in attentions}
        parts |= {f"feed_forward.{part}": "feed_forward.first" for part in ("first", "second")}
        parts |= {f"norm.{index}": "norm.0" for index in range(norms)}
        for layer in range(max(_num_layers(tensors, side), 1)):
            for part, like in parts.items():
                required |= {f"{side}.{layer}.{part}.weight"} | (
                    {f"{side}.{layer}.{part}.bias"} if has_bias[like] else set()
                )
        if any(f"{other}.last_norm.weight" in tensors for other in ("encoder", "decoder")):
            required |= {f"{side}.last_norm.weight"} | ({f"{side}.last_norm.bias"} if has_bias["norm.0"] else set())
    missing = sorted(required - set(tensors))
    allowed = required | {"head.bias", "src_pe", "tgt_pe", "pe"}
    surplus = sorted(set(tensors) - allowed)
    if missing or surplus:
        faults = [f"missing: {', '.join(missing)}"] if missing else []
        faults += [f"more than the other layers have: {', '.join(surplus)}"] if surplus else []
        raise ValueError("state_dict, in names of <side>.<layer>.<part>: " + "; ".join(faults))


def _positions(
    tensors: Mapping[str, Tensor], hidden: int, max_seqlen: int | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of the configuration, and the tables of positions that are not the sinusoidal ones."""
    tables = {}
    for ours, name in (("encoder", "src_pe"), ("model", "tgt_pe")):
        table = tensors.get(name, tensors.get("pe"))
        if table is not None:
            if table.shape[-1] != hidden:
                raise ValueError(
                    f"{name} must have {hidden} features, as the embeddings, got shape {tuple(table.shape)}"
                )
            tables[f"{ours}.embed_positions.weight"] = table.reshape(-1, hidden)
    rows = min((len(table) for table in tables.values()), default=None)
    length = rows if max_seqlen is None else max_seqlen
    if length is None:
        raise ValueError("max_seqlen must be given: state_dict has no table of positions (pe) whose rows would tell it")
    for halves in (False, True):
        if all(_is_sinusoidal(table, halves) for table in tables.values()):
            return {"positions": "sinusoidal", "sinusoidal_halves": halves, "max_seqlen": length}, {}
    if len(tables) < 2 or rows is None or length > rows:
        raise ValueError(f"max_seqlen must be at most {rows}, the rows of the tables of positions, got {length}")
    return {"positions": "learned", "max_seqlen": length}, {name: table[:length] for name, table in tables.items()}


def _is_sinusoidal(table: Tensor, halves: bool) -> bool:
    """Up to the rounding of float32 angles, which grows with the position: eight units of its last place."""
    expected = sinusoidal_positions(*table.shape, halves=halves).to(table.device)
    rounding = 8 * torch.finfo(torch.float32).eps * (1 + torch.arange(len(table), device=table.device))[:, None]
    return bool(((table.float() - expected).abs() <= rounding).all())


def _stacks(tensors: Mapping[str, Tensor], layers: Mapping[str, int], weight_of_norm: Any) -> dict[str, Tensor]:
    """The layers of both sides under our names."""
    ours: dict[str, Tensor] = {}

    def linear(name: str, *parts: str) -> None:
        for parameter in ("weight", "bias"):
            if f"{parts[0]}.{parameter}" in tensors:
                ours[f"{name}.{parameter}"] = torch.cat([tensors[f"{part}.{parameter}"] for part in parts])

    def norm(name: str, part: str) -> None:
        if f"{part}.weight" in tensors:
            ours[f"{name}.weight"] = weight_of_norm(tensors[f"{part}.weight"])
            if f"{part}.bias" in tensors:
                ours[f"{name}.bias"] = tensors[f"{part}.bias"].expand_as(ours[f"{name}.weight"]).clone()

    for side, stack in (("encoder", "encoder"), ("decoder", "model")):
        for layer in range(layers[side]):
            theirs, our = f"{side}.{layer}", f"{stack}.layers.{layer}"
            linear(f"{our}.attention.qkv_proj", *(f"{theirs}.self.{part}" for part in "qkv"))
            linear(f"{our}.attention.out_proj", f"{theirs}.self.o")
            if side == "decoder":
                linear(f"{our}.cross_attention.q_proj", f"{theirs}.cross.q")
                linear(f"{our}.cross_attention.kv_proj", f"{theirs}.cross.k", f"{theirs}.cross.v")
                linear(f"{our}.cross_attention.out_proj", f"{theirs}.cross.o")
            linear(f"{our}.feed_forward.up_proj", f"{theirs}.feed_forward.first")
            linear(f"{our}.feed_forward.down_proj", f"{theirs}.feed_forward.second")
            names = ["attention", "cross_attention", "feed_forward"]
            for index, name in enumerate(names if side == "decoder" else [names[0], names[2]]):
                norm(f"{our}.{name}_norm", f"{theirs}.norm.{index}")
        norm(f"{stack}.norm", f"{side}.last_norm")
    return ours
