"""Numbers and devices that users pass, as kernels and files take them."""

import operator
from typing import Any

import torch


def as_int(name: str, value: Any) -> int:
    """``value`` as an int: also one of numpy, or an integer tensor of one element.

    Raises:
        TypeError: it is no integer.
    """
    if type(value) is int:  # also one that torch.compile traces, which must stay symbolic
        return value
    try:
        return int(operator.index(value))
    except TypeError:
        raise TypeError(f"{name} is {value!r}: it must be an int") from None


def as_float(name: str, value: Any) -> float:
    """``value`` as a float: also one of numpy, or a tensor of one element.

    Raises:
        TypeError: it is no number.
        ValueError: it is an int above the largest float.
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
    """Raises ValueError unless ``seed`` has 64 bits, with or without a sign."""
    if not -1 << 63 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}: it must have 64 bits, in [-2**63, 2**64)")


def check_device(device: torch.device | str) -> torch.device:
    """``device``, with its number if it is CUDA's; ValueError unless batches can go there."""
    try:
        found = torch.device(device)
        if found.type == "cuda":
            is_there = (found.index or 0) < torch.cuda.device_count()
        else:
            torch.empty(0, dtype=torch.uint8, device=found)
            is_there = found.type != "meta"
    # Each kind of device says in another way that it is missing.
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
