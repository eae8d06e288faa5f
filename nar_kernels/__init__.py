"""Fused kernels for masked-prediction (non-autoregressive) training."""

from nar_kernels import train
from nar_kernels.data.corpus import Corpus
from nar_kernels.data.loader import MaskedLoader
from nar_kernels.data.packed_loader import PackedLoader
from nar_kernels.data.packing.plan import PackingPlan
from nar_kernels.data.windows.dataset import TokenDataset
from nar_kernels.data.windows.mixture import Mixture
from nar_kernels.errors import (
    BackendUnavailableError,
    CorpusChangedError,
    CorpusFormatError,
    InvalidLogitsError,
    InvalidTokenError,
    PinnedMemoryError,
)
from nar_kernels.losses import Losses
from nar_kernels.nets.adapter import NetAdapter, TokenNet
from nar_kernels.nets.attention import dense_mask, flex_block_mask, varlen_arguments
from nar_kernels.nets.block_attention import (
    block_mask,
    block_varlen_arguments,
    dense_block_mask,
)
from nar_kernels.nets.cache import BlockCache, CachingNet
from nar_kernels.nets.packed import block_diffusion_inputs
from nar_kernels.ops.backends import backends
from nar_kernels.ops.cart import cart_weights
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.mask_tokens import mask_tokens
from nar_kernels.ops.masked_nll import masked_nll
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.ops.unmask import Unmasked, unmask
from nar_kernels.sampling.config import SamplingConfig
from nar_kernels.sampling.decode import DecodeState
from nar_kernels.training.config import TrainConfig
from nar_kernels.training.model import load_model
from nar_kernels.wrapper import NonAutoregressiveWrapper

__all__ = [
    "BackendUnavailableError",
    "BlockCache",
    "CachingNet",
    "Corpus",
    "CorpusChangedError",
    "CorpusFormatError",
    "Corrupted",
    "DecodeState",
    "InvalidLogitsError",
    "InvalidTokenError",
    "Losses",
    "MaskedLoader",
    "MaskingConfig",
    "Mixture",
    "NetAdapter",
    "NonAutoregressiveWrapper",
    "PackedLoader",
    "PackingPlan",
    "PinnedMemoryError",
    "SamplingConfig",
    "TokenDataset",
    "TokenNet",
    "TrainConfig",
    "Unmasked",
    "backends",
    "mask_tokens",
    "block_diffusion_inputs",
    "block_mask",
    "block_varlen_arguments",
    "cart_weights",
    "corrupt",
    "dense_block_mask",
    "dense_mask",
    "flex_block_mask",
    "load_model",
    "masked_nll",
    "train",
    "unmask",
    "varlen_arguments",
]
