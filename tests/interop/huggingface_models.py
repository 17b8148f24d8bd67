"""Tiny randomly initialised models of every family the Hugging Face surface is judged on, and their golden result in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    BartConfig,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    T5Config,
)

import pytransformer.interop.huggingface  # noqa: F401  (registers "pytransformer")
from pytransformer.verification import SEEDS

transformers.logging.set_verbosity_error()

# The seeds of the contract go through the models in so many batches: a pass of a tiny model costs the same for all of them.
DRAWS = 2
VOCAB = 64
WINDOW = 5
DECODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip

# Each with what is its own: windows shorter than the texts, a softcap that bites, sinks, head_dim 12, GPT-2's scale by layer.
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**DECODER),
    "mistral": lambda: MistralConfig(**DECODER, sliding_window=WINDOW),
    "gemma2": lambda: Gemma2Config(
        **DECODER | {"head_dim": 12}, sliding_window=WINDOW, attn_logit_softcapping=3.0, query_pre_attn_scalar=10
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **DECODER, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "qwen3": lambda: Qwen3Config(**DECODER),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=36, n_layer=2, n_head=3, n_positions=64, scale_attn_by_inverse_layer_idx=True,
        reorder_and_upcast_attn=True, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **DECODER, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"], rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "bert": lambda: BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ),
    "t5": lambda: T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
        relative_attention_max_distance=8, dropout_rate=0.0, decoder_start_token_id=0, eos_token_id=None,
    ),
    "bart": lambda: BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        decoder_start_token_id=2, eos_token_id=None, forced_eos_token_id=None,
    ),
}  # fmt: skip
DECODERS = ("llama", "mistral", "gemma2", "gemma3", "qwen3", "gpt2", "gpt_oss")
ENCODER_DECODERS = ("t5", "bart")


def build(family: str, attn_implementation: str, device: torch.device, **changes: object) -> PreTrainedModel:
    """A model in evaluation, its weights a function of the family alone, large enough that attention is far from uniform."""
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    if family == "bert":
        auto = transformers.AutoModelForMaskedLM
    else:
        auto = transformers.AutoModelForSeq2SeqLM if family in ENCODER_DECODERS else transformers.AutoModelForCausalLM
    # Grouped matrix products have no float64.
    options = {"experts_implementation": "eager"} if family == "gpt_oss" else {}
    torch.manual_seed(7)
    model = auto.from_config(config, attn_implementation=attn_implementation, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            if parameter.ndim > 1:
                parameter.copy_(noise * (0.5 if parameter.shape[0] == VOCAB else 2.0 * parameter.shape[-1] ** -0.5))
            else:
                parameter.add_(0.3 * noise)
    return model.to(device)


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float64; run it under :class:`ComputeInFloat64`."""
    golden = copy.deepcopy(model).double()
    for module in golden.modules():
        if hasattr(module, "reorder_and_upcast_attn"):
            module.reorder_and_upcast_attn = False  # GPT-2's "upcast" insists on float32
    return golden


class ComputeInFloat64(TorchFunctionMode):
    """Where a model's code asks for float32 (norms, softmax, RoPE) it gets float64: a golden result is rounded nowhere."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in kwargs.items()}
        return func(*args, **kwargs)


def inputs_for(
    family: str, seed: int, device: torch.device, batch: int = 3, length: int = 12, padding: str | None = "left"
) -> dict[str, Tensor]:
    """Random tokens whose rows have 0, 3, 6, … padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding is not None:
        for row in range(batch):
            hidden = slice(0, 3 * row) if padding == "left" else slice(length - 3 * row, length)
            mask[row, hidden] = 0
            ids[row, hidden] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family in DECODERS and padding == "left":
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if family in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (batch, 7), generator=generator)
        inputs["decoder_attention_mask"] = torch.ones(batch, 7, dtype=torch.long)
        if padding is not None:
            inputs["decoder_attention_mask"][1:, 5:] = 0
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def draws_for(family: str, index: int, device: torch.device, padding: str | None = "left") -> dict[str, Tensor]:
    """The inputs of a share of the contract's seeds, one below the other."""
    share = SEEDS // DRAWS
    parts = [inputs_for(family, seed, device, padding=padding) for seed in range(index * share, (index + 1) * share)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def valid_rows(inputs: dict[str, Tensor]) -> Tensor:
    """Boolean (batch, length) of the logits that mean something: those of tokens that are no padding."""
    return inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()


def logits_and_gradients(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the valid rows, and each layer's gradient (weight and bias in one) for a fixed random cotangent.

    In one, because the gradient of a key projection's bias is nothing but rounding: softmax does not see it.
    """
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits[valid_rows(inputs)]
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits)
    (logits * cotangent).sum().backward()
    gradients = {}
    for name, module in model.named_modules():
        own = [parameter.grad.flatten() for parameter in module.parameters(recurse=False) if parameter.grad is not None]
        if own:
            gradients[name] = torch.cat(own)
    return logits.detach(), gradients
