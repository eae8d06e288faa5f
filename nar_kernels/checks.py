"""Validation and conversion of numbers and devices that users pass."""

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_int(name: str, value: Any) -> int:
    """``value`` as an int; accepts NumPy integers and one-element integer tensors.

    Raises:
        TypeError: not an integer.
    """
    if type(value) is int:  # includes ints traced by torch.compile, which must stay symbolic
        return value
    try:
        return int(operator.index(value))
    except TypeError:
        raise TypeError(f"{name} is {value!r}: it must be an int") from None


def is_sequence(value: Any) -> bool:
    """Whether ``value`` is several numbers rather than one: a list, tuple, range, array or tensor
    with a dimension."""
    return isinstance(value, list | tuple | range) or getattr(value, "ndim", 0) > 0


def as_classes(name: str, values: Any) -> Tensor:
    """int64, on the CPU: a copy of the integers in a list, array or tensor, of any shape.

    Raises:
        TypeError: not integers.
    """
    if isinstance(values, np.ndarray):
        # torch cannot view read-only, negative-stride or non-native-endian arrays: copy.
        values = values.astype(values.dtype.newbyteorder("="))
    given = torch.as_tensor(values, device="cpu")
    if given.numel() and not is_integral(given.dtype):
        raise TypeError(f"{name} is {given.dtype}: classes are integers")
    return given.to(torch.int64, copy=True)


def is_integral(dtype: torch.dtype) -> bool:
    """Whether it is of integers; bools are none."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def as_float(name: str, value: Any) -> float:
    """``value`` as a float; accepts NumPy scalars and one-element tensors.

    Raises:
        TypeError: not a number.
        ValueError: an int above the largest float.
    """
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except OverflowError:
        raise ValueError(f"{name} is {value}: it is above the largest float") from None
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name} is {value!r}: it must be a number")


def check_seed(seed: int) -> None:
    """Raises ValueError unless ``seed`` fits in 64 bits, signed or unsigned."""
    if not -1 << 63 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}: it must have 64 bits, in [-2**63, 2**64)")


def check_device(device: torch.device | str) -> torch.device:
    """``device``, with its index if it is CUDA; ValueError if it cannot hold a batch."""
    try:
        found = torch.device(device)
        if found.type == "cuda":
            is_there = (found.index or 0) < torch.cuda.device_count()
        else:
            torch.empty(0, dtype=torch.uint8, device=found)
            is_there = found.type != "meta"
    # Device types differ in the exception that says they are missing.
    except (RuntimeError, AssertionError, ImportError, TypeError):
        is_there = False
    if not is_there:
        raise ValueError(
            f"device is {str(device)!r}, where no batch can go: PyTorch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices here; use 'cpu', or 'cuda' with a GPU and a "
            "PyTorch for it"
        )
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())
    return found
