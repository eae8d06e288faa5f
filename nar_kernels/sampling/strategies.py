"""Unmasking order: which positions are filled first.

Shapes: B batch, L sequence length, R candidate positions, given as "rows": indices into the flat
``[B * L]``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nar_kernels.ops.unmask import Confidence
from nar_kernels.sampling.config import SamplingConfig, Strategy
from nar_kernels.sampling.halton import grid_order
from nar_kernels.spec.float_math import gumbel
from nar_kernels.spec.philox import Stream, words


class UnmaskingPolicy(NamedTuple):
    """Scores candidate positions; the highest scores are unmasked first.

    Attributes:
        strategy:
            * ``"confidence"``: probability of the sampled id (MaskGIT, arXiv:2202.04200);
            * ``"margin"``: gap between the two highest probabilities (arXiv:2502.06768);
            * ``"entropy"``: lowest entropy of the distribution (Dream, arXiv:2508.15487);
            * ``"threshold"``: all positions whose sampled id reaches the threshold, and the most
              probable one (Fast-dLLM, arXiv:2505.22618); the plan sets the minimum per step;
            * ``"random"``: random order, as in masked diffusion (arXiv:2406.07524);
            * ``"halton"``: far apart on a grid (arXiv:2503.17076);
            * ``"critic"``: lowest score of a critic (Token-Critic, arXiv:2209.04439).
        temperature: scale of Gumbel noise on the scores of the first three and of the critic,
            annealed linearly to 0 at the last step.
        threshold: probability for ``"threshold"``, in [0, 1].
        order: int64 ``[L]`` on the net's device, the rank of each position, for ``"halton"``.
        critic: maps ids ``[B, L]`` to scores ``[B, L]``, higher where an id looks wrong.
    """

    strategy: Strategy = "confidence"
    temperature: float = 0.0
    threshold: float = 0.9
    order: Tensor | None = None
    critic: Callable[[Tensor], Tensor] | None = None

    @property
    def confidence(self) -> Confidence:
        """The confidence measure that :func:`nar_kernels.unmask` computes for each row."""
        if self.strategy == "margin" or self.strategy == "entropy":
            return self.strategy
        return "probability"

    @property
    def order_is_fixed(self) -> bool:
        """Whether the order is independent of the net's predictions."""
        return self.strategy in ("random", "halton")

    def fixed_score(self, rows: Tensor, noise: "StepNoise") -> Tensor:
        """Floating-point ``[R]``, highest first; only if ``order_is_fixed``."""
        if self.strategy == "random":
            return noise.words(rows).double()
        assert self.order is not None
        return -self.order.double().index_select(0, rows % noise.length)

    def score(
        self, ids: Tensor, rows: Tensor, confidence: Tensor, annealing: float, noise: "StepNoise"
    ) -> Tensor:
        """Floating-point ``[R]``, highest first; only if not ``order_is_fixed``.

        Args:
            ids: int64 ``[B, L]``, including the ids sampled in this step.
            rows: int64 ``[R]``, the candidate positions.
            confidence: float32 ``[R]``, from :func:`nar_kernels.unmask`.
            annealing: of this step.
            noise: of this step.
        """
        score = confidence
        if self.strategy == "critic":
            assert self.critic is not None
            score = -self.critic(ids).float().flatten().index_select(0, rows)
        if self.temperature * annealing > 0:
            score = score + self.temperature * annealing * gumbel(noise.words(rows))
        return score


def make_policy(
    config: SamplingConfig,
    seq_len: int,
    device: torch.device,
    critic: Callable[[Tensor], Tensor] | None,
) -> UnmaskingPolicy:
    """The unmasking policy of a config, for a net on ``device``.

    Raises:
        ValueError: the strategy needs a critic, and there is none, or a grid, and none fits.
    """
    if config.strategy == "critic" and critic is None:
        raise ValueError("strategy 'critic' needs a token_critic or self_token_critic")
    order = grid_order(config.grid, seq_len).to(device) if config.strategy == "halton" else None
    return UnmaskingPolicy(
        config.strategy,  # type: ignore[arg-type]
        config.choice_temperature,
        config.threshold,
        order,
        critic,
    )


class StepNoise(NamedTuple):
    """Philox noise of one step: a random word for each position of the batch.

    Attributes:
        seed: the Philox key.
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
        """int64 ``[R]`` in [0, 2**32)."""
        numbers = rows // self.length * self.sequences.step + self.sequences.start
        slots = numbers * self.num_steps + self.number
        return words(self.seed, Stream.CRITIC_NOISE, slots, rows % self.length)


class Ranking:
    """Candidate positions of each sequence, sorted by descending score (stable).

    Args:
        score: floating-point ``[R]``.
        rows: int64 ``[R]``, the positions, ascending.
        counts: int64 ``[B]`` on the CPU: number of candidates in each sequence.
    """

    def __init__(self, score: Tensor, rows: Tensor, counts: Tensor) -> None:
        self._counts, self._width = counts.numpy(), max(counts.tolist(), default=0)
        order = self._pad(score, -math.inf).argsort(dim=1, descending=True, stable=True)
        self._ranked = self._pad(rows, 0).gather(1, order)

    def first(self, left: Tensor) -> Tensor:
        """Rows of all but the ``left`` lowest scores of each sequence.

        Args:
            left: int64 ``[B]`` on the CPU.
        """
        return self._rank_slice(0 * self._counts, self._counts - left.numpy())

    def last(self, left: Tensor) -> Tensor:
        """Rows of the ``left`` lowest scores of each sequence, ascending.

        Args:
            left: int64 ``[B]`` on the CPU.
        """
        return self._rank_slice(self._counts - left.numpy(), self._counts).sort().values

    def _pad(self, values: Tensor, padding: float) -> Tensor:
        """From ``[R]`` to ``[B, max(counts)]``, right-padded."""
        shape = len(self._counts), self._width
        if values.shape[0] == math.prod(shape):
            return values.view(shape)
        filled = values.new_full((math.prod(shape),), padding)
        cells = np.arange(self._width) < self._counts[:, None]
        return filled.index_copy_(0, _flat_indices(cells, values.device), values).view(shape)

    def _rank_slice(self, begin: np.ndarray, end: np.ndarray) -> Tensor:
        """Rows ranked in [begin, end) in each sequence; both bounds are ``[B]``."""
        begins, ends = set(begin.tolist()), set(end.tolist())
        if len(begins) == len(ends) == 1:  # a plain slice: no host-to-device copy of indices
            return self._ranked[:, begins.pop() : ends.pop()].flatten()
        place = np.arange(self._width)
        cells = (place >= begin[:, None]) & (place < end[:, None])
        return self._ranked.flatten().index_select(0, _flat_indices(cells, self._ranked.device))


def _flat_indices(cells: np.ndarray, device: torch.device) -> Tensor:
    """Flat indices of the true cells, on ``device``."""
    return torch.from_numpy(cells.ravel().nonzero()[0]).to(device, non_blocking=True)
