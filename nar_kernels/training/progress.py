"""What a run shows while it goes: lines, a bar, and curves for TensorBoard."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nar_kernels.distributed import rank
from nar_kernels.extras import import_extra
from nar_kernels.training.config import TrainConfig

# Where there is no terminal, a line comes after so many seconds or this share of the steps.
_SECONDS, _SHARE = 30.0, 10


class Progress:
    """Shows a run; silent on all ranks but the first."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._is_first = rank() == 0
        self._quiet = config.quiet or not self._is_first
        self._bar: Any = None
        self._board: Any = None
        self._done = 0
        self._next_step, self._next_time = 0, 0.0

    def say(self, line: str) -> None:
        if not self._quiet:
            import_extra("tqdm").tqdm.write(line)  # above the progress bar
            sys.stdout.flush()  # or a log file would lag behind
            self._wait()

    @contextmanager
    def running(self, first: int) -> Iterator[None]:
        """A progress bar, on standard error if that is a terminal, and TensorBoard.

        ``first`` is the step that comes next; what a killed run logged from there on is dropped.
        """
        self._bar = import_extra("tqdm").tqdm(
            total=self._config.steps,
            initial=first,
            unit="step",
            disable=self._quiet or None,
            dynamic_ncols=True,
        )
        if self._is_first:
            self._board = import_extra("torch.utils.tensorboard").SummaryWriter(
                str(self._config.folder / "tb"), purge_step=first + 1
            )
        self._done = first
        self._wait()
        try:
            yield
        finally:
            self._bar.close()
            if self._board is not None:
                self._board.close()

    def advance(self, num_steps: int, state: str) -> None:
        self._bar.set_postfix_str(state, refresh=False)
        self._bar.update(num_steps)
        self._done += num_steps

    def note(self, state: str) -> None:
        """A line now and then, where no bar shows that the run goes on."""
        is_due = self._done >= self._next_step or time.monotonic() >= self._next_time
        if self._bar.disable and is_due:
            self.say(f"step {self._done:>6} of {self._config.steps}: {state}")

    def _wait(self) -> None:
        """The next line of :meth:`note` comes that much after any line."""
        self._next_step = self._done + max(self._config.steps // _SHARE, 1)
        self._next_time = time.monotonic() + _SECONDS

    def plot(self, step: int, values: dict[str, float]) -> None:
        """Points of curves for TensorBoard."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
