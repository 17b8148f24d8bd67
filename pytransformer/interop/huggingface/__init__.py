"""``attn_implementation="pytransformer"`` for Hugging Face transformers.

Importing this module registers two functions under the name "pytransformer", both through transformers' own registries, and changes
nothing else:

* :func:`attention_forward`, the attention itself, served by this package's ops;
* :func:`attention_mask`, which makes the mask. A name that is known for attention but not for masks gets *no mask at all* from
  transformers, so that padding would be ignored silently; that is why there are two.

What a mask says — causal, a window, padding, packed sequences — reaches the op as options rather than as a tensor of
(batch, 1, query_length, kv_length). In between it passes through code of the models, which expects one: :class:`DeferredMask` is such a
tensor, of the right shape and dtype, that is filled only when something other than :func:`attention_forward` looks into it. Patterns that
are not recognised, anything traced by torch.compile, and a single query get an ordinary mask. Masks are boolean, as "sdpa" has them, for
models that serve "sdpa", and additive, as "eager" has them, for those that do not: their layers may add to what they are given.

Source: transformers' "Attention interface" (``AttentionInterface``, ``AttentionMaskInterface``), 5.17 and 5.23.
"""

from __future__ import annotations

from importlib import metadata

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    needs = "pytransformer.interop.huggingface needs transformers 5"
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        raise ImportError(f"{needs}, which is not installed: pip install 'transformers>=5'") from error
    if int(version.split(".")[0]) < 5:
        raise ImportError(f"{needs}, found {version}: pip install 'transformers>=5'") from error
    cause: BaseException = error
    while (
        earlier := cause.__cause__ or cause.__context__
    ) is not None:  # transformers wraps what went wrong in errors of its own
        cause = earlier
    raise ImportError(
        f"transformers {version} is installed, but cannot be imported: {type(cause).__name__}: {cause}", name=error.name
    ) from error

from pytransformer.interop.huggingface.attention import NAME, attention_forward
from pytransformer.interop.huggingface.masks import DeferredMask, MaskPattern, attention_mask

__all__ = ["NAME", "DeferredMask", "MaskPattern", "attention_forward", "attention_mask"]

AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
