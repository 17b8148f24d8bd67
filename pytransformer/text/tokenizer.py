"""A tokenizer: text to token ids and back, as Hugging Face's ``tokenizers`` does it, and as a checkpoint's folder says.

tokenizer.json is the truth: it is used as it stands. Classes of Hugging Face transformers that rebuild parts of it by rules of their own
are followed in defaults only (see :mod:`.classes`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import tokenizers
from torch import Tensor

from . import batch, chat, files
from .batch import Encoded
from .classes import GENERIC, TokenizerClass
from .vocabulary import NAMED, Vocabulary

if TYPE_CHECKING:
    from typing_extensions import Self

_UNLIMITED = 10**20  # transformers writes a limit beyond it for none
_CLEANED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"),
    (" 're", "'re"),
)  # fmt: skip


class Tokenizer(Vocabulary):
    """Byte-level BPE, BPE with byte fallback, WordPiece, Unigram: whatever a tokenizer.json holds.

    Special tokens that stand in a text literally (``</s>``, ``<|im_start|>``) are read as those tokens by default, as transformers does it.
    For text of strangers say ``split_special_tokens=True``, in a call or as the attribute: then they are text like any other, or refused
    where they are words of the vocabulary as well (Unigram).

    Cutting and ``split_special_tokens`` are switched on in the library for the time of a call: give each thread a tokenizer of its own.

    Args:
        backend: the library's tokenizer, which is taken over: special tokens that it lacks are added.
        settings: what tokenizer_config.json says, by its names: ``eos_token`` and the like, ``model_max_length``, ``padding_side``,
            ``model_input_names``, ``chat_template``, …
        templates, contents, defaults: see :class:`pytransformer.text.files.Loaded`.

    Attributes:
        special_tokens: special tokens by name, those in properties of their own (``bos_token``, …) and further ones (``image_token``).
        padding_side, truncation_side: "right" or "left".
        model_max_length: most tokens the model takes, or ``None``.
        model_input_names: of the tensors that the model takes.
        split_special_tokens: see above.
        clean_up_tokenization_spaces: :meth:`decode` takes out spaces before punctuation (never for BPE, where they are part of the text).

    Raises:
        ValueError: the settings do not fit the tokenizer.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any] | None = None,
        *,
        templates: Mapping[str, str] | None = None,
        contents: Mapping[str, bytes] | None = None,
        defaults: TokenizerClass = GENERIC,
    ) -> None:
        super().__init__(backend, settings or {}, defaults)
        self._contents = dict(contents or {})
        self._templates = dict(files.templates_of(self._settings, {}) if templates is None else templates)
        # A tokenizer.json may carry the lengths that somebody once trained with.
        backend.no_truncation()
        backend.no_padding()
        limit = self._settings.get("model_max_length")
        self.model_max_length: int | None = None if limit is None or limit > _UNLIMITED else int(limit)
        self.padding_side: str = self._settings.get("padding_side", defaults.padding_side)
        self.truncation_side: str = self._settings.get("truncation_side", "right")
        for name in ("padding_side", "truncation_side"):
            if getattr(self, name) not in batch.SIDES:
                raise ValueError(f'{name} must be "right" or "left", got {getattr(self, name)!r}')
        names = (
            ("input_ids", "token_type_ids", "attention_mask") if defaults.type_ids else ("input_ids", "attention_mask")
        )
        self.model_input_names: tuple[str, ...] = tuple(self._settings.get("model_input_names", names))
        self.split_special_tokens = bool(self._settings.get("split_special_tokens", False))
        self.clean_up_tokenization_spaces = bool(self._settings.get("clean_up_tokenization_spaces", False))
        self._loaded = self._state()

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The tokenizer of a checkpoint's folder, or one tokenizer.json alone.

        Read are tokenizer.json with tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat templates; without
        tokenizer.json the vocabularies of GPT-2, RoBERTa and BART (vocab.json and merges.txt) and BERT (vocab.txt).

        Raises:
            FileNotFoundError: nothing of that is there.
            ValueError: a file is damaged, or there is a vocabulary of another kind; the message says how to convert it.
        """
        loaded = files.read(Path(folder))
        return cls(
            loaded.backend,
            loaded.settings,
            templates=loaded.templates,
            contents=loaded.contents,
            defaults=loaded.defaults,
        )

    # Text to ids

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """The tokens of a text: as they stand in the vocabulary, or what is unknown to it."""
        self.backend.encode_special_tokens = self.split_special_tokens
        tokens: list[str] = self.backend.encode(text, add_special_tokens=add_special_tokens).tokens
        return tokens

    @overload
    def encode(
        self, text: str, text_pair: str | None = None, *, return_tensors: None = None, **options: Any
    ) -> list[int]: ...
    @overload
    def encode(self, text: str, text_pair: str | None = None, *, return_tensors: str, **options: Any) -> Tensor: ...
    def encode(self, text: str, text_pair: str | None = None, **options: Any) -> Any:
        """The ids of a text, or of a pair; the options are those of calling the tokenizer.

        With ``return_tensors="pt"`` they are a tensor (1, tokens).
        """
        if not isinstance(text, str):
            raise TypeError(
                f"text must be a str, got {type(text).__name__}; call the tokenizer for several texts at once"
            )
        return self(text, text_pair, **options)["input_ids"]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of each text, all cores at work."""
        self.backend.encode_special_tokens = self.split_special_tokens
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        split_special_tokens: bool | None = None,
    ) -> Encoded:
        """Ids and masks of a text or several, by the rules of Hugging Face transformers.

        Args:
            text: a text, or a list of them.
            text_pair: the second text of each, as for next-sentence or question–answer models.
            add_special_tokens: with what the model wants around a text ([CLS] … [SEP], <s>).
            padding: ``True`` or "longest" (to the longest of the batch), "max_length", ``False``.
            truncation: ``True`` or "longest_first" (of a pair the longer loses tokens), "only_first", "only_second", ``False``; by default
                a ``max_length`` without padding cuts.
            max_length: in tokens, special ones included; by default ``model_max_length``.
            pad_to_multiple_of: of which padded lengths are multiples.
            padding_side: "right" or "left", by default the attribute.
            return_tensors: "pt" for int64 tensors (texts, tokens), "np" for arrays, ``None`` for lists.
            return_attention_mask, return_token_type_ids: by default what ``model_input_names`` holds. 1 = a token, 0 = padding; 0 = first
                text, 1 = second.
            return_special_tokens_mask: 1 = a special token or padding.
            return_offsets_mapping: as ``offset_mapping`` the (start, end) of each token in the text, in characters.
            split_special_tokens: special tokens in the text are text; by default the attribute.

        Returns:
            ``input_ids`` and the rest by name; of one text without ``return_tensors`` plain lists, otherwise one row for each text.

        Raises:
            TypeError, ValueError: an argument is wrong, there is no padding token, or rows of unequal lengths are to be a tensor.
        """
        shape = batch.find_shape(
            padding,
            truncation,
            max_length,
            self.model_max_length,
            pad_to_multiple_of,
            padding_side or self.padding_side,
        )
        if shape.padding and self.pad_token_id is None:
            raise ValueError(
                "the tokenizer has no padding token: choose one, for example tokenizer.pad_token = tokenizer.eos_token"
            )
        inputs = _inputs(text, text_pair)
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        encodings = self._encodings(inputs, add_special_tokens, split, shape)
        wanted = {
            "input_ids": ("ids", self.pad_token_id, True),
            "token_type_ids": ("type_ids", 0, return_token_type_ids),
            "attention_mask": ("attention_mask", 0, return_attention_mask),
            "special_tokens_mask": ("special_tokens_mask", 1, return_special_tokens_mask),
            "offset_mapping": ("offsets", (0, 0), return_offsets_mapping),
        }
        chosen = [
            name
            for name, (_, _, asked) in wanted.items()
            if (name in self.model_input_names if asked is None else asked)
        ]
        rows = {name: [getattr(encoding, wanted[name][0]) for encoding in encodings] for name in chosen}
        batch.pad(rows, shape, {name: wanted[name][1] for name in chosen})
        if return_tensors is not None:
            return Encoded(batch.to_tensors(rows, return_tensors))
        return Encoded({name: values[0] for name, values in rows.items()} if isinstance(text, str) else rows)

    def _encodings(self, inputs: list[Any], add_special_tokens: bool, split: bool, shape: batch.Shape) -> list[Any]:
        self.backend.encode_special_tokens = split
        if shape.truncation is not None and shape.max_length is not None:
            room = self.backend.num_special_tokens_to_add(any(isinstance(entry, tuple) for entry in inputs))
            if add_special_tokens and shape.max_length < room:
                raise ValueError(
                    f"max_length must be at least {room}, as many as special tokens are added, got {shape.max_length}"
                )
            self.backend.enable_truncation(shape.max_length, strategy=shape.truncation, direction=self.truncation_side)
        try:
            encodings = list(self.backend.encode_batch(inputs, add_special_tokens=add_special_tokens))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"the texts cannot be cut to max_length {shape.max_length} by truncation={shape.truncation!r}: {error}"
            ) from error
        finally:
            self.backend.no_truncation()
        if split and not self._is_bpe:
            self._check_split(inputs, encodings)
        return encodings

    def _check_split(self, inputs: list[Any], encodings: list[Any]) -> None:
        """Refuses special tokens which are words of the vocabulary too, as in Unigram ones: the library then splits nothing."""
        for entry, encoding in zip(inputs, encodings):
            text = entry if isinstance(entry, str) else "\n".join(entry)
            for token_id, is_around in zip(encoding.ids, encoding.special_tokens_mask):
                token = self.token(token_id)
                if (
                    token_id in self.special_ids
                    and token_id != self.unk_token_id
                    and not is_around
                    and str(token) in text
                ):
                    raise ValueError(
                        f"split_special_tokens: {token!r} is a word of the vocabulary as well, and would be read as the special token; "
                        "take it out of the text"
                    )

    # Ids to text

    def decode(
        self, ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> Any:
        """The text of token ids.

        Args:
            ids: a number, list, tensor or array for a text; nested, or of two dimensions, for a list of texts. An id that no token has adds
                nothing.
            skip_special_tokens: leave out special tokens.
            clean_up_tokenization_spaces: by default the attribute.

        Raises:
            TypeError, ValueError: they are no ids.
        """
        given = batch.id_lists(ids)
        if given and isinstance(given[0], list):
            return [self._text(row, skip_special_tokens, clean_up_tokenization_spaces) for row in given]
        return self._text(given, skip_special_tokens, clean_up_tokenization_spaces)

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        """The texts of several sequences of ids, see :meth:`decode`."""
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) and len(sequences) else list(texts)

    def _text(self, ids: Any, skip_special_tokens: bool, clean_up: bool | None) -> str:
        text: str = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        if (self.clean_up_tokenization_spaces if clean_up is None else clean_up) and not self._is_bpe:
            for before, after in _CLEANED:
                text = text.replace(before, after)
        return text

    @cached_property
    def _is_bpe(self) -> bool:
        return isinstance(self.backend.model, tokenizers.models.BPE)

    # Chat

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The template, several by name, or ``None``."""
        if set(self._templates) <= {"default"}:
            return self._templates.get("default")
        return dict(self._templates)

    @chat_template.setter
    def chat_template(self, template: str | Mapping[str, str] | None) -> None:
        self._templates = {"default": template} if isinstance(template, str) else dict(template or {})

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **variables: Any,
    ) -> Any:
        """A conversation in the form that the model was tuned on.

        Special tokens that stand in a message literally are read as those tokens, like the template's own: whoever writes a message can end
        it. :meth:`special_tokens_in` finds them.

        Args:
            conversation: messages, mappings with "role" and "content"; or a list of conversations.
            tools: JSON schemas of functions that the model may call.
            documents: mappings with "title" and "text".
            chat_template: another one, or the name of one of several.
            add_generation_prompt: end with the start of an answer, which the model then goes on with.
            continue_final_message: end inside the last message, which the model then goes on with.
            tokenize: ids; ``False`` for text.
            return_dict: ``input_ids`` and ``attention_mask`` by name; ``False`` for the ids alone.
            padding, truncation, max_length, return_tensors: as in calling the tokenizer.
            variables: whatever else the template asks for, such as ``enable_thinking``.

        Raises:
            TypeError, ValueError: as :func:`pytransformer.text.chat.render` and calling the tokenizer.
        """
        template = chat.choose(self._templates, chat_template, tools is not None)
        is_batch = bool(conversation) and isinstance(conversation[0], (list, tuple))
        texts = [
            chat.render(
                template,
                messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables={**self.special_tokens, **variables},
            )
            for messages in (conversation if is_batch else [conversation])
        ]
        text = texts if is_batch else texts[0]
        if not tokenize:
            return text
        encoded = self(
            text,
            add_special_tokens=False,  # the template has them
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            split_special_tokens=False,
        )
        return encoded if return_dict else encoded["input_ids"]

    # Files

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        text: str = self.backend.to_str(pretty=True)
        return text

    def _state(self) -> dict[str, Any]:
        """What can be set, as tokenizer_config.json has it."""
        template = self.chat_template
        if isinstance(template, dict):
            template = [{"name": name, "template": text} for name, text in template.items()]  # type: ignore[assignment]
        names = (
            "model_max_length",
            "padding_side",
            "truncation_side",
            "split_special_tokens",
            "clean_up_tokenization_spaces",
        )
        return {
            **dict.fromkeys(NAMED),
            **self.special_tokens,
            **{name: getattr(self, name) for name in names},
            "model_input_names": list(self.model_input_names),
            "chat_template": template,
        }

    def save(self, path: str | Path) -> None:
        """Writes the files into a folder, those that were loaded byte for byte unless something was set since; a path to a ``.json``
        becomes the tokenizer alone.

        Raises:
            FileExistsError: the folder holds files of another tokenizer, which would be read along with these.
        """
        path = Path(path)
        contents = self._files()
        if path.suffix == ".json":
            contents = {path.name: contents.get(files.TOKENIZER_FILE) or self.to_json().encode("utf-8")}
            path = path.parent
        else:
            foreign = [name for name in files.ALL_FILES if name not in contents and (path / name).exists()]
            if foreign:
                raise FileExistsError(
                    f"{path} holds files of another tokenizer: {', '.join(foreign)}; remove them first"
                )
            path.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(content)

    def _files(self) -> dict[str, bytes]:
        """The folder's files by name."""
        contents = dict(self._contents) or {files.TOKENIZER_FILE: self.to_json().encode("utf-8")}
        changed = {name: value for name, value in self._state().items() if value != self._loaded.get(name)}
        if "chat_template" in changed:
            contents = {name: content for name, content in contents.items() if not files.is_template(name)}
        if files.SETTINGS_FILE in contents:
            settings = json.loads(contents[files.SETTINGS_FILE])
        else:  # what stands in other files need not stand here
            has_older = {files.SPECIAL_TOKENS_FILE, files.ADDED_TOKENS_FILE} & set(contents)
            settings = {} if has_older else self._settings
        if changed or (settings and files.SETTINGS_FILE not in contents):
            kept = {name: _setting(value) for name, value in {**settings, **changed}.items() if value is not None}
            contents[files.SETTINGS_FILE] = _json_bytes(kept)
            if files.SPECIAL_TOKENS_FILE in contents:  # it is read after the settings
                tokens = json.loads(contents[files.SPECIAL_TOKENS_FILE])
                tokens.update({name: value for name, value in changed.items() if name in NAMED})
                contents[files.SPECIAL_TOKENS_FILE] = _json_bytes({k: v for k, v in tokens.items() if v is not None})
        return contents


def _setting(value: Any) -> Any:
    """A setting as the file has it: a token with its properties says that it is one."""
    return {**value, "__type": "AddedToken"} if isinstance(value, Mapping) and "content" in value else value


def _json_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _inputs(text: str | Sequence[str], text_pair: str | Sequence[str] | None) -> list[Any]:
    """What the library takes: a list of texts, or of pairs."""
    for name, value in (("text", text), ("text_pair", text_pair)):
        several = isinstance(value, (list, tuple))
        wrong = next((v for v in value if not isinstance(v, str)), None) if several and value is not None else value
        if not (wrong is None and (several or name == "text_pair")) and not isinstance(wrong, str):
            raise TypeError(f"{name} must be a str or a list of them, got {type(wrong).__name__} {wrong!r}")
    if isinstance(text, str):
        if text_pair is not None and not isinstance(text_pair, str):
            raise TypeError("text_pair must be a str, as text is, got a list")
        return [(text, text_pair)] if text_pair else [text]
    if text_pair is None:
        return list(text)
    if isinstance(text_pair, str) or len(text) != len(text_pair):
        count = "a str" if isinstance(text_pair, str) else f"{len(text_pair)}"
        raise ValueError(f"text_pair must be a list of as many texts as text has, {len(text)}, got {count}")
    return list(zip(text, text_pair))
