"""The interfaces people already use, served by this package's ops: one module each, imported by its own name.

* :mod:`pytransformer.interop.flash_attn`: the functions of the ``flash_attn`` package.
* :mod:`pytransformer.interop.torch`: ``scaled_dot_product_attention``, the switch for code that calls it, torch's flash registry.
* :mod:`pytransformer.interop.huggingface`: ``attn_implementation="pytransformer"`` for ``transformers``.

An option that a surface cannot honour is refused, never ignored.
"""
