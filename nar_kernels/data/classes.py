"""The classes of windows, for class-conditional training: :class:`Classes`.

Shapes: B batch, N windows, C classes.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from nar_kernels.checks import as_classes, as_float, as_int
from nar_kernels.ops.mask_tokens import drop_classes


class Classes:
    """The class of each window of a dataset, and how often it is dropped.

    Args:
        of_windows: integers ``[N]`` from 0 on.
        num_classes: C. Default: one more than the greatest.
        dropout_prob: the share of samples, in [0, 1], whose class is C, which stands for none.

    Raises:
        TypeError: not integers.
        ValueError: another shape, or a class outside [0, C).
    """

    def __init__(
        self,
        of_windows: Tensor | np.ndarray | Sequence[int],
        num_classes: int | None = None,
        dropout_prob: float = 0.1,
        *,
        num_windows: int,
    ) -> None:
        self.of_windows = check_labels("classes", of_windows, num_windows)
        least = int(self.of_windows.max()) + 1
        self.num_classes = least if num_classes is None else as_int("num_classes", num_classes)
        if self.num_classes < least:
            raise ValueError(
                f"classes holds {least - 1}, and num_classes is {self.num_classes}: classes must "
                "be in [0, num_classes)"
            )
        self.dropout_prob = as_float("class_dropout_prob", dropout_prob)
        if not 0 <= self.dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob is {dropout_prob}: it must be in [0, 1]")

    def of(self, windows: Tensor, slots: Tensor, seed: int) -> Tensor:
        """int64 ``[B]``: of the windows with these indices, which these sample slots hold."""
        chosen = self.of_windows[windows]
        if not self.dropout_prob:
            return chosen
        return drop_classes(
            chosen, self.num_classes, self.dropout_prob, seed=seed, sample_ids=slots
        )


def state_of(classes: Classes | None) -> dict[str, Any]:
    """What decides the classes of a loader's batches, as plain values."""
    if classes is None:
        return {"classes_digest": None, "num_classes": None, "class_dropout_prob": None}
    return {
        "classes_digest": hashlib.sha256(classes.of_windows.numpy().tobytes()).hexdigest(),
        "num_classes": classes.num_classes,
        "class_dropout_prob": classes.dropout_prob,
    }


def check_labels(name: str, labels: Tensor | np.ndarray | Sequence[int], count: int) -> Tensor:
    """int64 ``[count]`` on the CPU: a copy, so that a loader's batches stay as they are.

    Raises:
        TypeError: not integers.
        ValueError: another shape, or one is negative.
    """
    given = as_classes(name, labels)
    if given.shape != (count,):
        raise ValueError(
            f"{name} has shape {list(given.shape)}: it must be [{count}], a class for each window"
        )
    if (given < 0).any():
        raise ValueError(f"{name} holds {int(given.min())}: classes are from 0 on")
    return given
