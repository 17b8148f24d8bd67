"""What training and decoding share: models, their size, and a clean start."""

from __future__ import annotations

import gc
import importlib.util
from typing import Any

import torch

from pytransformer import Transformer, TransformerConfig
from pytransformer.benchmarks import peers
from pytransformer.benchmarks.harness.rows import Absent


def tiny_llama(max_seqlen: int) -> TransformerConfig:
    """For a CPU."""
    return TransformerConfig.llama(
        vocab_size=128,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=64,
        max_seqlen=max_seqlen,
    )


def matrix_weights(config: TransformerConfig) -> int:
    """Weights of the matrix products of one token: all but the embedding and the vectors."""
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner = (3 if config.activation == "swiglu" else 2) * config.intermediate_size
    layer = config.hidden_size * (2 * width + 2 * kv_width + inner)
    return config.num_layers * layer + config.hidden_size * config.vocab_size


def start_afresh(device: torch.device) -> None:
    """The same random numbers for everyone, and the memory of those before given back."""
    torch.manual_seed(0)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def transformers_model(config: TransformerConfig) -> Any:
    """transformers' GPT-2 or Llama of this shape, random, without dropout, with scaled_dot_product_attention.

    Raises:
        Absent: it is not installed.
    """
    peers.use_folder()
    if importlib.util.find_spec("transformers") is None:
        raise Absent("transformers is not installed")
    import transformers

    common = {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "attn_implementation": "sdpa",
    }
    if config.positions == "learned":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=config.hidden_size,
                n_layer=config.num_layers,
                n_head=config.num_heads,
                n_positions=config.max_seqlen,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
                **common,
            )
        )
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_seqlen,
            rms_norm_eps=config.norm_eps,
            **common,
        )
    )


def from_transformers(theirs: Any, config: TransformerConfig) -> Transformer:
    """Our model of this shape with the weights of transformers' GPT-2, in evaluation mode on the CPU."""
    ours = Transformer(config, device="meta").to_empty(device="cpu").eval()
    state = theirs.state_dict()
    renamed = {
        "model.embed_tokens.weight": state["transformer.wte.weight"],
        "lm_head.weight": state["transformer.wte.weight"],
        "model.embed_positions.weight": state["transformer.wpe.weight"],
        "model.norm.weight": state["transformer.ln_f.weight"],
        "model.norm.bias": state["transformer.ln_f.bias"],
    }
    parts = {
        "attention_norm": "ln_1",
        "attention.qkv_proj": "attn.c_attn",
        "attention.out_proj": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.up_proj": "mlp.c_fc",
        "feed_forward.down_proj": "mlp.c_proj",
    }
    for index in range(ours.config.num_layers):
        for name, source in parts.items():
            weight = state[f"transformer.h.{index}.{source}.weight"]
            # Their matrices are (in, out): Conv1D.
            renamed[f"model.layers.{index}.{name}.weight"] = weight.t() if weight.ndim == 2 else weight
            renamed[f"model.layers.{index}.{name}.bias"] = state[f"transformer.h.{index}.{source}.bias"]
    ours.load_state_dict(renamed)
    return ours
