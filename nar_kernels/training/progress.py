"""Progress of a run: log lines, a progress bar, and TensorBoard curves."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nar_kernels.distributed import rank
from nar_kernels.extras import import_extra
from nar_kernels.training.config import TrainConfig

# Without a terminal, log a line every 30 s or every tenth of the steps, whichever is first.
_LOG_SECONDS, _LOG_LINES = 30.0, 10


class Progress:
    """Reports progress; silent on all ranks but the first."""

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
            sys.stdout.flush()  # for log files
            self._wait()

    @contextmanager
    def running(self, first: int) -> Iterator[None]:
        """Context with a progress bar, on stderr if that is a terminal, and a TensorBoard writer.

        ``first`` is the next step; events that a killed run logged from there on are purged.
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

    def log_if_due(self, state: str) -> None:
        """Prints a line if there is no progress bar and one is due."""
        is_due = self._done >= self._next_step or time.monotonic() >= self._next_time
        if self._bar.disable and is_due:
            self.say(f"step {self._done:>6} of {self._config.steps}: {state}")

    def _wait(self) -> None:
        """Restarts the interval of :meth:`log_if_due`, after any line."""
        self._next_step = self._done + max(self._config.steps // _LOG_LINES, 1)
        self._next_time = time.monotonic() + _LOG_SECONDS

    def plot(self, step: int, values: dict[str, float]) -> None:
        """Writes scalars to TensorBoard."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
