"""A tiny configuration of any class of transformers, and inputs for it, made by rules from the class's own defaults.

The rules go by the names of a configuration's fields, which transformers keeps alike from family to family; what a family needs beside them
stands in :data:`OVERRIDES`.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB, SPECIAL = 60, 14  # the last tokens of the vocabulary are those with a meaning
LENGTH, DECODER_LENGTH = 12, 7
HEADS, HEAD_DIM = 4, 8
HIDDEN = HEADS * HEAD_DIM
IMAGE, PATCH = 32, 8

# (pattern of a field's whole name, value), the first that fits: small, and yet windows, chunks and top-k lists cut something off 12 tokens.
RULES: tuple[tuple[str, Any], ...] = (
    (r".*vocab_size.*", VOCAB),
    (r".*(num_kv_heads|num_key_value_heads|kv_heads)", HEADS // 2),
    (r"(.*_)?index_n_heads|.*index.*heads", 2),
    (r".*(num_attention_heads|n_head|n_heads|num_heads|attention_heads)s?", HEADS),
    (r".*index_topk|.*topk_tokens|.*index_budget", 4),
    (r".*index_block_size|.*index_topk_blocks", 2),
    (r".*(head_dim|head_size|d_kv)", HEAD_DIM),
    (r"(.*_)?(q_lora_rank|kv_lora_rank|o_lora_rank|lora_rank)", 16),
    (r".*(num_experts_per_tok|num_experts_per_token|topk|top_k|top_k_experts|num_selected_experts|moe_k)", 2),
    (r".*(n_group|topk_group|num_expert_group|moe_num_groups|n_groups)", 1),
    (r".*(n_routed_experts|num_local_experts|num_experts|moe_num_experts|n_experts)", 4),
    (r".*(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_decoder_layers|depth|num_blocks)", 2),
    (r"max_position_embeddings", 128),  # RoBERTa counts from behind its padding token
    (r".*(max_position_embeddings|n_positions|max_seq_len|max_source_positions|max_target_positions|max_sequence_length|n_ctx)", 64),
    (r".*(intermediate_size|ffn_dim|d_ff|d_inner|ffn_hidden_size|mlp_dim|n_inner|ffn_size|inner_dim)", HIDDEN),
    (
        r".*(hidden_size|d_model|n_embd|embed_dim|embedding_size|hidden_dim|encoder_dim|decoder_dim|projection_dim|emb_dim|dim_model|"
        r"embedding_dim|proj_dim|model_dim|adaptor_dim|adapter_dim|input_size|in_dim|condition_dim)",
        HIDDEN,
    ),
    (r".*sliding_window|.*local_attention|.*attention_window_size|window_size", 5),
    (r".*attention_chunk_size", 4),
    (r".*image_size|img_size", IMAGE),
    (r".*patch_size", PATCH),
    (r"context_size", 8),
    (r".*(dropout|drop_rate|_pdrop|dropout_p|layerdrop|dropout_rate|drop_path_rate|drop_prob|dropout_prob)", 0.0),
)  # fmt: skip
# Fields without a default that the code needs all the same.
NEEDED = r"num_experts_per_tok|n_routed_experts|n_shared_experts|head_dim|moe_intermediate_size|vocab_size|max_position_embeddings"
TEMPLATES = {"moe_intermediate_size": HIDDEN, "n_shared_experts": 1}

# Of a configuration's class: fields that the rules get wrong or do not know.
OVERRIDES: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "BailingHybridConfig": {"n_group": 2, "topk_group": 1},
    "DeepseekV4Config": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}, "o_groups": 2},
    "DeepseekV2Config": {"topk_method": "greedy"},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "MiniMaxM3VLTextConfig": {"layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse"]},
    "Gemma4TextConfig": {"global_head_dim": 8},
    "Gemma4UnifiedTextConfig": {"global_head_dim": 8},
    "EmbeddingGemma2TextConfig": {"global_head_dim": 8},
    "CohereCompassTextConfig": {"layer_types": ["sliding_attention", "sliding_attention"]},
    "GitConfig": {"num_image_with_embedding": None},
    "EsmConfig": {"pad_token_id": 59, "mask_token_id": 58},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "LongcatFlashConfig": {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "head_dim": 8, "qk_head_dim": 16},
    "Mistral4Config": {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "head_dim": 16, "qk_head_dim": 16},
    "NemotronConfig": {"num_key_value_heads": 2},
    "NeoMMEConfig": {"head_dim": 16},
    "MobileBertConfig": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "embedding_size": 32},
    "RecurrentGemmaConfig": {"num_hidden_layers": 3, "lru_width": 32},
}  # fmt: skip


def tiny_config(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A configuration of ``config_class`` with small sizes; raises what the class raises where the rules do not fit it."""
    default = config_class()
    fields = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    tiny: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            tiny[name] = tiny_config(type(value))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            small = _by_rule(name, value)
            if small is not None:
                tiny[name] = small
        elif value is None and re.fullmatch(NEEDED, name):
            tiny[name] = TEMPLATES.get(name) or _by_rule(name, sys.maxsize)
    for name in ("num_key_value_heads", "num_kv_heads"):  # all of them, one, or half
        if fields.get(name) is not None and fields[name] == fields.get("num_attention_heads"):
            tiny[name] = tiny.get("num_attention_heads", fields["num_attention_heads"])
    tiny |= _special_tokens(fields)
    tiny |= _layer_lists(fields, tiny)
    tiny |= _rotary(default, fields, tiny)
    tiny |= OVERRIDES.get(config_class.__name__, {})
    return config_class(**(tiny | changes))


def _by_rule(name: str, value: float) -> Any:
    for pattern, small in RULES:
        if re.fullmatch(pattern, name):
            return type(value)(small) if isinstance(value, float) or value > small else None
    return None


def _special_tokens(fields: dict[str, Any]) -> dict[str, int]:
    """Tokens with a meaning lie at the end of the small vocabulary, each by itself, where random texts have none."""
    names = sorted(name for name in fields if re.fullmatch(r".*(token_id|token_index)|(pad|bos|eos)_id", name))
    tokens = {name: VOCAB - 1 - place % (SPECIAL - 1) for place, name in enumerate(names) if type(fields[name]) is int}
    return tokens | ({"pad_token_id": VOCAB - SPECIAL} if fields.get("pad_token_id", 0) is None else {})


def _layer_lists(fields: dict[str, Any], tiny: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind that the family has; lists with an entry for each layer are cut to fit."""
    layers = next((name for name in tiny if re.fullmatch("num_hidden_layers|n_layers?|num_layers", name)), None)
    if layers is None:
        return {}
    before = fields[layers]
    kinds = fields.get("layer_types") or fields.get("layers_block_type")
    picked = list(range(tiny[layers]))
    if isinstance(kinds, (list, tuple)) and len(kinds) == before:
        picked = [list(kinds).index(kind) for kind in dict.fromkeys(kinds)]
        picked = picked if len(picked) > 1 else [0, min(1, before - 1)]
    lists = {
        name: [value[layer] for layer in picked]
        for name, value in fields.items()
        if isinstance(value, (list, tuple)) and len(value) == before and before > 2
    }
    return {layers: len(picked)} | lists


def _rotary(default: PreTrainedConfig, fields: dict[str, Any], tiny: dict[str, Any]) -> dict[str, Any]:
    """Sections of a rotary embedding of several axes add up to half of what is rotated."""
    found = {}
    modeling = sys.modules.get(type(default).__module__.replace(".configuration_", ".modeling_"))
    has_sections = modeling is not None and "mrope_section" in inspect.getsource(modeling)
    for name in ("rope_parameters", "rope_scaling"):
        value = fields.get(name)
        if isinstance(value, dict) and ("mrope_section" in value or (has_sections and "rope_theta" in value)):
            half = int(tiny.get("head_dim", HEAD_DIM) * value.get("partial_rotary_factor", 1.0)) // 2
            sections = [half - 2 * (half // 3), half // 3, half // 3]
            found[name] = value | {"mrope_section": sections}
    return found


def build(
    model_class: type[PreTrainedModel], attn_implementation: str, config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """A tiny model in evaluation whose weights follow from their order, large enough that attention is far from uniform."""
    torch.manual_seed(3)
    config = tiny_config(model_class.config_class) if config is None else copy.deepcopy(config)
    options = {"attn_implementation": attn_implementation, "experts_implementation": "eager"}
    model: PreTrainedModel = model_class._from_config(config, **options).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.numel() and parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * (1.5 * parameter[0].numel() ** -0.5))
            elif parameter.ndim == 1 and parameter.is_floating_point():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs_for(model: PreTrainedModel, padding: str | None = None) -> dict[str, Any]:
    """Random inputs of two samples for what the model's forward asks for; ``padding``: None, "left" or "right"."""
    parameters = inspect.signature(model.forward).parameters
    config, main = model.config, model.main_input_name
    generator = torch.Generator().manual_seed(5)
    inputs: dict[str, Any] = {}

    def asks(name: str) -> bool:
        return name in parameters

    def requires(name: str) -> bool:
        return asks(name) and parameters[name].default is inspect.Parameter.empty

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(3, VOCAB - SPECIAL, shape, generator=generator)

    hidden = next(
        (
            getattr(config, name)
            for name in ("hidden_size", "d_model", "embed_dim")
            if isinstance(getattr(config, name, None), int)
        ),
        HIDDEN,
    )
    if asks("grid_thw"):
        return _patches(model, normal)
    if asks("input_ids"):
        inputs["input_ids"] = (
            tokens(2, 2, LENGTH) if type(model).__name__.endswith("MultipleChoice") else tokens(2, LENGTH)
        )
    elif asks("hidden_states"):
        inputs["hidden_states"] = normal(2, LENGTH, hidden)
    elif asks("inputs_embeds") and not asks("decoder_input_ids") and not asks("input_features"):
        inputs["inputs_embeds"] = normal(2, LENGTH, hidden)
    if asks("pixel_values") and (
        main == "pixel_values" or requires("pixel_values") or not asks("input_ids") or _is_dual(model)
    ):
        inputs["pixel_values"] = normal(2, *_image(config))
    if main == "pixel_values_videos":
        inputs["pixel_values_videos"] = normal(2, getattr(config, "num_frames", 4), *_image(config))
    if asks("input_values") and not asks("input_ids"):
        inputs["input_values"] = normal(2, 1600)
    if asks("input_features") and not asks("input_ids"):
        inputs["input_features"] = _sound(config, normal)
    if asks("past_values"):
        inputs["past_values"] = normal(
            2, getattr(config, "context_length", 32), getattr(config, "num_input_channels", 1)
        )
    if asks("decoder_input_ids"):
        inputs["decoder_input_ids"] = tokens(2, DECODER_LENGTH)
    if requires("encoder_hidden_states") or (
        asks("encoder_hidden_states") and getattr(config, "add_cross_attention", False)
    ):
        inputs["encoder_hidden_states"] = normal(2, 9, hidden)
    if asks("bbox"):
        inputs["bbox"] = torch.tensor([1, 2, 5, 7]).expand(2, LENGTH, 4).contiguous()
    if padding is not None and asks("attention_mask") and inputs.keys() & {"input_ids", "inputs_embeds"}:
        mask = torch.ones(inputs.get("input_ids", torch.empty(2, LENGTH)).shape, dtype=torch.long)
        mask[0, ..., slice(0, 4) if padding == "left" else slice(-4, None)] = 0
        inputs["attention_mask"] = mask
    return inputs


def _is_dual(model: PreTrainedModel) -> bool:
    """Whether text and image go side by side, each through an encoder of its own (CLIP and its like), so that both must be there."""
    return any(hasattr(model, name) for name in ("logit_scale", "logit_temperature", "temperature"))


def _image(config: PreTrainedConfig) -> tuple[int, int, int]:
    vision = getattr(config, "vision_config", None) or config
    size = getattr(config, "image_size", None) or getattr(vision, "image_size", None) or IMAGE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return getattr(vision, "num_channels", None) or getattr(vision, "in_chans", None) or 3, height, width


def _sound(config: PreTrainedConfig, normal: Any) -> Tensor:
    names = ("num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim", "feature_projection_input_dim")
    bins = next((getattr(config, name) for name in names if getattr(config, name, None)), 80)
    frames = 2 * getattr(config, "max_source_positions", 32)
    is_first = hasattr(config, "max_source_positions") and config.model_type != "speech_to_text"
    return normal(2, bins, frames) if is_first else normal(2, frames, bins)


def _patches(model: PreTrainedModel, normal: Any) -> dict[str, Any]:
    """Two images of different size as a row of patches, with their grids of (time, height, width)."""
    config = model.config
    channels = next(
        (getattr(config, name) for name in ("in_channels", "in_chans", "num_channels") if hasattr(config, name)), 3
    )
    width = channels * getattr(config, "temporal_patch_size", 1) * config.patch_size**2
    grid = torch.tensor([[1, 4, 4], [1, 4, 6]])
    name = next(iter(inspect.signature(model.forward).parameters))
    return {name: normal(40, width), "grid_thw": grid}


def floating_outputs(output: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every floating tensor of a model's output by its place, caches left out."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield prefix.lstrip("."), output
    elif isinstance(output, dict):
        for name, value in output.items():
            if name not in ("past_key_values", "attentions", "router_logits"):
                yield from floating_outputs(value, f"{prefix}.{name}")
    elif isinstance(output, (list, tuple)):
        for place, value in enumerate(output):
            yield from floating_outputs(value, f"{prefix}[{place}]")
