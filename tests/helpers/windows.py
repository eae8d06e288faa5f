"""Small data sets, for tests of windows and of batches of them."""

from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar_kernels.data.windows.dataset import TokenDataset
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.masking import MaskingConfig

V, MASK_ID = 1001, 1000

MASKING = MaskingConfig(V, MASK_ID)


def make_dataset(source: Any = None, seq_len: int = 7, **kwargs: Any) -> TokenDataset:
    source = np.arange(900, dtype="uint16") if source is None else source
    return TokenDataset(source, seq_len, **{"num_tokens": V, "mask_id": MASK_ID, **kwargs})


def numbered(num_windows: int, seq_len: int = 3) -> TokenDataset:
    """Every token of window i is i."""
    tokens = np.arange(num_windows).repeat(seq_len)
    return make_dataset(tokens, seq_len, num_tokens=num_windows + 1, mask_id=num_windows)


def masking_for(dataset: TokenDataset) -> MaskingConfig:
    return MaskingConfig(dataset.num_tokens, dataset.mask_id)


def tensors(batch: Corrupted) -> dict[str, Tensor]:
    others = "masking", "counts_on_host", "num_strata", "documents", "spans", "views", "num_classes"
    names = [f.name for f in fields(batch) if f.name not in others]
    there = {name: getattr(batch, name) for name in names}
    of_batch = {name: value for name, value in there.items() if value is not None}
    return of_batch | {"row_buffer": batch.masked_rows}  # the rest of the buffer is undefined


def assert_same(a: Corrupted, b: Corrupted) -> None:
    for name, value in tensors(a).items():
        assert torch.equal(value, tensors(b)[name]), name
