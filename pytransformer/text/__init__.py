"""Text in and out: a checkpoint's tokenizer, chat templates, and a stream of characters as tokens come."""

from .batch import Encoded
from .stream import CharacterStream, stream
from .tokenizer import Tokenizer

__all__ = ["CharacterStream", "Encoded", "Tokenizer", "stream"]
