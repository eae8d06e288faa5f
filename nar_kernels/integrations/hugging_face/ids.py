"""Numbered examples, so that masks do not depend on workers, ranks or a resume.

Shapes: B batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from transformers import TrainerCallback
from transformers.trainer_utils import RemoveColumnsCollator

from nar_kernels.integrations.draws import seed_of

SAMPLE_ID = "sample_id"


class SampleIds(Dataset[dict[str, Any]]):
    """A map-style dataset whose examples know their number: ``"sample_id"`` is
    ``epoch * len(dataset) + index``.

    With it and a ``seed`` a collator's masks are functions of (seed, epoch, index): the same for
    any order, number of workers or processes, and after a resume. Call ``set_epoch`` before each
    epoch; in transformers' ``Trainer`` the callback :class:`SetEpoch` does. Workers see it, also
    persistent ones.

    Args:
        dataset: of examples that are mappings.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Whose numbers the examples get from now on, from 0."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._numbered(self.dataset[index], index)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        fetch = getattr(self.dataset, "__getitems__", None)
        if fetch is None:
            return [self[i] for i in indices]
        return [self._numbered(e, i) for e, i in zip(fetch(indices), indices, strict=True)]

    def _numbered(self, example: Mapping[str, Any], index: int) -> dict[str, Any]:
        number = int(self._epoch) * len(self.dataset) + index % len(self.dataset)
        return {**example, SAMPLE_ID: number}


class SetEpoch(TrainerCallback):
    """Tells the training data of a ``Trainer`` which epoch begins, or goes on after a resume, and
    keeps the numbers of its examples, which ``remove_unused_columns`` would drop.

    Accelerate sets epochs, too, but not with several processes, or after a resume within an epoch;
    and to 0 where an evaluation begins, so in ``Trainer`` do not evaluate the same ``SampleIds``.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        collator = kwargs["train_dataloader"].collate_fn
        if isinstance(collator, RemoveColumnsCollator):
            collator.signature_columns = [*collator.signature_columns, SAMPLE_ID]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        data = kwargs["train_dataloader"].dataset
        while not hasattr(data, "set_epoch") and hasattr(data, "dataset"):
            data = data.dataset  # of a Subset
        if hasattr(data, "set_epoch"):
            data.set_epoch(int((state.epoch or 0) + 1e-6))


@dataclass
class Slots:
    """The seed and the sample slots of a collator's batches."""

    seed: int | None
    _done: int = 0

    def of(self, sample_ids: Tensor | None, batch: int) -> tuple[int, Tensor]:
        """Of examples without numbers: with a seed, slots that this process has not used yet;
        without, a seed of PyTorch's generator."""
        if self.seed is not None and sample_ids is None:
            worker = get_worker_info()
            first = ((0 if worker is None else worker.id) << 40) + self._done
            self._done += batch
            sample_ids = torch.arange(first, first + batch, device="cpu")
        if sample_ids is None:
            sample_ids = torch.arange(batch, device="cpu")
        return seed_of(self.seed), sample_ids


def take_sample_ids(examples: Sequence[Any]) -> tuple[list[Any], Tensor | None]:
    """The examples without their numbers, and these, int64 ``[B]``."""
    has = [isinstance(e, Mapping) and SAMPLE_ID in e for e in examples]
    if not any(has):
        return list(examples), None
    if not all(has):
        raise ValueError(f"some examples have a {SAMPLE_ID!r}, and others not: give it to all")
    try:
        numbers = torch.tensor([int(e[SAMPLE_ID]) for e in examples], device="cpu")
    except (TypeError, ValueError):
        raise ValueError(
            f"an example has the {SAMPLE_ID!r} {examples[0][SAMPLE_ID]!r}: it must be a number, by "
            "which its mask is drawn; rename or remove a column of another meaning"
        ) from None
    rest = [{name: x for name, x in e.items() if name != SAMPLE_ID} for e in examples]
    return rest, numbers
