"""Exponential moving average (EMA) of the weights, which often evaluates better than they do."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nar_kernels.training.parallel import to_local


class Ema:
    """An exponential moving average of the parameters of ``model``.

    Warm-up: step s, from 0, uses the decay ``min(decay, (1 + s) / (10 + s))``, so that the initial
    weights are soon forgotten.

    Args:
        model: parameters may be sharded; the averages then are, too.
        decay: in (0, 1): the average is over about ``1 / (1 - decay)`` steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = float(decay)
        self._model = model
        self._parameters = list(model.parameters())
        with torch.no_grad():
            self._averages = [part.clone() for part in self._parts()]

    def _parts(self) -> list[Tensor]:
        """This rank's shard of each parameter. Not cached, since FSDP2 may replace the tensor when
        a state dict is loaded."""
        return [to_local(p) for p in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Updates the averages with the weights after ``step``."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._parts(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model's parameters are the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self._parts(), self._averages, strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The model's state dict with the averages as parameters; sharded as the model is."""
        with self.applied():
            return {name: value.clone() for name, value in self._model.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads averages saved by :meth:`state_dict`; the model keeps its weights."""
        with self.applied():
            self._model.load_state_dict(state)
