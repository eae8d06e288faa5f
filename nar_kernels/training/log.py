"""Training history: losses, evaluations and timings of a run."""

import time
from typing import Any

import torch

from nar_kernels.likelihood import NATS_PER_BIT

_POINTS = 200  # target number of points of the smoothed training curve


class Log:
    """The history of a run, saved in its checkpoints.

    Attributes:
        losses: training loss of each step, in nats.
        curve: (step, bits per token, standard error) of each evaluation.
        step_seconds: time spent in training steps only.
        seconds: total time, with evaluation and checkpoints.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.curve: list[tuple[int, float, float]] = []
        self.step_seconds = 0.0
        self.seconds = 0.0
        self._last_tick: float | None = None

    def add(self, losses: list[float]) -> None:
        """Appends steps, which took the time since the last call of this or :meth:`tick`."""
        self.losses += losses
        self.step_seconds += self.tick()

    def tick(self) -> float:
        """Adds the seconds since the last call to ``seconds``, and returns them."""
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
        """Mean loss of the last 20 steps, in nats."""
        recent = self.losses[-20:]
        return sum(recent) / max(len(recent), 1)

    def smooth(self) -> list[tuple[float, float]]:
        """(middle step, bits) of the training loss, averaged over bins of equal size."""
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
