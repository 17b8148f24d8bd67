"""The functions of the ``flash_attn`` package (2.8): same names, argument order, defaults and meaning.

``from pytransformer.interop.flash_attn import flash_attn_func`` in place of ``from flash_attn import flash_attn_func`` is the whole switch.
``flash_attn.layers.rotary.apply_rotary_emb`` is here too; ``flash_attn.bert_padding`` is :mod:`pytransformer.interop.bert_padding`. What is
served beyond flash_attn, and what differs, is listed in docs/flash-attn.md.
"""

from pytransformer.interop.flash_attn.functions import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from pytransformer.interop.flash_attn.kvcache import flash_attn_with_kvcache
from pytransformer.interop.flash_attn.rotary import apply_rotary_emb

__all__ = [
    "apply_rotary_emb",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
