"""The naive implementation of every operation: plain PyTorch, obvious, slow, any dtype. It is the specification.

Each function takes the arguments of the public operation of the same name (less ``backend`` and ``deterministic``) and computes
in the dtype of its inputs: given float64 it is the golden result that kernels are compared with; given bfloat16 it is the
plain low-precision implementation whose error a kernel may not exceed by much. Only norms and RoPE are defined as float32
arithmetic with one rounding at the end. Nothing here imports the rest of the package.
"""

from .activation import geglu, gelu, swiglu
from .attention import attention, decode_attention, standard_alibi_slopes
from .encoder_decoder import EncoderDecoder
from .experts import load_balancing_loss, router_z_loss
from .grouped_linear import grouped_linear
from .heads import label_loss, label_probabilities
from .kv_cache import kv_append
from .linear_attention import linear_attention
from .loss import linear_cross_entropy
from .norm import layer_norm, rms_norm
from .positions import alibi_bias_of_keys, relative_bucket, sinusoidal_positions
from .quantized_linear import dequantize, quantized_linear
from .rope import rope, rope_frequencies, rope_tables
from .teaching_weights import convert_teaching
from .transformer import Transformer

__all__ = [
    "EncoderDecoder",
    "Transformer",
    "alibi_bias_of_keys",
    "attention",
    "convert_teaching",
    "decode_attention",
    "dequantize",
    "geglu",
    "gelu",
    "grouped_linear",
    "kv_append",
    "label_loss",
    "label_probabilities",
    "layer_norm",
    "linear_attention",
    "linear_cross_entropy",
    "load_balancing_loss",
    "quantized_linear",
    "relative_bucket",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_tables",
    "router_z_loss",
    "sinusoidal_positions",
    "standard_alibi_slopes",
    "swiglu",
]
