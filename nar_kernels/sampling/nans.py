"""NaN among logits or scores: found at once on the CPU, elsewhere without a sync before the end.

Shapes: R candidate positions, C rows of a chunk of logits, V vocabulary.
"""

import math

from torch import Tensor

from nar_kernels.errors import InvalidLogitsError


def nan_mask(x: Tensor) -> Tensor | None:
    """bool ``[R]``; None if there is no NaN, which is known without a sync on the CPU only."""
    if x.is_cpu and not (len(x) and math.isnan(x.amax().item())):
        return None
    return x.isnan()


class DeferredNanCheck:
    """Finds the first NaN: at once on the CPU, elsewhere without a sync before :meth:`check`."""

    def __init__(self, num_steps: int, length: int) -> None:
        self._num_steps, self._length = num_steps, length
        self._first: dict[str, Tensor] = {}

    def record(self, what: str, is_nan: Tensor | None, rows: Tensor, step: int) -> None:
        """Records the rows where ``is_nan``; on the CPU, raises at once.

        Args:
            what: names the values in the error message.
            is_nan: bool ``[R]``; None for none.
            rows: int64 ``[R]``, indices into the flat ``[B * L]``, below 2**40.
        """
        if is_nan is None or len(rows) == 0:
            return
        places = rows + (step << 40)  # by step, then by sequence
        first = places.where(is_nan, 1 << 62).amin(0, keepdim=True)
        self._first[what] = first.minimum(self._first.get(what, first))
        if is_nan.is_cpu:
            self.check()

    def check(self) -> None:
        """Raises InvalidLogitsError if any NaN was recorded. Synchronises with the device."""
        for what, first in self._first.items():
            step, row = divmod(first.item(), 1 << 40)
            if step < 1 << 22:
                raise InvalidLogitsError(
                    f"the {what} are NaN in step {step + 1} of {self._num_steps}, sequence "
                    f"{row // self._length} of the batch: look for a NaN among the net's "
                    "parameters (training that diverged) and arguments"
                )
        self._first.clear()


def is_nan_row(logits: Tensor, log_prob: Tensor, given: Tensor | None) -> Tensor | None:
    """bool ``[C]``: rows without a valid id because of NaN. (NaN beside valid logits is -inf.)"""
    if log_prob.is_cpu:  # elsewhere reading a value would be a sync
        if len(log_prob) == 0 or (given is None and log_prob.amin().item() > -math.inf):
            return None
        doubtful = logits[log_prob == -math.inf]
        if len(doubtful) == 0 or not math.isnan(doubtful.amax().item()):
            return None
    no_id = log_prob == -math.inf
    if given is not None:  # a given id may have probability 0 by itself
        has_id = (logits > -math.inf).any(1)
        no_id &= (given < 0) | has_id.logical_not()
    return no_id & logits.amax(1).isnan()
