"""Numbers that users pass, as the plain Python ones that kernels and files take."""

import operator
from typing import Any


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
