"""Rank, world size and collectives; each rank holds its part of the global batch.

Without a process group there is one rank, and collectives are no-ops. With one, all ranks must
call them.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def has_group() -> bool:
    """Whether the default process group is initialised."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if has_group() else 0


def world_size() -> int:
    return dist.get_world_size() if has_group() else 1


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def sum_over_ranks(values: Tensor) -> Tensor:
    """All-reduce (sum) of ``values``, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def max_over_ranks(value: int) -> int:
    """All-reduce (max) of ``value``."""
    largest = torch.tensor(value, device="cpu")
    if world_size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


class SumOverRanks:
    """Asynchronous all-reduce (sum), started on construction, which all ranks must do.

    Args:
        values: of this rank; reduced in place.
    """

    def __init__(self, values: Tensor) -> None:
        self.world_size = world_size()
        self._values = values
        self._work = dist.all_reduce(values, async_op=True) if self.world_size > 1 else None

    def mean(self) -> Tensor:
        """Waits; the sum divided by the number of ranks."""
        if self._work is not None:
            self._work.wait()
        return self._values / self.world_size


def broadcast_object(value: Any) -> Any:
    """The first rank's ``value``, on all ranks."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def on_first_rank(call: Callable[[], T]) -> T:
    """Runs ``call`` on the first rank only; all ranks return its result or raise its exception."""
    result: T | None = None
    error: Exception | None = None
    if rank() == 0:
        try:
            result = call()
        except Exception as raised:
            error = raised
    result, error = broadcast_object((result, error))
    if error is not None:
        raise error
    return result


def barrier() -> None:
    """Blocks until all ranks have called it."""
    sum_over_ranks(torch.zeros(1, dtype=torch.float32, device="cpu"))
