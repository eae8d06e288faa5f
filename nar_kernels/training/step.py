"""What an optimiser step consists of: the loss and its gradient, the learning rate, AdamW."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nar_kernels import distributed
from nar_kernels.checks import as_int
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.masked_nll import num_counted
from nar_kernels.training import parallel


def loss_and_gradient(
    model: nn.Module,
    batch: Corrupted,
    accumulate: int = 1,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Adds the gradient of the batch's loss to the parameters; returns the loss, in nats.

    Each part of a batch divides by the count of the whole batch, so that losses and gradients of
    parts add up to those of the whole, up to rounding. Ranks average their gradients, so there the
    whole is a mean over ranks: of the gradients, and of the losses that this returns.

    Args:
        model: a :class:`NonAutoregressiveWrapper`, or one in DistributedDataParallel or sharded.
        batch: of this rank.
        accumulate: how many parts to compute one after the other.
    """
    wrapper: Any = getattr(model, "module", model)
    counted = num_counted(batch, "nelbo" if wrapper.use_simple_mdlm_loss_weight else "mean")
    normalizer = distributed.sum_over_ranks(counted).clamp(min=1) / distributed.world_size()
    device = next(model.parameters()).device
    parts = list(batch.microbatches(-(-len(batch) // as_int("accumulate", accumulate))))
    losses = []
    for part in parts:
        with parallel.accumulating(model, is_last=part is parts[-1]):
            with autocast():
                loss = model(part.to(device), normalizer=normalizer.to(device)).loss
            loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


class Pending:
    """Losses and norms of gradients, on the device until somebody wants to see them."""

    def __init__(self) -> None:
        self._pairs: list[Tensor] = []

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Of one step: this rank's loss, as :func:`loss_and_gradient` returns it, and the norm."""
        self._pairs.append(torch.stack([loss, norm]))

    def settle(self, stop: bool) -> tuple[list[float], list[float], bool]:
        """Waits for the device; the losses and norms of all steps, and whether any rank says stop.

        All ranks must call this, and get the same.
        """
        pairs = torch.stack(self._pairs).double().cpu()
        self._pairs.clear()
        ours = torch.cat([pairs.T.flatten(), torch.tensor([float(stop)], device="cpu")])
        *values, stops = (distributed.sum_over_ranks(ours) / distributed.world_size()).tolist()
        return values[: len(pairs)], values[len(pairs) :], stops > 0
