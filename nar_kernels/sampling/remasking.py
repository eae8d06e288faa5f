"""ReMDM (Wang et al. 2025, arXiv:2503.00307): how many filled positions each step masks again.

With the share alpha of the positions of a block that are filled, a step from alpha_t to alpha_s
masks a filled position again with probability sigma, and fills a masked one with probability
``(alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)``. Here alpha is exact: the plan says how many
positions are filled after a step. So is the number that is masked again, sigma times that of the
filled ones, rounded up or down at random such that its mean is exact. As many more are filled, so
both probabilities are those above. All counts are known before the first step.

Shapes: B batch.
"""

import torch
from torch import Tensor

from nar_kernels.sampling.plan import Plan
from nar_kernels.spec.philox import Stream, words


def with_remasking(plan: Plan, strategy: str, eta: float, *, seed: int, sequences: range) -> Plan:
    """A plan whose steps mask positions again.

    Args:
        plan: with ``every_step``.
        strategy: ``"remdm_cap"``, sigma is at most ``eta``; or ``"remdm_rescale"``, it is ``eta``
            times the largest that is possible, ``min(1, (1 - alpha_s) / alpha_t)``.
        eta: in [0, 1].
        seed: the Philox key.
        sequences: the number of each sequence of the batch.
    """
    numbers = torch.tensor(sequences, dtype=torch.int64, device="cpu")
    blocks = []
    for block in plan.blocks:
        steps, masked = [], block.counts
        for step in block.steps:
            slots = numbers * plan.num_steps + step.number
            word = words(seed, Stream.REMASK_COUNT, slots, torch.zeros_like(slots))
            again = num_again(block.counts - masked, step.left, strategy, eta, word)
            steps.append(step._replace(again=again))
            masked = step.left
        blocks.append(block._replace(steps=steps))
    return plan._replace(blocks=blocks)


def num_again(filled: Tensor, left: Tensor, strategy: str, eta: float, word: Tensor) -> Tensor:
    """int64 ``[B]``: how many of the filled positions are masked again.

    Args:
        filled: int64 ``[B]``, how many are filled before the step.
        left: int64 ``[B]``, how many are masked after it.
        word: int64 ``[B]`` in [0, 2**32), of a random stream.
    """
    # Of n positions, sigma is at most (1 - alpha_s) / alpha_t = (left / n) / (filled / n).
    most = filled.minimum(left).to(torch.float64)
    mean = most * eta
    if strategy == "remdm_cap":
        mean = most.minimum(filled.to(torch.float64) * eta)
    whole = mean.floor()
    return (whole + (word < (mean - whole) * 2**32)).to(torch.int64)
