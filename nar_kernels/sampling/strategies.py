"""Unmasking order: which positions are filled first.

Shapes: B batch, L sequence length, R candidate positions, given as "rows": indices into the flat
``[B * L]``.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nar_kernels.ops.arguments import ChooseArgs
from nar_kernels.ops.backends import resolve_backend
from nar_kernels.ops.choose import CHOOSE_BACKENDS, run_choose
from nar_kernels.ops.unmask import Confidence
from nar_kernels.sampling.config import ADAPTIVE, BLIND, SamplingConfig, Strategy
from nar_kernels.sampling.halton import grid_order
from nar_kernels.spec.philox import signed_seed


class Counts(NamedTuple):
    """How many positions each sequence has.

    Attributes:
        of_sequence: int64 ``[B]``, on the host.
        total: their sum.
        bounds: int64 ``[B + 1]``, on the net's device: of all positions in order, sequence b has
            those from ``bounds[b]`` to ``bounds[b + 1]``.
    """

    of_sequence: np.ndarray
    total: int
    bounds: Tensor

    @classmethod
    def of(cls, counts: np.ndarray, device: torch.device) -> "list[Counts]":
        """From int64 ``[N, B]``, in one copy to the device."""
        bounds = np.zeros((len(counts), counts.shape[1] + 1), np.int64)
        counts.cumsum(1, out=bounds[:, 1:])
        on_device = torch.from_numpy(bounds).to(device, non_blocking=True)
        return list(map(cls, counts, bounds[:, -1].tolist(), on_device))


class Candidates(NamedTuple):
    """The positions that a step may fill.

    Attributes:
        rows: int64 ``[R]`` on the net's device, ascending.
        counts: of them.
    """

    rows: Tensor
    counts: Counts


class StepNoise(NamedTuple):
    """Which noise a step has: a Philox word for each position of the batch.

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


class UnmaskingPolicy(NamedTuple):
    """Scores candidate positions; the highest scores are unmasked first.

    Attributes:
        strategy:
            * ``"confidence"``: probability of the sampled id (MaskGIT, arXiv:2202.04200);
            * ``"margin"``: gap between the two highest probabilities (arXiv:2502.06768);
            * ``"entropy"``: lowest entropy of the distribution (Dream, arXiv:2508.15487);
            * ``"threshold"``: all positions whose sampled id reaches the threshold, and the most
              probable one (Fast-dLLM, arXiv:2505.22618); the plan says how many are filled after
              each step at least;
            * ``"quota"``: all positions whose sampled id is above the threshold, but no fewer than
              the plan has for the step (LLaDA 2), the most probable ones;
            * ``"factor"``: the n most probable ids, where each has at least ``1 - factor / (n +
              1)``, and one in any case (Fast-dLLM); the plan as for ``"threshold"``;
            * ``"entropy_bound"``: lowest entropy first, as long as the entropies of those before
              add up to no more than the bound (arXiv:2505.24857); the plan as for ``"threshold"``;
            * ``"random"``: random order, as in masked diffusion (arXiv:2406.07524);
            * ``"remdm_cap"``, ``"remdm_rescale"``: random order, and the plan masks some again at
              random (ReMDM, arXiv:2503.00307);
            * ``"halton"``: far apart on a grid (arXiv:2503.17076);
            * ``"critic"``: lowest score of a critic (Token-Critic, arXiv:2209.04439).
        temperature: scale of Gumbel noise on the scores of the first three and of the critic,
            annealed linearly to 0 at the last step.
        threshold: probability for ``"threshold"`` and ``"quota"``, in [0, 1].
        order: ``[L]`` on the net's device, the rank of each position, for ``"halton"``. Quickest in
            float32.
        critic: maps ids ``[B, L]`` to scores ``[B, L]``, higher where an id looks wrong.
        factor: for ``"factor"``, at least 0.
        entropy_bound: in nats, for ``"entropy_bound"``, at least 0.
    """

    strategy: Strategy = "confidence"
    temperature: float = 0.0
    threshold: float = 0.9
    order: Tensor | None = None
    critic: Callable[[Tensor], Tensor] | None = None
    factor: float = 1.0
    entropy_bound: float = 0.1

    @property
    def confidence(self) -> Confidence:
        """The confidence measure that :func:`nar_kernels.unmask` computes for each row."""
        if self.strategy == "margin" or self.strategy == "entropy":
            return self.strategy
        return "entropy" if self.strategy == "entropy_bound" else "probability"

    @property
    def order_is_fixed(self) -> bool:
        """Whether the order is independent of the net's predictions."""
        return self.strategy in BLIND

    @property
    def is_adaptive(self) -> bool:
        """Whether :meth:`num_left` has a say in how many positions are filled."""
        return self.strategy in ADAPTIVE

    def num_left(
        self, left: Counts, before: np.ndarray, counts: Counts, confidence: Tensor
    ) -> Counts:
        """How many candidates stay masked; only if ``is_adaptive``. Synchronises with the device.

        Filled are all of which the net is sure, at least one, and at least as many as the plan
        requires.

        Args:
            left: how many stay masked after this step, by the plan.
            before: int64 ``[B]``, how many were masked before it, by the plan.
            counts: of the candidates.
            confidence: float32 ``[R]``, from :func:`nar_kernels.unmask`.
        """
        candidates = counts.of_sequence
        required = (before if self.strategy == "quota" else candidates) - left.of_sequence
        # On the CPU: the same numbers for all devices.
        filled = np.maximum(self._num_sure(confidence.cpu(), candidates), required)
        num_left = (candidates - np.maximum(filled, 1)).clip(min=0)
        return Counts.of(num_left[None], confidence.device)[0]

    def _num_sure(self, confidence: Tensor, counts: np.ndarray) -> np.ndarray:
        """int64 ``[B]``: of how many candidates the net is sure. Padding may be among them."""
        if self.strategy == "entropy_bound":
            entropy = np.sort(_by_sequence(-confidence, counts, np.inf), axis=1)
            # Of those before each. An end that is to be filled last is at infinity.
            total = np.zeros(entropy.shape)
            entropy[:, :-1].cumsum(1, np.float64, out=total[:, 1:])
            is_sure = (total <= self.entropy_bound) & (entropy < np.inf)
        else:
            probability = _by_sequence(confidence.exp(), counts, -np.inf)
            if self.strategy == "threshold":
                is_sure = probability >= np.float32(self.threshold)
            elif self.strategy == "quota":
                is_sure = probability > np.float32(self.threshold)
            else:
                probability = -np.sort(-probability, axis=1)
                rank = np.arange(1, probability.shape[1] + 1)
                is_sure = (probability >= 1 - self.factor / (rank + 1)) & (probability > 0)
        return is_sure.sum(1)

    def score(self, ids: Tensor, rows: Tensor, confidence: Tensor) -> Tensor:
        """float32 ``[R]``, what :meth:`choose` takes; only if not ``order_is_fixed``.

        Args:
            ids: int64 ``[B, L]``, including the ids sampled in this step.
            rows: int64 ``[R]``, the candidate positions.
            confidence: float32 ``[R]``, from :func:`nar_kernels.unmask`.
        """
        if self.strategy != "critic":
            return confidence
        assert self.critic is not None
        return self.critic(ids).float().flatten().index_select(0, rows)

    def choose(
        self,
        candidates: Candidates,
        left: Counts,
        score: Tensor | None,
        annealing: float,
        noise: StepNoise,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """The rows that keep their ids, and those that are left for later steps, both ascending.

        Args:
            left: how many are left.
            score: from :meth:`score`; None if ``order_is_fixed``.
            annealing: of this step, scales ``temperature``.
        """
        rows, counts = candidates
        if self.strategy == "halton":
            assert self.order is not None
            score = self.order.float()
        arguments = ChooseArgs(
            score,
            by_position=self.strategy == "halton",
            lowest_first=self.strategy in ("halton", "critic"),
            noise_scale=0.0 if self.order_is_fixed else self.temperature * annealing,
            rows=rows,
            bounds=counts.bounds,
            left_bounds=left.bounds,
            num_left=left.total,
            length=noise.length,
            seed=signed_seed(noise.seed),
            first_slot=noise.sequences.start * noise.num_steps + noise.number,
            slot_stride=noise.sequences.step * noise.num_steps,
        )
        return run_choose(arguments, resolve_backend(backend, rows.device, CHOOSE_BACKENDS))


def _by_sequence(values: Tensor, counts: np.ndarray, padding: float) -> np.ndarray:
    """float32 ``[B, N]`` of ``[R]``, with N the most candidates of a sequence."""
    is_candidate = np.arange(counts.max(initial=0)) < counts[:, None]
    padded = np.full(is_candidate.shape, padding, np.float32)
    padded[is_candidate] = values.numpy()
    return padded


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
    order = None
    if config.strategy == "halton":
        order = grid_order(config.grid, seq_len).to(device, torch.float32)
    return UnmaskingPolicy(
        config.strategy,  # type: ignore[arg-type]
        config.choice_temperature,
        config.threshold,
        order,
        critic,
        config.factor,
        config.entropy_bound,
    )
