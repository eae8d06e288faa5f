"""What a run shows while it goes: lines, a bar, and curves for TensorBoard."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nar_kernels.config import TrainConfig
from nar_kernels.extras import import_extra
from nar_kernels.parallel import rank


class Progress:
    """Shows a run; silent on all ranks but the first."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._is_first = rank() == 0
        self._quiet = config.quiet or not self._is_first
        self._bar: Any = None
        self._board: Any = None

    def say(self, line: str) -> None:
        if not self._quiet:
            import_extra("tqdm").tqdm.write(line)  # above the progress bar
            sys.stdout.flush()  # or a log file would lag behind

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
        try:
            yield
        finally:
            self._bar.close()
            if self._board is not None:
                self._board.close()

    def advance(self, num_steps: int, state: str) -> None:
        self._bar.set_postfix_str(state, refresh=False)
        self._bar.update(num_steps)

    def plot(self, step: int, values: dict[str, float]) -> None:
        """Points of curves for TensorBoard."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
