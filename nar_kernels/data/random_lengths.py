"""Sequences of which some are cut to random lengths, for nets that must take any."""

import torch
from torch import Tensor

from nar_kernels.checks import as_float
from nar_kernels.spec.philox import Stream, words


def check_probability(name: str, value: float) -> float:
    value = as_float(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: it must be in [0, 1], the share that is cut")
    return value


def random_lengths(lengths: Tensor, slots: Tensor, probability: float, seed: int) -> Tensor:
    """int64 ``[n]``: the lengths, or, with this probability, one that is uniform in [1, length]
    (LLaDA, arXiv:2502.09992, cuts 1 % of its data). A function of (seed, slot).

    Args:
        lengths, slots: int64 ``[n]``; slots are sample slots.
    """
    place = torch.arange(2, device=slots.device)
    coin, word = words(seed, Stream.RANDOM_LENGTH, slots[:, None], place).unbind(1)
    is_cut = (coin < int(probability * 2**32)) & (lengths > 0)
    return torch.where(is_cut, 1 + (word * lengths >> 32), lengths)
