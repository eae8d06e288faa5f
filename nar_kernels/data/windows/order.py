"""Which window a sample slot holds: :class:`EpochOrder`, :class:`MixtureOrder`.

Shapes: B batch, L sequence length (``seq_len``), N windows.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nar_kernels.data.windows.dataset import TokenDataset
from nar_kernels.data.windows.mixture import Mixture
from nar_kernels.ops.arguments import WindowOrder
from nar_kernels.ops.windows import permute
from nar_kernels.spec.philox import Stream, derived_seed, words


class EpochOrder:
    """The windows of one dataset, all of them in each epoch: slot g is position ``g % N`` of epoch
    ``g // N``.

    Args:
        dataset: N windows.
        seed: of the order.
        shuffle: each epoch has an order of its own; otherwise that of the dataset.
        shift: the windows of each epoch begin up to ``stride - 1`` tokens later, the same number
            for all; the last window is left out, so that they still fit.

    Raises:
        ValueError: ``shift`` with windows within documents, or fewer than two windows.
    """

    def __init__(self, dataset: TokenDataset, seed: int, shuffle: bool, shift: bool) -> None:
        self.dataset, self.seed, self.shuffle, self.shift = dataset, seed, shuffle, shift
        self.num_windows = len(dataset) - shift
        if shift and (not dataset.is_regular or self.num_windows < 1):
            why = "there is only one" if dataset.is_regular else "they lie within documents"
            raise ValueError(
                f"shift_epochs is true, but the windows of {dataset.corpus.name} cannot be "
                f"shifted: {why}; leave it out"
            )
        self.in_kernel: WindowOrder | None = None
        if dataset.is_regular and not shift:
            self.in_kernel = WindowOrder(
                self.num_windows, dataset.phase, dataset.stride, self.shuffle
            )

    def indices(self, slots: Tensor) -> Tensor:
        """int64 ``[B]`` in [0, N): the windows of sample slots."""
        epochs, position = slots // self.num_windows, slots % self.num_windows
        if not self.shuffle:
            return position
        order = torch.empty_like(position)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            order[here] = permute(
                position[here],
                self.num_windows,
                seed=self.seed,
                stream=Stream.WINDOW_ORDER,
                round=epoch,
            )
        return order

    def starts(self, slots: Tensor) -> Tensor:
        """int64 ``[B]``: corpus offsets of the windows of sample slots."""
        starts = self.dataset.starts(self.indices(slots))
        if not self.shift:
            return starts
        epochs = slots // self.num_windows
        word = words(self.seed, Stream.WINDOW_PHASE, epochs, torch.zeros_like(epochs))
        return starts + (word * self.dataset.stride >> 32)

    def state(self) -> dict[str, Any]:
        """What decides the order, as plain values."""
        dataset = self.dataset
        return {
            "corpus_digest": dataset.corpus.digest,
            "loss_mask_digest": dataset.corpus.loss_mask_digest,
            "seq_len": dataset.seq_len,
            "stride": dataset.stride,
            "phase": dataset.phase,
            "num_windows": len(dataset),
            "shift_epochs": self.shift,
            "table_digest": dataset.table_digest,
        }

    def corpus_names(self) -> dict[str, str]:
        """As :func:`check_continues` takes them."""
        return {"": self.dataset.corpus.name}


class MixtureOrder:
    """The windows of a mixture: slot g is the next window of its source, which has an
    :class:`EpochOrder` and a seed of its own.

    Args: as of :class:`EpochOrder`.
    """

    in_kernel = None

    def __init__(self, mixture: Mixture, seed: int, shuffle: bool, shift: bool) -> None:
        self.mixture, self.num_windows = mixture, len(mixture)
        self._orders = [
            EpochOrder(dataset, derived_seed(seed, Stream.WINDOW_ORDER, i), shuffle, shift)
            for i, dataset in enumerate(mixture.datasets)
        ]

    def indices(self, slots: Tensor) -> Tensor:
        """int64 ``[B]``: the windows of sample slots, each an index into the dataset of its
        source."""
        out = torch.empty_like(slots)
        for source, here, numbers in self._by_source(slots):
            out[here] = self._orders[source].indices(numbers)
        return out

    def starts(self, slots: Tensor) -> Tensor:
        """int64 ``[B]``: offsets of the windows of sample slots in the corpora of all sources, one
        after the other."""
        out = torch.empty_like(slots)
        for source, here, numbers in self._by_source(slots):
            out[here] = self.mixture.offsets[source] + self._orders[source].starts(numbers)
        return out

    def _by_source(self, slots: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each source; which slots are its, bool ``[B]``; and which of its own slots those are."""
        sources, numbers = self.mixture.assign(slots)
        for source in sources.unique().tolist():
            here = sources == source
            yield source, here, numbers[here]

    def state(self) -> dict[str, Any]:
        """What decides the order, as plain values."""
        sources = [
            order.state() | {"share": str(share)}
            for order, share in zip(self._orders, self.mixture.shares, strict=True)
        ]
        return {"sources": sources, "seq_len": self.mixture.seq_len}

    def corpus_names(self) -> dict[str, str]:
        """As :func:`check_continues` takes them."""
        datasets = enumerate(self.mixture.datasets)
        return {f"sources[{i}].": dataset.corpus.name for i, dataset in datasets}


def order_of(
    dataset: TokenDataset | Mixture, seed: int, shuffle: bool, shift: bool
) -> EpochOrder | MixtureOrder:
    """The order of a dataset or of a mixture; arguments as of :class:`EpochOrder`."""
    of = MixtureOrder if isinstance(dataset, Mixture) else EpochOrder
    return of(dataset, seed, shuffle, shift)  # type: ignore[arg-type]
