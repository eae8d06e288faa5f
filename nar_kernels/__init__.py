"""Fused kernels for masked-prediction (non-autoregressive) training."""

from nar_kernels.backends import backends
from nar_kernels.corpus import Corpus
from nar_kernels.data import MaskedLoader, TokenDataset
from nar_kernels.errors import BackendUnavailableError, CorpusFormatError, InvalidTokenError
from nar_kernels.loss import masked_nll
from nar_kernels.masking import Corrupted, MaskingConfig
from nar_kernels.nets import NetAdapter
from nar_kernels.ops import corrupt
from nar_kernels.unmasking import Unmasked, unmask
from nar_kernels.wrapper import Losses, NonAutoregressiveWrapper

__all__ = [
    "BackendUnavailableError",
    "Corpus",
    "CorpusFormatError",
    "Corrupted",
    "InvalidTokenError",
    "Losses",
    "MaskedLoader",
    "MaskingConfig",
    "NetAdapter",
    "NonAutoregressiveWrapper",
    "TokenDataset",
    "Unmasked",
    "backends",
    "corrupt",
    "masked_nll",
    "unmask",
]
