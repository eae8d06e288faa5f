"""Which positions decoding fills first.

Shapes: B batch, L sequence length, R positions in question.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from nar_kernels.float_math import gumbel
from nar_kernels.launch import Confidence
from nar_kernels.philox import Stream, words

Strategy = Literal["confidence", "margin", "entropy", "threshold", "random", "halton", "critic"]


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

    def check(self) -> None:
        """Raises ValueError for what makes no sense."""
        if self.strategy not in get_args(Strategy):
            names = ", ".join(get_args(Strategy))
            raise ValueError(f"strategy is {self.strategy!r}: it must be one of {names}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"choice_temperature is {self.temperature}: it must be at least 0")
        if self.temperature > 0 and self.strategy in ("threshold", "random", "halton"):
            raise ValueError(f"choice_temperature has no meaning for strategy {self.strategy!r}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}: it must be in [0, 1]")
        for strategy, part in (("halton", self.order), ("critic", self.critic)):
            if self.strategy == strategy and part is None:
                raise ValueError(f"strategy {strategy!r} needs an order of positions or a critic")

    @property
    def confidence(self) -> Confidence:
        """What :func:`nar_kernels.unmask` has to say of each row."""
        if self.strategy == "margin" or self.strategy == "entropy":
            return self.strategy
        return "probability"

    @property
    def is_blind(self) -> bool:
        """Whether it does not depend on what the net says."""
        return self.strategy in ("random", "halton")

    def blind_score(self, noise: "Noise") -> Tensor:
        """Floating-point ``[B, L]``, the highest come first, of a strategy that is blind."""
        if self.strategy == "random":
            return noise.words().double()
        assert self.order is not None
        return -self.order.double().expand(len(noise.slots), -1)

    def score(
        self, ids: Tensor, rows: Tensor, confidence: Tensor, annealing: float, noise: "Noise"
    ) -> Tensor:
        """Floating-point ``[B, L]``: at ``rows``, the highest come first.

        Args:
            ids: int64 ``[B, L]``, with what was drawn.
            rows: int64 ``[R]``, the positions in question, indices into the flat ``[B * L]``.
            confidence: float32 ``[R]``, of :func:`nar_kernels.unmask`.
            annealing: of this step, as is the noise.
        """
        if self.strategy == "critic":
            assert self.critic is not None
            score = -self.critic(ids).float()
        else:
            score = torch.zeros(ids.shape, device=ids.device)
            score.view(-1)[rows] = confidence
        if self.temperature * annealing > 0:
            score = score + self.temperature * annealing * gumbel(noise.words())
        return score


class Noise(NamedTuple):
    """Random words for each position of a batch.

    Attributes:
        seed: the key.
        slots: int64 ``[B]``.
        length: L.
    """

    seed: int
    slots: Tensor
    length: int

    def words(self) -> Tensor:
        """int64 ``[B, L]`` in [0, 2**32)."""
        positions = torch.arange(self.length, device=self.slots.device)
        return words(self.seed, Stream.CRITIC_NOISE, self.slots[:, None], positions)


def divide(score: Tensor, rows: Tensor, counts: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """The positions that are filled now, and those that must wait: of the lowest scores, and of
    equal ones the last.

    Args:
        score: floating-point ``[B, L]``.
        rows: int64 ``[R]``, the positions in question, indices into the flat ``[B * L]``.
        counts, left: int64 ``[B]`` on the CPU: how many of ``rows`` are in each sequence, and how
            many of those must wait.

    Returns:
        Parts of ``rows``, of lengths known from ``counts`` and ``left``.
    """
    length = score.shape[1]
    # Improbable as some may be, they come before those that are not in question.
    in_question = torch.full_like(score, -math.inf)
    in_question.view(-1)[rows] = score.flatten()[rows].clamp(min=torch.finfo(score.dtype).min)
    order = in_question.argsort(dim=1, descending=True, stable=True)
    order += torch.arange(0, order.numel(), length, device=order.device)[:, None]
    place, first = torch.arange(length), (counts - left)[:, None]
    parts = place < first, (place >= first) & (place < counts[:, None])
    now, waiting = (
        order.flatten()[part.flatten().nonzero()[:, 0].to(order.device, non_blocking=True)]
        for part in parts
    )
    return now, waiting
