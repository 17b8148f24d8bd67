"""The vocabulary of a tokenizer: its tokens, special ones by name, and what each stands for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

from .classes import TokenizerClass
from .files import content_of
from .stream import bytes_of, label, visible

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _special(name: str) -> property:
    """A special token, which may be set to another of the vocabulary (``tokenizer.pad_token = tokenizer.eos_token``)."""

    def get(vocabulary: Vocabulary) -> str | None:
        return vocabulary.special_tokens.get(name)

    def set_to(vocabulary: Vocabulary, token: str | None) -> None:
        if token is None:
            vocabulary.special_tokens.pop(name, None)
        elif vocabulary.backend.token_to_id(token) is None:
            raise ValueError(f"{name} must be a token of the vocabulary, but {token!r} is none")
        else:
            vocabulary.special_tokens[name] = token

    return property(
        get, set_to, doc=f"The {name.removesuffix('_token')} token, or ``None``; may be set to any of the vocabulary."
    )


def _special_id(name: str) -> property:
    """The id of a special token, which may be set too."""

    def get(vocabulary: Vocabulary) -> int | None:
        token = vocabulary.special_tokens.get(name)
        return None if token is None else vocabulary.backend.token_to_id(token)

    def set_to(vocabulary: Vocabulary, token_id: int | None) -> None:
        token = None if token_id is None else vocabulary.token(token_id)
        if token_id is not None and token is None:
            raise ValueError(f"{name}_id must be the id of a token of the vocabulary, but {token_id} is none")
        setattr(vocabulary, name, token)

    return property(get, set_to, doc=f"The id of ``{name}``, or ``None``.")


class Vocabulary:
    """Tokens and ids of a tokenizer.

    Args:
        backend: the library's tokenizer, which is taken over: special tokens that it lacks are added.
        settings: as in tokenizer_config.json.
        defaults: special tokens that the settings leave out, which count if the vocabulary has them.

    Attributes:
        special_tokens: special tokens by name: ``bos_token`` and the like, and further ones (``image_token``).
    """

    bos_token, bos_token_id = _special("bos_token"), _special_id("bos_token")
    eos_token, eos_token_id = _special("eos_token"), _special_id("eos_token")
    unk_token, unk_token_id = _special("unk_token"), _special_id("unk_token")
    sep_token, sep_token_id = _special("sep_token"), _special_id("sep_token")
    pad_token, pad_token_id = _special("pad_token"), _special_id("pad_token")
    cls_token, cls_token_id = _special("cls_token"), _special_id("cls_token")
    mask_token, mask_token_id = _special("mask_token"), _special_id("mask_token")

    def __init__(self, backend: tokenizers.Tokenizer, settings: Mapping[str, Any], defaults: TokenizerClass) -> None:
        self.backend = backend
        self._settings = dict(settings)
        self.special_tokens = self._add_tokens(defaults)

    def _add_tokens(self, defaults: TokenizerClass) -> dict[str, str]:
        """Adds the settings' tokens to the vocabulary where it lacks them, and returns the special ones by name."""
        settings, backend = self._settings, self.backend
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
        given = {
            name: value
            for name, value in settings.items()
            if name.endswith("_token") and isinstance(value, (str, Mapping))
        } | (dict(extra) if isinstance(extra, Mapping) else {})
        implied = {
            name: token
            for name, token in defaults.tokens.items()
            if name not in settings and backend.token_to_id(token) is not None
        }
        named = {**implied, **given}
        named = {name: named[name] for name in sorted(named, key=lambda name: (*NAMED, name).index(name))}
        contents = {name: content_of(token) for name, token in named.items()}

        listed = settings.get("added_tokens_decoder") or {}
        tokens = [
            _added(token, special=token["content"] in contents.values())
            for _, token in sorted(listed.items(), key=lambda item: int(item[0]))
        ]
        known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
        backend.add_tokens([token for token in tokens if repr(token) not in known])
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        wanted = [*named.values(), *([] if isinstance(extra, Mapping) else extra)]
        backend.add_tokens([_added(token, special=True) for token in wanted if content_of(token) not in known])
        return contents

    @property
    def vocab_size(self) -> int:
        """Tokens without those that were added later; ``len(tokenizer)`` counts all."""
        return int(self.backend.get_vocab_size(with_added_tokens=False))

    def __len__(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        """All tokens with their ids."""
        return dict(self.backend.get_vocab(with_added_tokens=True))

    def token(self, token_id: int) -> str | None:
        """A token as it stands in the vocabulary, ``None`` if there is none of that id."""
        token: str | None = self.backend.id_to_token(token_id)
        return token

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that ``skip_special_tokens`` leaves out."""
        return frozenset(index for index, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def special_tokens_in(self, text: str) -> list[str]:
        """The special tokens that a text holds literally, and that would be read as such."""
        return [token for token in map(self.token, sorted(self.special_ids)) if token and token in text]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Ids of tokens as they stand in the vocabulary, of one or of several; the unknown token's id, or ``None``, for others."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        token_id: int | None = self.backend.token_to_id(tokens)
        return self.unk_token_id if token_id is None else token_id

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Tokens as they stand in the vocabulary: of one id one, of several a list."""
        if isinstance(ids, int):
            return self.token(ids)
        skipped = self.special_ids if skip_special_tokens else ()
        return [self.token(int(token_id)) for token_id in ids if int(token_id) not in skipped]

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether each token stands for bytes of its own, so that a text's are those of its tokens one after another."""
        return isinstance(self.backend.decoder, tokenizers.decoders.ByteLevel)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every id; none for special tokens.

        Raises:
            ValueError: the tokenizer is no byte-level one.
        """
        if not self.is_byte_level:
            raise ValueError(
                "only tokens of a byte-level BPE stand for bytes of their own: use CharacterStream or decode"
            )
        tokens = {token_id: token for token, token_id in self.get_vocab().items()}
        return [
            b"" if token_id in self.special_ids else bytes_of(tokens.get(token_id, ""))
            for token_id in range(max(tokens, default=-1) + 1)
        ]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of token ids, see :attr:`token_bytes`."""
        return b"".join(self.token_bytes[token_id] for token_id in ids)

    def label(self, token_id: int) -> str:
        """One token as a short visible label, for tables and pictures: white space and unprintable bytes are written out."""
        token = self.token(token_id)
        if token is None:
            return "(unused)"
        return visible(token) if token_id in self.special_ids else label(token, self.is_byte_level)

    def __repr__(self) -> str:
        kind = type(self.backend.model).__name__
        return f"{type(self).__name__}({kind}, {len(self)} tokens, {', '.join(f'{n}={t!r}' for n, t in self.special_tokens.items())})"


def _added(token: str | Mapping[str, Any], special: bool = False) -> tokenizers.AddedToken:
    """A token with its properties, as the library wants it."""
    if isinstance(token, str):
        return tokenizers.AddedToken(token, special=special)
    names = ("single_word", "lstrip", "rstrip", "normalized")
    properties = {name: token[name] for name in names if name in token}
    return tokenizers.AddedToken(token["content"], special=special or bool(token.get("special", False)), **properties)
