"""The history of a run."""

import time
from typing import Any

import torch

from nar_kernels.likelihood import NATS_PER_BIT

_POINTS = 200  # of the training curve


class Log:
    """The history of a run, which travels in its checkpoints.

    Attributes:
        losses: nats, one for each step.
        curve: (step, bits per token, standard error) of each evaluation.
        step_seconds: spent in training steps alone.
        seconds: spent in all, with evaluation and checkpoints.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.curve: list[tuple[int, float, float]] = []
        self.step_seconds = 0.0
        self.seconds = 0.0
        self._last_tick: float | None = None

    def add(self, losses: list[float]) -> None:
        """Steps, which took the time since the last call of this or :meth:`tick`."""
        self.losses += losses
        self.step_seconds += self.tick()

    def tick(self) -> float:
        """Takes note of the seconds since the last call, and returns them."""
        now = time.perf_counter()
        elapsed = 0.0 if self._last_tick is None else now - self._last_tick
        self.seconds += elapsed
        self._last_tick = now
        return elapsed

    def best(self) -> tuple[int, float, float]:
        return min(self.curve, key=lambda point: point[1])

    def last_evaluated(self) -> int | None:
        """The step of the last evaluation."""
        return self.curve[-1][0] if self.curve else None

    def recent_loss(self) -> float:
        """Nats, mean of the last steps."""
        recent = self.losses[-20:]
        return sum(recent) / max(len(recent), 1)

    def smooth(self) -> list[tuple[float, float]]:
        """(middle step, bits) of the training loss: means over equal parts."""
        size = max(-(-len(self.losses) // _POINTS), 5)
        parts = [self.losses[i : i + size] for i in range(0, len(self.losses), size)]
        return [
            (i * size + (len(part) + 1) / 2, sum(part) / len(part) / NATS_PER_BIT)
            for i, part in enumerate(parts)
        ]

    def state_dict(self) -> dict[str, Any]:
        losses = torch.tensor(self.losses, dtype=torch.float64, device="cpu")
        return {
            "losses": losses,
            "curve": self.curve,
            "step_seconds": self.step_seconds,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = state["losses"].tolist()
        self.curve = [tuple(point) for point in state["curve"]]
        self.step_seconds, self.seconds = state["step_seconds"], state["seconds"]
