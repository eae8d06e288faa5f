"""Where kernels read a corpus and its loss mask: :class:`PlacedCorpus`."""

import warnings
from typing import Literal, get_args

import torch
from torch import Tensor

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.pinned import pin_exactly
from nar_kernels.data.staging import CorpusMemory, choose_memory_here
from nar_kernels.data.stream import TokenStream
from nar_kernels.errors import PinnedMemoryError


class PlacedCorpus:
    """A corpus, in memory that the kernels of a device read.

    Args:
        device: of the kernels.
        memory: as ``corpus_memory`` of :class:`~nar_kernels.data.loader.MaskedLoader`.
        backend: resolved.
        world_size: of the processes that share the host's memory.

    Attributes:
        memory: where it is; ``"mapped"`` on the CPU.
        tokens, runs, loss_mask, loss_mask_runs: as in ``CorruptArgs``. Of a ``"mapped"`` corpus
            that is not on the device, what the host reads.

    Raises:
        ValueError: no such memory.
        PinnedMemoryError: ``"pinned"`` was requested, and the corpus cannot be pinned.
    """

    memory: CorpusMemory

    def __init__(
        self,
        corpus: Corpus,
        device: torch.device,
        memory: CorpusMemory | Literal["auto"],
        backend: str,
        world_size: int,
    ) -> None:
        if memory not in ("auto", *get_args(CorpusMemory)):
            raise ValueError(
                f"corpus_memory is {memory!r}: it must be 'auto', 'device', 'pinned' or 'mapped'"
            )
        stream, mask = corpus.stream, corpus.loss_mask
        self.tokens, self.runs = stream.flat, stream.runs
        self.loss_mask, self.loss_mask_runs = None, None
        if mask is not None:
            self.loss_mask_runs = mask.runs
            self.loss_mask = mask.flat if mask.runs is None else None
        self.memory = "mapped"
        if device.type == "cpu":
            return
        is_asked_for = memory != "auto"
        if memory == "auto":
            num_bytes = stream.nbytes + (0 if mask is None else mask.nbytes)
            memory = choose_memory_here(num_bytes, device, world_size)
            if memory == "pinned" and backend == "reference":
                memory = "mapped"  # which has no kernel that reads pinned memory
        if memory == "pinned":
            try:
                self._take(*(s if s is None else pin_exactly(s, device) for s in (stream, mask)))
            except PinnedMemoryError as error:
                if is_asked_for:
                    raise
                warnings.warn(f"{error}; corpus_memory is 'mapped' now", stacklevel=4)
                memory = "mapped"
        elif memory == "device":
            self._take(*(s if s is None else _copy_to(s, device) for s in (stream, mask)))
        self.memory = memory

    def _take(self, tokens: Tensor | None, loss_mask: Tensor | None) -> None:
        assert tokens is not None
        self.tokens, self.loss_mask = tokens, loss_mask
        self.runs = self.loss_mask_runs = None


def _copy_to(stream: TokenStream, device: torch.device) -> Tensor:
    return stream.copy_to(torch.empty(len(stream), dtype=stream.dtype, device=device))
