"""Fused kernels for masked-prediction (non-autoregressive) training."""

from nar_kernels.backends import backends
from nar_kernels.errors import BackendUnavailableError, CorpusFormatError, InvalidTokenError
from nar_kernels.masking import Corrupted, MaskingConfig
from nar_kernels.ops import corrupt

__all__ = [
    "BackendUnavailableError",
    "Corrupted",
    "CorpusFormatError",
    "InvalidTokenError",
    "MaskingConfig",
    "backends",
    "corrupt",
]
