"""The naive transformers against transformers' models: what each choice of the configuration means, where a public model makes it."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from transformers.models.bart import BartConfig, BartForConditionalGeneration
from transformers.models.bert import BertConfig, BertForMaskedLM, BertForSequenceClassification
from transformers.models.bloom import BloomConfig, BloomForCausalLM
from transformers.models.falcon import FalconConfig, FalconForCausalLM
from transformers.models.gemma2 import Gemma2Config, Gemma2ForCausalLM
from transformers.models.gemma3 import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.gpt_neox import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.models.gpt_oss import GptOssConfig, GptOssForCausalLM
from transformers.models.marian import MarianConfig, MarianMTModel
from transformers.models.olmo2 import Olmo2Config, Olmo2ForCausalLM
from transformers.models.phi3 import Phi3Config, Phi3ForCausalLM
from transformers.models.qwen2_moe import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.roberta import RobertaConfig, RobertaForMaskedLM
from transformers.models.t5 import T5Config, T5ForConditionalGeneration

from pytransformer import TransformerConfig
from pytransformer.reference import EncoderDecoder, Transformer
from pytransformer.verification import Contract
from tests.support.draws import pool

VOCAB, HIDDEN, HEADS, HEAD_DIM, INTERMEDIATE = 40, 16, 4, 4, 24
TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
THEIRS = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 24, **TOKENS,
}  # fmt: skip
GROUPED = {**THEIRS, "num_key_value_heads": 2, "head_dim": HEAD_DIM, "attn_implementation": "eager"}
OURS = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_layers": 2, "num_heads": HEADS, "intermediate_size": INTERMEDIATE, "max_seqlen": 24,
}  # fmt: skip
LLAMA = {
    **OURS, "num_kv_heads": 2, "positions": "rope", "norm": "rms_norm", "norm_bias": False, "norm_eps": 1e-6, "activation": "swiglu",
    "attention_bias": False, "mlp_bias": False, "tie_embeddings": False,
}  # fmt: skip

# A name of theirs becomes ours by these rules, in order. "#0", "#1", … at the end: parts of one tensor, one below the other.
LLAMA_NAMES = (
    (r"self_attn", "attention"), (r"\.q_proj", ".qkv_proj#0"), (r"\.k_proj", ".qkv_proj#1"), (r"\.v_proj", ".qkv_proj#2"),
    (r"\.o_proj", ".out_proj"), (r"mlp\.", "feed_forward."), (r"\.gate_proj", ".gate_up_proj#0"), (r"\.up_proj", ".gate_up_proj#1"),
    (r"input_layernorm", "attention_norm"),
)  # fmt: skip
GEMMA_NAMES = (
    *LLAMA_NAMES, (r"post_attention_layernorm", "attention_output_norm"), (r"pre_feedforward_layernorm", "feed_forward_norm"),
    (r"post_feedforward_layernorm", "feed_forward_output_norm"),
)  # fmt: skip
PRE_NORM_NAMES = (*LLAMA_NAMES, (r"post_attention_layernorm", "feed_forward_norm"))
FUSED_NAMES = (
    (r"^(gpt_neox|transformer)\.", "model."), (r"\.h\.", ".layers."), (r"embed_in|word_embeddings(?!_)", "embed_tokens"),
    (r"word_embeddings_layernorm", "embed_norm"), (r"self_attention", "attention"), (r"query_key_value", "qkv_proj"),
    (r"attention\.dense", "attention.out_proj"), (r"mlp\.dense_h_to_4h", "feed_forward.up_proj"),
    (r"mlp\.dense_4h_to_h", "feed_forward.down_proj"), (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "feed_forward_norm"), (r"ln_f|final_layer_norm", "norm"),
)  # fmt: skip
MOE_NAMES = (
    (r"mlp\.(router|gate)\.", "feed_forward.router."), (r"experts\.(\w+)_proj_bias", r"experts.\1_bias"), *PRE_NORM_NAMES,
)  # fmt: skip
BERT_NAMES = (
    (r"^(ro)?bert(a)?\.", ""), (r"embeddings\.word_embeddings", "model.embed_tokens"), (r"encoder\.layer\.", "model.layers."),
    (r"embeddings\.position_embeddings", "model.embed_positions"), (r"embeddings\.token_type_embeddings", "model.embed_types"),
    (r"embeddings\.LayerNorm", "model.embed_norm"), (r"attention\.self\.query", "attention.qkv_proj#0"),
    (r"attention\.self\.key", "attention.qkv_proj#1"), (r"attention\.self\.value", "attention.qkv_proj#2"),
    (r"attention\.output\.dense", "attention.out_proj"), (r"attention\.output\.LayerNorm", "attention_norm"),
    (r"intermediate\.dense", "feed_forward.up_proj"), (r"(\d)\.output\.dense", r"\1.feed_forward.down_proj"),
    (r"(\d)\.output\.LayerNorm", r"\1.feed_forward_norm"), (r"cls\.predictions", "lm_head"), (r"transform\.LayerNorm", "transform_norm"),
    (r"transform\.dense", "transform"), (r"lm_head\.dense", "lm_head.transform"), (r"lm_head\.layer_norm", "lm_head.transform_norm"),
    (r"^pooler\.dense", "pooler"),
)  # fmt: skip
T5_NAMES = (
    (r"^shared", "model.embed_tokens"), (r"^decoder\.", "model."), (r"block\.", "layers."), (r"layer\.0\.layer_norm", "attention_norm"),
    (r"layer\.0\.SelfAttention\.relative_attention_bias", "relative_bias"), (r"layers\.0\.relative_bias", "relative_bias"),
    (r"layer\.0\.SelfAttention\.o", "attention.out_proj"), (r"layer\.0\.SelfAttention\.q", "attention.qkv_proj#0"),
    (r"layer\.0\.SelfAttention\.k", "attention.qkv_proj#1"), (r"layer\.0\.SelfAttention\.v", "attention.qkv_proj#2"),
    (r"layer\.1\.EncDecAttention\.q", "cross_attention.q_proj"), (r"layer\.1\.EncDecAttention\.k", "cross_attention.kv_proj#0"),
    (r"layer\.1\.EncDecAttention\.v", "cross_attention.kv_proj#1"), (r"layer\.1\.EncDecAttention\.o", "cross_attention.out_proj"),
    (r"(model\.layers\.\d)\.layer\.1\.layer_norm", r"\1.cross_attention_norm"), (r"layer\.\d\.layer_norm", "feed_forward_norm"),
    (r"layer\.\d\.DenseReluDense\.wi\.", "feed_forward.up_proj."), (r"layer\.\d\.DenseReluDense\.wo", "feed_forward.down_proj"),
    (r"layer\.\d\.DenseReluDense\.wi_(\d)", r"feed_forward.gate_up_proj#\1"), (r"final_layer_norm", "norm"),
)  # fmt: skip
BART_NAMES = (
    (r"^model\.(shared|decoder\.embed_tokens)", "model.embed_tokens"), (r"^model\.encoder", "encoder"), (r"^model\.decoder", "model"),
    (r"layernorm_embedding", "embed_norm"), (r"self_attn_layer_norm", "attention_norm"), (r"final_layer_norm", "feed_forward_norm"),
    (r"encoder_attn_layer_norm", "cross_attention_norm"), (r"self_attn\.q_proj", "attention.qkv_proj#0"),
    (r"self_attn\.k_proj", "attention.qkv_proj#1"), (r"self_attn\.v_proj", "attention.qkv_proj#2"), (r"self_attn", "attention"),
    (r"encoder_attn\.k_proj", "cross_attention.kv_proj#0"), (r"encoder_attn\.v_proj", "cross_attention.kv_proj#1"),
    (r"encoder_attn", "cross_attention"), (r"fc1", "feed_forward.up_proj"), (r"fc2", "feed_forward.down_proj"),
    (r"final_logits_bias", "lm_head.bias"),
)  # fmt: skip


def load(ours, theirs, rules):
    """Their parameters under our names. q, k and v of a head together (GPT-NeoX, BLOOM) are put apart, gpt-oss's experts turned."""
    config, parts = ours.config, {}
    for name, tensor in theirs.state_dict().items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if rules is FUSED_NAMES and "qkv_proj" in name and config.num_kv_heads == config.num_heads:
            tensor = tensor.unflatten(0, (config.num_heads, 3, config.head_dim)).transpose(0, 1).flatten(0, 2)
        if config.activation == "swiglu_clamped" and "experts" in name:
            if "gate_up" in name:  # gate and up alternate
                tensor = torch.cat([tensor[..., 0::2], tensor[..., 1::2]], dim=-1)
            tensor = tensor.transpose(1, 2) if tensor.dim() == 3 else tensor
        name, _, rest = name.partition("#")
        index, _, parameter = rest.partition(".")
        parts.setdefault(f"{name}.{parameter}" if rest else name, {})[int(index or 0)] = tensor
    weights = {name: torch.cat([found[index] for index in sorted(found)]) for name, found in parts.items()}
    # What ours does not have is another name of what it has, or a table of positions; what it needs and does not get is an error.
    state = ours.state_dict()
    ours.load_state_dict({name: tensor.view_as(state[name]) for name, tensor in weights.items() if name in state})


def make_theirs(model_class, config):
    """Weights large enough that every part matters, norms and biases included; biases of zero would hide mistakes."""
    theirs = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if not parameter.requires_grad:  # a table of sinusoidal positions
                continue
            parameter.normal_(std=0.2)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.add_(1.0)
            if re.search("router|gate.weight", name):
                parameter.mul_(10.0)  # clear decisions, which float32 and float64 take alike
    return theirs


LONG, SHORT = [1.0, 3.0], [1.0, 1.5]
LONGROPE = {"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT, "original_max_position_embeddings": 12}
T5_THEIRS = {
    "d_model": HIDDEN, "d_kv": 8, "d_ff": INTERMEDIATE, "num_layers": 2, "num_heads": HEADS, "vocab_size": VOCAB, "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6, "decoder_start_token_id": 0,
    "attn_implementation": "eager", **TOKENS, "pad_token_id": 0,
}  # fmt: skip
T5_OURS = {
    **OURS, "architecture": "encoder-decoder", "head_dim": 8, "positions": "t5", "relative_buckets": 8, "relative_max_distance": 6,
    "norm": "rms_norm", "norm_eps": 1e-6, "norm_bias": False, "activation": "relu", "attention_bias": False, "mlp_bias": False,
    "softmax_scale": 1.0, "share_embeddings": True, "logit_scale": HIDDEN**-0.5, "decoder_start_token_id": 0,
}  # fmt: skip
BART_THEIRS = {
    "d_model": HIDDEN, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 20, "decoder_ffn_dim": INTERMEDIATE, "vocab_size": VOCAB, "max_position_embeddings": 24, **TOKENS,
    "pad_token_id": 1, "decoder_start_token_id": 2, "forced_eos_token_id": None, "attn_implementation": "eager",
}  # fmt: skip
BART_OURS = {
    **OURS, "architecture": "encoder-decoder", "num_encoder_layers": 1, "encoder_intermediate_size": 20,
    "norm_placement": "post", "share_embeddings": True, "head_bias": True, "decoder_start_token_id": 2,
}  # fmt: skip
BERT_OURS = TransformerConfig.bert(**OURS).to_dict() | {"pad_token_id": None}

FAMILIES = {
    "gemma 2": (
        Gemma2ForCausalLM,
        Gemma2Config(
            **GROUPED, layer_types=["sliding_attention", "full_attention"], sliding_window=3, attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0, query_pre_attn_scalar=9,
        ),
        GEMMA_NAMES,
        {
            **LLAMA, "norm_placement": "both", "norm_weight_offset": 1.0, "activation": "geglu_tanh", "scale_embeddings": True,
            "tie_embeddings": True, "sliding_window": 3, "layer_types": ("sliding", "full"), "attention_softcap": 2.0,
            "logit_softcap": 3.0, "softmax_scale": 1 / 3,
        },
    ),
    "gemma 3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **GROUPED, layer_types=["sliding_attention", "full_attention"], sliding_window=4, query_pre_attn_scalar=4,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        ),
        GEMMA_NAMES,
        {
            **LLAMA, "norm_placement": "both", "norm_weight_offset": 1.0, "activation": "geglu_tanh", "scale_embeddings": True,
            "tie_embeddings": True, "sliding_window": 4, "layer_types": ("sliding", "full"), "qk_norm": True, "rope_base": 500.0,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "local_rope_base": 30.0,
        },
    ),
    "olmo 2": (
        Olmo2ForCausalLM,
        Olmo2Config(**{name: value for name, value in GROUPED.items() if name != "head_dim"}),
        (*LLAMA_NAMES, (r"post_attention_layernorm", "attention_output_norm"), (r"post_feedforward_layernorm", "feed_forward_output_norm")),
        {**LLAMA, "norm_placement": "output", "norm_eps": 1e-5, "qk_norm": True, "qk_norm_whole": True},
    ),
    "phi 3, longrope": (
        Phi3ForCausalLM,
        Phi3Config(**{**GROUPED, "rope_parameters": {**LONGROPE, "rope_theta": 50.0}}, original_max_position_embeddings=12),
        PRE_NORM_NAMES,
        {**LLAMA, "norm_eps": 1e-5, "rope_base": 50.0, "rope_scaling": LONGROPE},
    ),
    "gpt-oss": (
        GptOssForCausalLM,
        GptOssConfig(
            **GROUPED, num_local_experts=5, num_experts_per_tok=2, sliding_window=3, layer_types=["full_attention", "sliding_attention"],
            swiglu_limit=0.4, rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        ),
        MOE_NAMES,
        {
            **LLAMA, "norm_eps": 1e-5, "rope_base": 50.0, "activation": "swiglu_clamped", "activation_limit": 0.4, "attention_bias": True,
            "mlp_bias": True, "sinks": True, "sliding_window": 3, "layer_types": ("full", "sliding"), "num_experts": 5,
            "router_bias": True,
        },
    ),
    "qwen 2 moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(
            **{name: value for name, value in GROUPED.items() if name != "head_dim"}, num_experts=4, num_experts_per_tok=3,
            moe_intermediate_size=12, shared_expert_intermediate_size=20, decoder_sparse_step=1, mlp_only_layers=[1],
        ),
        MOE_NAMES,
        {
            **LLAMA, "attention_bias": True, "attention_output_bias": False, "num_experts": 4, "experts_per_token": 3, "expert_size": 12,
            "norm_topk_prob": False, "shared_expert_size": 20, "shared_expert_gate": True, "dense_layers": (1,),
        },
    ),
    "gpt-neox": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig(**THEIRS, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        FUSED_NAMES,
        {**OURS, "positions": "rope", "rotary_dim": 2, "parallel": True, "parallel_norms": 2, "tie_embeddings": False},
    ),
    "bloom": (
        BloomForCausalLM,
        BloomConfig(hidden_size=HIDDEN, n_layer=2, n_head=HEADS, vocab_size=VOCAB, apply_residual_connection_post_layernorm=True, **TOKENS),
        FUSED_NAMES,
        {
            **OURS, "intermediate_size": 4 * HIDDEN, "positions": "alibi", "embedding_norm": True, "activation": "gelu_tanh",
            "residual_from_norm": True,
        },
    ),
    "falcon, alibi": (
        FalconForCausalLM,
        FalconConfig(**{**THEIRS, "ffn_hidden_size": 20}, alibi=True, parallel_attn=True, attn_implementation="sdpa"),
        FUSED_NAMES,
        {
            **OURS, "intermediate_size": 20, "num_kv_heads": 1, "positions": "alibi", "alibi_bfloat16": True, "alibi_scale": HEAD_DIM**-0.5,
            "parallel": True, "attention_bias": False, "mlp_bias": False,
        },
    ),
    "bert": (BertForMaskedLM, BertConfig(**THEIRS, attn_implementation="eager"), BERT_NAMES, BERT_OURS),
    "bert, classes": (
        BertForSequenceClassification,
        BertConfig(**THEIRS, num_labels=3),
        BERT_NAMES,
        {
            **BERT_OURS, "head": "classification", "head_transform": None, "num_labels": 3, "pooler": True, "pooling": "first",
            "tie_embeddings": False,
        },
    ),
    "roberta": (
        RobertaForMaskedLM,
        RobertaConfig(**{**THEIRS, "type_vocab_size": 1, "pad_token_id": 3}),
        BERT_NAMES,
        {
            **BERT_OURS, "type_vocab_size": 1, "position_offset": 4, "max_seqlen": 20, "positions_skip_padding": True, "pad_token_id": 3,
        },
    ),
    "t5": (T5ForConditionalGeneration, T5Config(**T5_THEIRS), T5_NAMES, T5_OURS),
    "t5 1.1": (
        T5ForConditionalGeneration,
        T5Config(**T5_THEIRS, feed_forward_proj="gated-gelu"),
        T5_NAMES,
        {**T5_OURS, "activation": "geglu_tanh"},
    ),
    "bart": (
        BartForConditionalGeneration,
        BartConfig(**BART_THEIRS, scale_embedding=True),
        BART_NAMES,
        {**BART_OURS, "position_offset": 2, "embedding_norm": True, "scale_embeddings": True},
    ),
    "marian": (
        MarianMTModel,
        MarianConfig(**BART_THEIRS, activation_function="swish"),
        BART_NAMES,
        {**BART_OURS, "positions": "sinusoidal", "sinusoidal_halves": True, "activation": "silu"},
    ),
}  # fmt: skip


def arguments(config, seqlen, device):
    """Of both models' calls: ids, of an encoder with padding behind the second sequence and token types."""
    ids = torch.randint(4, VOCAB, (2, seqlen), device=device)
    mask = torch.ones(2, seqlen, dtype=torch.int64, device=device)
    mask[1, seqlen - 3 :] = 0
    if config.architecture == "encoder-decoder":
        tgt = torch.randint(4, VOCAB, (2, 6), device=device)
        theirs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": tgt, "use_cache": False}
        return {"src": ids, "tgt": tgt, "src_mask": mask}, theirs, torch.ones(2, 6, dtype=torch.bool, device=device)
    if config.architecture == "encoder":
        if config.pad_token_id is not None:
            ids[mask == 0] = config.pad_token_id
        types = torch.randint(config.type_vocab_size, ids.shape, device=device)
        ours = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        return ours, ours, mask.bool() if config.head == "masked_lm" else torch.ones(2, dtype=torch.bool, device=device)
    return {"input_ids": ids}, {"input_ids": ids, "use_cache": False}, torch.ones_like(mask, dtype=torch.bool)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_transformers(family, device):
    model_class, their_config, rules, fields = FAMILIES[family]
    theirs = make_theirs(model_class, copy.deepcopy(their_config)).to(device)
    config = TransformerConfig(**fields)
    ours = (EncoderDecoder if config.is_encoder_decoder else Transformer)(config).to(device).eval()
    load(ours, theirs, rules)
    golden = copy.deepcopy(ours).double()
    # longrope changes its frequencies beyond 12 tokens
    for seqlen in (9, 15) if "longrope" in family else (9,):
        # What is judged is transformers' float32 model, beside ours.
        contract = Contract(torch.float32)

        def add(draw: int, seqlen: int = seqlen, contract: Contract = contract) -> None:
            our_arguments, their_arguments, real = arguments(config, seqlen, device)
            exact, plain, other = (
                outputs(model, given, real)
                for model, given in ((golden, our_arguments), (ours, our_arguments), (theirs, their_arguments))
            )
            for name, *found in zip(("logits", "gradient"), other, plain, exact, strict=True):
                contract.add(name, **dict(zip(("actual", "plain", "golden"), found)))

        pool(contract, add, 1).check()


def outputs(model, call, real):
    """Logits where there is no padding, and the gradient of a loss of them with respect to the token embedding."""
    output = model(**call)
    logits = (output if isinstance(output, torch.Tensor) else output.logits)[real]
    embedding = (
        model.model.embed_tokens if isinstance(model, Transformer | EncoderDecoder) else model.get_input_embeddings()
    )
    loss = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device) % logits.shape[-1])
    return logits.detach(), torch.autograd.grad(loss, embedding.weight)[0]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_greedy_translations_equal_transformers(family, device):
    model_class, their_config, rules, fields = FAMILIES[family]
    theirs = make_theirs(model_class, copy.deepcopy(their_config)).to(device)
    ours = EncoderDecoder(TransformerConfig(**fields)).to(device).eval()
    load(ours, theirs, rules)
    call, their_call, _ = arguments(ours.config, 9, device)
    expected = theirs.generate(
        their_call["input_ids"],
        attention_mask=their_call["attention_mask"],
        max_new_tokens=7,
        do_sample=False,
        num_beams=1,
    )
    assert torch.equal(ours.generate(call["src"], src_mask=call["src_mask"], max_new_tokens=7), expected)
