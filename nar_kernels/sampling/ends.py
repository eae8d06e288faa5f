"""Where answers end: the end-of-sequence ids of ``generate``.

Shapes: B batch, L sequence length, R candidate positions.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nar_kernels.checks import as_int, is_sequence
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.sampling.config import SamplingConfig


def read_eos(
    eos_id: int | Sequence[int] | None, config: SamplingConfig, masking: MaskingConfig
) -> tuple[int, ...]:
    """The ids that end an answer; none for None.

    Raises:
        TypeError, ValueError: an id is no int, or none that can be drawn; or ``config.eos`` says
            what becomes of them, and there are none.
    """
    given = eos_id if is_sequence(eos_id) else () if eos_id is None else (eos_id,)
    ids = tuple(as_int("eos_id", id_) for id_ in given)  # type: ignore[union-attr]
    for id_ in ids:
        if not 0 <= id_ < masking.num_tokens or id_ == masking.mask_id:
            raise ValueError(
                f"eos_id is {id_}: it must be in [0, {masking.num_tokens}) and not "
                f"{masking.mask_id}, the mask"
            )
    if not ids and (eos_id is not None or config.eos != "allow"):
        raise ValueError(f"eos is {config.eos!r}, but no eos_id says which id ends an answer")
    return ids


class Ends:
    """The end of each answer: the first of some ids that is drawn after the prompt.

    Args:
        ids: those that end an answer, at least one.
        begin: int64 ``[B, L]`` on the net's device: the prompt, with ``mask_id`` at the positions
            to fill. Those after the last id that is given are the answer; gaps before it are not.
        filled_last: whether they have the lowest confidence.
    """

    def __init__(
        self, ids: Sequence[int], begin: Tensor, mask_id: int, *, filled_last: bool = False
    ) -> None:
        self._ids, self._mask_id, self._filled_last = ids, mask_id, filled_last
        self._is_answer = (begin != mask_id).flip(1).cumsum(1).flip(1) == 0

    @property
    def padding(self) -> int:
        """The id that is put behind the end of an answer."""
        return self._ids[0]

    def confidence(self, tokens: Tensor, confidence: Tensor) -> Tensor:
        """float32 ``[R]``: how sure the net is of ``tokens``, as the choice is to see it."""
        if not self._filled_last:
            return confidence
        return confidence.masked_fill(self._is_end(tokens), -torch.inf)

    def behind(self, ids: Tensor) -> Tensor:
        """bool ``[B, L]``: the positions after the end of each answer."""
        is_end = self._is_end(ids) & self._is_answer
        return is_end.cumsum(1) > is_end  # an end before it, beside the one it may be

    def unfinished(self, ids: Tensor) -> np.ndarray:
        """bool ``[B]``: whether anything up to the end is masked. Synchronises with the device."""
        unfilled = (ids == self._mask_id).logical_and(self.behind(ids).logical_not())
        return unfilled.any(1).cpu().numpy()

    def _is_end(self, ids: Tensor) -> Tensor:
        found = ids == self._ids[0]
        for id_ in self._ids[1:]:
            found |= ids == id_
        return found
