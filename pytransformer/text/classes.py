"""What a tokenizer's class says where its files don't: special tokens, token types, the side of the padding.

Older folders hold little more than a vocabulary, and leave the rest to a class of Hugging Face transformers. Of these the values here are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TokenizerClass:
    """Defaults of one class.

    Attributes:
        tokens: special tokens by name, which count if the vocabulary has them.
        type_ids: whether its models take ``token_type_ids``.
        padding_side: "right" or "left".
        vocabulary: how to read a folder without tokenizer.json: "byte_bpe" and "roberta" (vocab.json and merges.txt), "wordpiece"
            (vocab.txt), or ``None`` if that is not known.
    """

    tokens: Mapping[str, str] = field(default_factory=dict)
    type_ids: bool = False
    padding_side: str = "right"
    vocabulary: str | None = None


def _all(names: str, token: str) -> dict[str, str]:
    return {f"{name}_token": token for name in names.split()}


_BERT = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
_OF_SENTENCES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_ROBERTA = {**_OF_SENTENCES, "sep_token": "</s>", "cls_token": "<s>", "pad_token": "<pad>", "mask_token": "<mask>"}
_GEMMA = {f"{name}_token": f"<{name}>" for name in ("unk", "bos", "eos", "pad", "mask")}
_T5 = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}

GENERIC = TokenizerClass()
GPT2 = TokenizerClass(_all("unk bos eos", "<|endoftext|>"), vocabulary="byte_bpe")
BERT = TokenizerClass(_BERT, type_ids=True, vocabulary="wordpiece")
CLASSES = {
    "GPT2Tokenizer": GPT2,
    "GPTNeoXTokenizer": TokenizerClass({**GPT2.tokens, "pad_token": "<|padding|>"}, vocabulary="byte_bpe"),
    "Qwen2Tokenizer": TokenizerClass(_all("unk eos pad", "<|endoftext|>")),
    "LlamaTokenizer": TokenizerClass(_OF_SENTENCES, padding_side="left"),
    "GemmaTokenizer": TokenizerClass(_GEMMA, padding_side="left"),
    "BertTokenizer": BERT,
    "ElectraTokenizer": BERT,
    "DistilBertTokenizer": TokenizerClass(_BERT, vocabulary="wordpiece"),
    "RobertaTokenizer": TokenizerClass(_ROBERTA, vocabulary="roberta"),
    "BartTokenizer": TokenizerClass(_ROBERTA, vocabulary="roberta"),
    "T5Tokenizer": TokenizerClass(_T5),
}
_CLASS_OF_MODEL = {
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "bert": "BertTokenizer",
    "electra": "ElectraTokenizer",
    "distilbert": "DistilBertTokenizer",
    "roberta": "RobertaTokenizer",
    "bart": "BartTokenizer",
    "t5": "T5Tokenizer",
    "mt5": "T5Tokenizer",
    "llama": "LlamaTokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
}


def class_name(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """The class that tokenizer_config.json names, else the one that the model's config.json names or implies."""
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if name is None:
        name = _CLASS_OF_MODEL.get(str(config.get("model_type")))
    return name.removesuffix("Fast") if isinstance(name, str) else None
