"""What the functions of other code bases share: seeds, and masks of a ratio that is drawn.

They take the arguments of the original, and two more by name:

* ``seed``: 64-bit integer, with which the result is a pure function of the arguments. Default:
  drawn from ``generator``, or else PyTorch's CPU generator, anew in each call.
* ``sample_ids``: int64 ``[B]``, the number of each sequence over the whole training, such as
  ``step * global_batch + j``: with it and ``seed``, the mask of a sequence does not depend on what
  lies beside it, on its rank, or on a resume. Default: ``0 .. B - 1``.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nar_kernels.checks import as_float, as_int, check_seed, is_integral
from nar_kernels.ops.corrupted import Corrupted, Output
from nar_kernels.ops.dispatch import outside_graphs
from nar_kernels.ops.masking import MaskingConfig

# Of a code base that does not say its vocabulary. Ids are checked against it, and the mask.
ANY_VOCABULARY = (1 << 31) - 1

# What they return is ids and where these are masked.
MASKED: tuple[Output, ...] = ("masked_indices",)


def seed_of(seed: int | None, generator: torch.Generator | None = None) -> int:
    """``seed``, or one drawn from ``generator`` or PyTorch's CPU generator. (A generator on a GPU
    costs a sync.)"""
    if seed is not None:
        seed = as_int("seed", seed)
        check_seed(seed)
        return seed
    device = torch.device("cpu") if generator is None else generator.device
    drawn = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)
    return int(drawn.item())


def masking_of(mask_id: int, *, num_tokens: int = ANY_VOCABULARY, **options: Any) -> MaskingConfig:
    """A :class:`MaskingConfig`, whose tables take a millisecond; cached. Options must be hashable.
    Under torch.compile it is made between graphs."""
    return outside_graphs(_cached)(num_tokens, mask_id, **options)


_cached = lru_cache(maxsize=256)(MaskingConfig)


def check_ids(name: str, ids: Tensor, num_dims: int) -> None:
    """Raises TypeError, ValueError: ``ids`` is no tensor of integers with ``num_dims``
    dimensions."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} is a {type(ids).__name__}: it must be a tensor of token ids")
    if ids.dim() != num_dims or not is_integral(ids.dtype):
        raise ValueError(
            f"{name} is {ids.dtype} {list(ids.shape)}: it must hold integers, with {num_dims} "
            "dimensions"
        )


def supervised(loss_mask: Tensor, ids: Tensor) -> Tensor:
    """bool ``[B, L]``: where a loss mask of any dtype, whose shape may broadcast, is not 0.

    Raises TypeError, ValueError: it is no tensor, or of another shape.
    """
    if not isinstance(loss_mask, Tensor):
        raise TypeError(f"loss_mask is a {type(loss_mask).__name__}: it must be a tensor")
    try:
        return loss_mask.bool().expand_as(ids)
    except RuntimeError:
        raise ValueError(
            f"loss_mask is {list(loss_mask.shape)} beside ids {list(ids.shape)}: it must have "
            "their shape, or one that broadcasts to it"
        ) from None


def time_range_of(name: str, eps: float) -> tuple[float, float]:
    """The ``time_range`` of a code base whose time is from ``eps`` to 1, where all is masked.

    Raises ValueError: ``eps`` is outside [0, 1).
    """
    eps = as_float(name, eps)
    if not 0 <= eps < 1:
        raise ValueError(f"{name} is {eps}: it must be in [0, 1)")
    return 0.0, 1.0 - eps


def check_fits(name: str, value: int, dtype: torch.dtype) -> None:
    """Raises ValueError: a tensor of the dtype of the ids cannot hold ``value``, and would wrap."""
    info = torch.iinfo(dtype)
    if not info.min <= value <= info.max:
        raise ValueError(f"{name} is {value}, which {dtype} cannot hold: pass ids of a wider dtype")


def noisy_ids(batch: Corrupted, clean: Tensor) -> Tensor:
    """The ids of a corrupted batch, of the dtype of the clean ones.

    Raises ValueError: that cannot hold the mask token.
    """
    mask_id = batch.masking.mask_id
    check_fits("the mask token", mask_id, clean.dtype)
    if clean.is_cpu:
        return batch.input_ids.to(clean.dtype)
    # There nobody asks for invalid ids, which would be a sync: they stay as they are.
    return torch.where(batch.input_ids == mask_id, mask_id, clean)


@dataclass(frozen=True)
class RoundedCosine:
    """A schedule by which exact draws of ``num_positions`` mask ``cos(pi t / 2)`` of them, rounded
    to the nearest number, but at least ``low`` and 1."""

    num_positions: int
    low: float = 0.0

    def __call__(self, t: Tensor) -> Tensor:
        share = torch.cos(t * (math.pi / 2)).clamp(min=self.low)
        return (share * self.num_positions).round().clamp(min=1) / self.num_positions


def rounded_cosine(
    mask_id: int, num_positions: int, low: float = 0.0, **options: Any
) -> MaskingConfig:
    """The masking of :class:`RoundedCosine`, at independent times."""
    return masking_of(
        mask_id,
        schedule=RoundedCosine(num_positions, low),
        times="uniform",
        weighting="unit",
        **options,
    )
