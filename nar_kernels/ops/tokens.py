"""Token ids: their dtypes, and checks of tensors of ids."""

import torch
from torch import Tensor

# Token types, by numpy's name.
TOKEN_DTYPES = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "uint16": torch.uint16,
    "int16": torch.int16,
    "uint32": torch.uint32,
    "int32": torch.int32,
    "int64": torch.int64,
}

# As numbered in csrc/corrupt/token_windows.h.
DTYPE_CODE = {dtype: code for code, dtype in enumerate(TOKEN_DTYPES.values())}


def check_ids(name: str, ids: Tensor, device: torch.device) -> Tensor:
    """``ids``, contiguous, if they are int64 ``[B]`` on a device; otherwise ValueError."""
    if ids.dim() != 1 or ids.dtype != torch.int64:
        raise ValueError(f"{name} must be int64 [B]; got {ids.dtype} {list(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"{name} is on {ids.device} but tokens are on {device}")
    return ids.contiguous()


def check_range(name: str, slots: range) -> None:
    """Raises ValueError unless a range counts up, from 0 on and below 2**63."""
    if not 1 <= slots.step < 1 << 63 or slots.start < 0 or slots.stop > 1 << 63:
        raise ValueError(
            f"{name} is {slots}: a range must be in [0, 2**63), with a step of at least 1, "
            "and below 2**63"
        )


def check_token_dtype(dtype: torch.dtype, what: str = "tokens") -> None:
    """Raises TypeError unless ``dtype`` is one of :data:`TOKEN_DTYPES`."""
    if dtype not in DTYPE_CODE:
        raise TypeError(
            f"{what} have dtype {dtype}: token ids must be one of {', '.join(TOKEN_DTYPES)}"
        )
