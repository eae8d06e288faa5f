"""Which positions decoding fills first.

Shapes: B batch, L sequence length, R positions in question.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nar_kernels.ops.dispatch import Confidence
from nar_kernels.sampling.config import SamplingConfig, Strategy
from nar_kernels.sampling.halton import grid_order
from nar_kernels.spec.float_math import gumbel
from nar_kernels.spec.philox import Stream, words


class Choice(NamedTuple):
    """How to choose the positions that are filled first.

    Attributes:
        strategy:
            * ``"confidence"``: where the drawn id is the most probable (MaskGIT, arXiv:2202.04200);
            * ``"margin"``: where the two most probable ids are furthest apart (arXiv:2502.06768);
            * ``"entropy"``: where that of the ids is the lowest (Dream, arXiv:2508.15487);
            * ``"threshold"``: all whose drawn id is probable enough, and the most probable one
              (Fast-dLLM, arXiv:2505.22618); the plan is then the slowest that is allowed;
            * ``"random"``: any, as masked diffusion does (arXiv:2406.07524);
            * ``"halton"``: far apart on a grid (arXiv:2503.17076);
            * ``"critic"``: where a critic finds the least wrong (Token-Critic, arXiv:2209.04439).
        temperature: scale of Gumbel noise on what the first three and the critic say, falling to 0
            at the last step.
        threshold: of ``"threshold"``, in [0, 1].
        order: int64 ``[L]`` on the net's device, the rank of each position, for ``"halton"``.
        critic: from ids ``[B, L]`` to scores ``[B, L]``, higher where an id looks wrong.
    """

    strategy: Strategy = "confidence"
    temperature: float = 0.0
    threshold: float = 0.9
    order: Tensor | None = None
    critic: Callable[[Tensor], Tensor] | None = None

    @property
    def confidence(self) -> Confidence:
        """What :func:`nar_kernels.unmask` has to say of each row."""
        if self.strategy == "margin" or self.strategy == "entropy":
            return self.strategy
        return "probability"

    @property
    def order_is_fixed(self) -> bool:
        """Whether it does not depend on what the net says."""
        return self.strategy in ("random", "halton")

    def fixed_score(self, rows: Tensor, noise: "Noise") -> Tensor:
        """Floating-point ``[R]``, the highest come first, of a strategy that is blind."""
        if self.strategy == "random":
            return noise.words(rows).double()
        assert self.order is not None
        return -self.order.double().index_select(0, rows % noise.length)

    def score(
        self, ids: Tensor, rows: Tensor, confidence: Tensor, annealing: float, noise: "Noise"
    ) -> Tensor:
        """Floating-point ``[R]``, the highest come first.

        Args:
            ids: int64 ``[B, L]``, with what was drawn.
            rows: int64 ``[R]``, the positions in question, indices into the flat ``[B * L]``.
            confidence: float32 ``[R]``, of :func:`nar_kernels.unmask`.
            annealing: of this step, as is the noise.
        """
        score = confidence
        if self.strategy == "critic":
            assert self.critic is not None
            score = -self.critic(ids).float().flatten().index_select(0, rows)
        if self.temperature * annealing > 0:
            score = score + self.temperature * annealing * gumbel(noise.words(rows))
        return score


def make_choice(
    config: SamplingConfig,
    seq_len: int,
    device: torch.device,
    critic: Callable[[Tensor], Tensor] | None,
) -> Choice:
    """The choice that a config describes, for a net on ``device``.

    Raises:
        ValueError: the strategy needs a critic or a grid, and there is none.
    """
    if config.strategy == "critic" and critic is None:
        raise ValueError("strategy 'critic' needs a token_critic or self_token_critic")
    order = grid_order(config.grid, seq_len).to(device) if config.strategy == "halton" else None
    return Choice(
        config.strategy,  # type: ignore[arg-type]
        config.choice_temperature,
        config.threshold,
        order,
        critic,
    )


class Noise(NamedTuple):
    """Random words for each position of a batch, of one step.

    Attributes:
        seed: the key.
        num_steps: of the whole plan.
        number: of the step.
        length: L.
        sequences: the number of each sequence of the batch.
    """

    seed: int
    num_steps: int
    number: int
    length: int
    sequences: range

    def words(self, rows: Tensor) -> Tensor:
        """int64 ``[R]`` in [0, 2**32), for indices into the flat ``[B * L]``."""
        numbers = rows // self.length * self.sequences.step + self.sequences.start
        slots = numbers * self.num_steps + self.number
        return words(self.seed, Stream.CRITIC_NOISE, slots, rows % self.length)


class Ranking:
    """Positions in question, those of each sequence by descending score; equal ones stay in order.

    Args:
        score: floating-point ``[R]``.
        rows: int64 ``[R]``, the positions, ascending indices into the flat ``[B * L]``.
        counts: int64 ``[B]`` on the CPU: how many of them are in each sequence.
    """

    def __init__(self, score: Tensor, rows: Tensor, counts: Tensor) -> None:
        self._counts, self._width = counts.numpy(), max(counts.tolist(), default=0)
        order = self._of_each(score, -math.inf).argsort(dim=1, descending=True, stable=True)
        self._ranked = self._of_each(rows, 0).gather(1, order)

    def first(self, left: Tensor) -> Tensor:
        """All but the last ``left [B]``, on the CPU, of each sequence, as a part of ``rows``."""
        return self._between(0 * self._counts, self._counts - left.numpy())

    def last(self, left: Tensor) -> Tensor:
        """The last ``left [B]``, on the CPU, of each sequence, as a part of ``rows``, ascending."""
        return self._between(self._counts - left.numpy(), self._counts).sort().values

    def _of_each(self, values: Tensor, behind: float) -> Tensor:
        """From ``[R]`` to ``[B, most of any sequence]``."""
        shape = len(self._counts), self._width
        if values.shape[0] == math.prod(shape):
            return values.view(shape)
        filled = values.new_full((math.prod(shape),), behind)
        cells = np.arange(self._width) < self._counts[:, None]
        return filled.index_copy_(0, _indices(cells, values.device), values).view(shape)

    def _between(self, begin: np.ndarray, end: np.ndarray) -> Tensor:
        """Of the places of each sequence those in [begin, end), which are ``[B]``."""
        begins, ends = set(begin.tolist()), set(end.tolist())
        if len(begins) == len(ends) == 1:  # needs no indices from the host
            return self._ranked[:, begins.pop() : ends.pop()].flatten()
        place = np.arange(self._width)
        cells = (place >= begin[:, None]) & (place < end[:, None])
        return self._ranked.flatten().index_select(0, _indices(cells, self._ranked.device))


def _indices(cells: np.ndarray, device: torch.device) -> Tensor:
    """Those of the cells that are set, in the flat array."""
    return torch.from_numpy(cells.ravel().nonzero()[0]).to(device, non_blocking=True)
