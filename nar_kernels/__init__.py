"""Fused kernels for masked-prediction (non-autoregressive) training."""

from nar_kernels import train
from nar_kernels.backends import backends
from nar_kernels.config import TrainConfig
from nar_kernels.corpus import Corpus
from nar_kernels.data import MaskedLoader, TokenDataset
from nar_kernels.decode import DecodeState
from nar_kernels.errors import (
    BackendUnavailableError,
    CorpusFormatError,
    InvalidLogitsError,
    InvalidTokenError,
)
from nar_kernels.loss import masked_nll
from nar_kernels.masking import Corrupted, MaskingConfig
from nar_kernels.model import load_model
from nar_kernels.nets import NetAdapter, TokenNet
from nar_kernels.ops import corrupt
from nar_kernels.unmasking import Unmasked, unmask
from nar_kernels.wrapper import Losses, NonAutoregressiveWrapper

__all__ = [
    "BackendUnavailableError",
    "Corpus",
    "CorpusFormatError",
    "Corrupted",
    "DecodeState",
    "InvalidLogitsError",
    "InvalidTokenError",
    "Losses",
    "MaskedLoader",
    "MaskingConfig",
    "NetAdapter",
    "NonAutoregressiveWrapper",
    "TokenDataset",
    "TokenNet",
    "TrainConfig",
    "Unmasked",
    "backends",
    "corrupt",
    "load_model",
    "masked_nll",
    "train",
    "unmask",
]
