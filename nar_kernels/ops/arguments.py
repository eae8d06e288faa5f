"""The arguments of the operators, in the order of their schemas: one list for every backend."""

from typing import NamedTuple, get_type_hints

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

# SymInt also where no shape depends on it: torch.compile then takes another value, such as of the
# seed, without compiling again.
_SCHEMA_TYPES = {int: "SymInt", bool: "bool", Tensor: "Tensor", Tensor | None: "Tensor?"}


class WindowOrder(NamedTuple):
    """Which windows sample slots hold: slot g has position ``g % num_windows`` of epoch
    ``g // num_windows``, and each epoch an order of its own if ``shuffle``. Window ``i`` starts at
    ``phase + i * stride``."""

    num_windows: int
    phase: int
    stride: int
    shuffle: bool


class CorruptArgs(NamedTuple):
    """Checked arguments of ``corrupt``. Shapes: B batch, L ``seq_len``, V ``num_tokens``.

    The windows of the batch begin at ``starts``; or, where ``num_windows`` is not 0, at
    ``phase + index * stride`` with the index that the sample slot has in the order of its epoch; or
    one after the other.
    """

    tokens: Tensor  # the corpus, any integer type
    starts: Tensor | None  # int64 [B]
    batch: int
    seq_len: int
    num_tokens: int
    mask_id: int
    sample_ids: Tensor | None  # int64 [B]; or first_sample, first_sample + 1, ...
    first_sample: int
    step: Tensor | None  # int64 [1], adds so many global batches to first_sample
    num_windows: int
    phase: int
    stride: int
    shuffle: bool
    maskable: Tensor | None  # bool [B, L]
    ratio_table: Tensor  # uint32 [65536]; all outputs go to its device
    weight_table: Tensor  # float32 [65536]
    never_mask: Tensor | None  # bool [V]
    seed: int  # signed, with the bits of the unsigned one
    seed_tensor: Tensor | None  # int64 [1], in place of seed
    global_batch: int
    exact: bool
    stratified: bool
    keep_share: int  # PROBABILITY_ONE stands for 1, here and in the two below
    random_share: int
    coin_share: int

    @classmethod
    def schema(cls) -> str:
        hints = get_type_hints(cls)
        return ", ".join(f"{_SCHEMA_TYPES[hints[name]]} {name}" for name in cls._fields)
