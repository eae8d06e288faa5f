"""What a call of :class:`~nar_kernels.NonAutoregressiveWrapper` returns."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor


class Losses(NamedTuple):
    """Scalars; a part that was not trained is None, and omitted from slices."""

    loss: Tensor
    generator_loss: Tensor | None
    critic_loss: Tensor | None


def _get_losses(self: Losses, index: Any) -> Any:
    # transformers' Trainer takes `outputs[1:]` for predictions, and fails on None.
    found = tuple.__getitem__(self, index)
    return tuple(x for x in found if x is not None) if isinstance(index, slice) else found


def _new_losses(
    cls: type, loss: Any, generator_loss: Any = None, critic_loss: Any = None
) -> tuple[Any, ...]:
    # transformers' `nested_detach` (Trainer.predict) rebuilds the tuple from an iterator over its
    # items, and fails on None later.
    if isinstance(loss, Iterator):
        return tuple(item for item in loss if item is not None)
    return tuple.__new__(cls, (loss, generator_loss, critic_loss))


Losses.__new__ = _new_losses  # type: ignore[method-assign, assignment]
Losses.__getitem__ = _get_losses  # type: ignore[method-assign, assignment]
