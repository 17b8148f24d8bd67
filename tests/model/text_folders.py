"""Tiny tokenizers of each kind, trained here and written by transformers, as checkpoints have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = [
    "The capital of France is Paris, isn't it?",
    "def add(first, second):\n    return first + second\n",
    "naïve café, déjà vu — 日本語 🙂 and the rest of the words",
    "the other day the weather was there; they don't know",
] * 4

TEXTS = [
    "", " ", "Hello", " Hello", "  two  spaces ", "The capital of France is Paris.", "don't, won't and isn't !",
    "line\nbreak\n\n", "\ttab", "日本語", "🙂🙂", "é", "e\u0301", "ﬁne ① x²", "unknown: Ωλ 한국어 🏳️‍🌈", "a<s>b</s>c",
    "[CLS] x [SEP] [MASK].", "<|im_start|>user\n<|im_end|>", "x<|endoftext|>y", "UPPER lower",
    "123456 7.5e-3", "a\u200bb\u00a0c", "\x00\x07 control",
]  # fmt: skip


def byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """BPE over words that carry their space, with a token for each byte of what is unknown: Llama 2, Mistral, Gemma."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=tokens, limit_alphabet=30, show_progress=False)
    tokenizer.train_from_iterator([word for text in SENTENCES for word in text.split(" ")], trainer)
    model = tokenizer.model
    model.byte_fallback = True
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    # Made anew, as the trainer's bytes are special tokens.
    again = Tokenizer(model)
    again.normalizer, again.decoder = tokenizer.normalizer, decoders.Sequence(decoder)
    again.add_special_tokens(special)
    again.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return again


def word_piece() -> Tokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=160, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


KINDS: dict[str, tuple[Callable[[], Tokenizer], dict[str, object]]] = {
    "byte BPE": (byte_bpe, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "padding_side": "left"}),
    "byte fallback": (
        byte_fallback,
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "model_max_length": 12},
    ),
    "WordPiece": (
        word_piece,
        {
            **{f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")},
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            "clean_up_tokenization_spaces": True,
        },
    ),
    "Unigram": (
        unigram,
        {
            "unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>", "extra_special_tokens": ["<extra_id_0>"],
            "truncation_side": "left",
        },
    ),
}  # fmt: skip


def write(kind: str, folder: Path) -> Path:
    """The folder that transformers writes."""
    from transformers import PreTrainedTokenizerFast

    make, settings = KINDS[kind]
    PreTrainedTokenizerFast(tokenizer_object=make(), **settings).save_pretrained(folder)
    return folder
