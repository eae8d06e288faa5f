"""Batches of a loader for torchdata's ``StatefulDataLoader``."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from nar_kernels.checks import as_int
from nar_kernels.data.loader import MaskedLoader
from nar_kernels.data.packed_loader import PackedLoader
from nar_kernels.ops.corrupted import Corrupted


class LoaderBatches(IterableDataset[Corrupted]):
    """The batches of a loader, one step after the other, made ahead by any number of workers.

    ``StatefulDataLoader(LoaderBatches(loader), batch_size=None, num_workers=2)`` yields what the
    loader itself would, and its ``state_dict`` resumes there.

    Args:
        loader: begins at ``loader.step``.
        steps: end before this step. Default: never.
    """

    def __init__(self, loader: MaskedLoader | PackedLoader, steps: int | None = None) -> None:
        self.loader = loader
        self.steps = None if steps is None else as_int("steps", steps)
        self._next: int | None = None  # of this worker

    def __iter__(self) -> Iterator[Corrupted]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        step = self.loader.step + number if self._next is None else self._next
        while self.steps is None or step < self.steps:
            batch = self.loader.batch(step)
            step += workers
            self._next = step
            yield batch
        self._next = None

    def state_dict(self) -> dict[str, Any]:
        """That of the loader, and the step that this worker makes next."""
        return {"loader": self.loader.state_dict(), "next": self._next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes where :meth:`state_dict` was taken, with as many workers.

        Raises:
            ValueError: as of the loader: it would not continue the same batches.
        """
        self.loader.load_state_dict(state_dict["loader"])
        self._next = state_dict["next"]
