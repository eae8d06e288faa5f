"""Forward and backward with gradient accumulation, and metrics without a sync per step."""

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
    static_shapes: bool = False,
) -> Tensor:
    """Forward and backward with gradient accumulation; returns the loss, in nats.

    Gradients are added to the parameters' ``grad``. Each microbatch is normalised by the token
    count of the whole batch (with several ranks, by the mean over ranks), so that losses and
    gradients of microbatches add up to those of the batch, up to rounding. Gradients are averaged
    over ranks; likewise, the mean over ranks of the returned losses is the global loss.

    Args:
        model: a :class:`NonAutoregressiveWrapper`, or one in DistributedDataParallel or sharded.
        batch: of this rank.
        accumulate: number of microbatches.
        autocast: makes the context for the forward pass.
        static_shapes: as in :func:`nar_kernels.masked_nll`.
    """
    wrapper: Any = getattr(model, "module", model)
    counted = num_counted(batch, wrapper.reduction)
    normalizer = distributed.sum_over_ranks(counted).clamp(min=1) / distributed.world_size()
    device = next(model.parameters()).device
    parts = list(batch.microbatches(-(-len(batch) // as_int("accumulate", accumulate))))
    losses = []
    for part in parts:
        with parallel.accumulating(model, is_last=part is parts[-1]):
            with autocast():
                loss = model(
                    part.to(device),
                    normalizer=normalizer.to(device),
                    static_shapes=static_shapes,
                ).loss
            loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


class DeferredMetrics:
    """Loss and gradient norm of each step, kept on the device: no sync per step."""

    def __init__(self) -> None:
        self._pairs: list[Tensor] = []

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Adds a step: this rank's loss, from :func:`loss_and_gradient`, and the gradient norm."""
        self._pairs.append(torch.stack([loss, norm]))

    def flush(self, stop: bool) -> tuple[list[float], list[float], bool]:
        """Synchronises with the device. Returns the losses and gradient norms of the steps since
        the last call, and whether ``stop`` is true on any rank.

        Collective: all ranks must call it, and get the same.
        """
        pairs = torch.stack(self._pairs).double().cpu()
        self._pairs.clear()
        local = torch.cat([pairs.T.flatten(), torch.tensor([float(stop)], device="cpu")])
        *values, stops = (distributed.sum_over_ranks(local) / distributed.world_size()).tolist()
        return values[: len(pairs)], values[len(pairs) :], stops > 0
