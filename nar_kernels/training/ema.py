"""A moving average of the weights, which often does better than where training just stands."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nar_kernels.training.parallel import local


class Ema:
    """An exponential moving average of the parameters of ``model``.

    Step s counts from 0. It keeps ``min(decay, (1 + s) / (10 + s))`` of the average so far, so that
    the weights that training began with are soon forgotten.

    Args:
        model: the parameters may be sharded; the averages are then, too.
        decay: in (0, 1): the average is over about ``1 / (1 - decay)`` steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = float(decay)
        self._model = model
        self._parameters = list(model.parameters())
        with torch.no_grad():
            self._averages = [part.clone() for part in self._parts()]

    def _parts(self) -> list[Tensor]:
        """This rank's part of each parameter: asked for each time, since FSDP2 may put another
        tensor in its place when a state dict is loaded."""
        return [local(p) for p in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after ``step``."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._parts(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages for its parameters."""
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
        """A state dict of the model, with the averages; divided over ranks as the model is."""
        with self.applied():
            return {name: value.clone() for name, value in self._model.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes the averages of :meth:`state_dict`; the model keeps its weights."""
        with self.applied():
            self._model.load_state_dict(state)
