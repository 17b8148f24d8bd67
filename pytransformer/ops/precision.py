"""What torch's settings say about dtypes: autocast, and whether float32 products may be rounded to tf32."""

from __future__ import annotations

import torch
from torch import Tensor


def is_autocasting(device_type: str) -> bool:
    """Whether autocast is on for a kind of device (some, like "meta", have none to ask about)."""
    return device_type in ("cuda", "cpu") and torch.is_autocast_enabled(device_type)


def autocast_to_lower(tensor: Tensor) -> Tensor:
    """The tensor in autocast's dtype where autocast is on; float64 is left alone, as torch leaves it."""
    if not is_autocasting(tensor.device.type) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def allows_tf32(dtype: torch.dtype) -> bool:
    """Whether products of this dtype may be rounded to tf32 on a GPU: float32 where torch's settings say so, in either of torch's ways."""
    if dtype != torch.float32:
        return False
    precision = torch.backends.cuda.matmul.fp32_precision
    if precision != "none":
        return bool(precision == "tf32")
    return torch.get_float32_matmul_precision() != "highest"
