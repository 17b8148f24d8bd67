"""The interfaces people already use, served by this package's ops: one module each, loaded when it is first named.

* :mod:`pytransformer.interop.flash_attn`: the functions of the ``flash_attn`` package.
* :mod:`pytransformer.interop.torch`: ``scaled_dot_product_attention``, the switch for code that calls it, torch's flash registry.
* :mod:`pytransformer.interop.huggingface`: ``attn_implementation="pytransformer"`` for ``transformers``.

An option that a surface cannot honour is refused, never ignored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytransformer.interop import bert_padding as bert_padding
    from pytransformer.interop import flash_attn as flash_attn
    from pytransformer.interop import huggingface as huggingface
    from pytransformer.interop import torch as torch


def __getattr__(name: str) -> Any:
    if name == "bert_padding":
        import pytransformer.interop.bert_padding

        return pytransformer.interop.bert_padding
    if name == "flash_attn":
        import pytransformer.interop.flash_attn

        return pytransformer.interop.flash_attn
    if name == "huggingface":
        import pytransformer.interop.huggingface

        return pytransformer.interop.huggingface
    if name == "torch":
        import pytransformer.interop.torch

        return pytransformer.interop.torch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "bert_padding", "flash_attn", "huggingface", "torch"})
