"""Where a GPU's kernels find the corpus, and what they found wrong with it.

Shapes: B batch, L sequence length (``seq_len``), T tokens of the corpus.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor

from nar_kernels.ops.corrupted import Corrupted

CorpusMemory = Literal["device", "pinned", "mapped"]

# What "auto" lets a corpus take: of the memory that is free on the device when the loader is made,
# and of the host's that is free, which the ranks of a machine share.
_DEVICE_FRACTION, _HOST_FRACTION = 1 / 8, 1 / 4


def _free_host_bytes() -> int:
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose_memory(num_bytes: int, free_on_device: int, free_on_host: int) -> CorpusMemory:
    """Where a corpus of so many bytes goes, if nobody says."""
    if num_bytes <= free_on_device * _DEVICE_FRACTION:
        return "device"
    return "pinned" if num_bytes <= free_on_host * _HOST_FRACTION else "mapped"


def choose_memory_here(tokens: Tensor, device: torch.device, world_size: int) -> CorpusMemory:
    """:func:`choose_memory` with what this machine has."""
    free_on_device, _ = torch.cuda.mem_get_info(device)
    return choose_memory(tokens.nbytes, free_on_device, _free_host_bytes() // world_size)


class Stager:
    """Windows of a corpus too large for memory, copied to a device ahead of their use.

    They travel in the corpus's own type, which for uint16 is a quarter of int64. There are two
    staging buffers, in pinned memory if the device is a GPU: one is filled and copied by a thread,
    on a stream of its own, while the other's windows are in use.

    Args:
        tokens: the corpus ``[T]``, on the CPU.
        starts_of: the first tokens of the windows of a step, int64 ``[B]``.
        batch_size, seq_len: B and L.
        device: where the windows go.
    """

    def __init__(
        self,
        tokens: Tensor,
        starts_of: Callable[[int], Tensor],
        batch_size: int,
        seq_len: int,
        device: torch.device,
    ) -> None:
        self._tokens, self._starts_of = tokens.numpy(), starts_of
        self._on_gpu = device.type == "cuda"
        self._device, self._seq_len = device, seq_len
        self._staging = [
            torch.empty(
                (batch_size, seq_len), dtype=tokens.dtype, device="cpu", pin_memory=self._on_gpu
            )
            for _ in range(2)
        ]
        self._buffer_index = 0
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nar_kernels.Stager")
        self._prefetched: tuple[int, Future[Tensor]] | None = None

    def prefetch(self, step: int) -> None:
        """Begins to fetch a step's windows."""
        self._prefetched = step, self._thread.submit(self._fetch, step)

    def windows(self, step: int) -> Tensor:
        """``[B, L]`` on the device, unchecked, ready for the current stream."""
        if self._prefetched is None or self._prefetched[0] != step:
            self.prefetch(step)
        assert self._prefetched is not None
        windows, self._prefetched = self._prefetched[1].result(), None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            windows.record_stream(current)
        return windows

    def _fetch(self, step: int) -> Tensor:
        self._buffer_index ^= 1
        staging, copied = self._staging[self._buffer_index], self._copied[self._buffer_index]
        if copied is not None:
            copied.synchronize()
        rows = staging.numpy()
        for row, start in zip(rows, self._starts_of(step).tolist(), strict=True):
            row[:] = self._tokens[start : start + self._seq_len]
        if self._stream is None:
            return staging.clone()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            windows = staging.to(self._device, non_blocking=True)
            self._copied[self._buffer_index] = self._stream.record_event()
        return windows


class DeferredCheck:
    """Reads what was wrong with a batch once the device has made the next one wanted, so that the
    host does not wait in between."""

    def __init__(self) -> None:
        self._record: Tensor | None = None
        self._pending: tuple[torch.cuda.Event, Callable[[Tensor], None]] | None = None

    def defer(self, batch: Corrupted, check: Callable[[Tensor], None]) -> None:
        """``check`` gets the record of ``batch``, on the CPU, when :meth:`run` is called."""
        if self._record is None:
            self._record = torch.empty(
                batch.invalid.shape, dtype=torch.int64, device="cpu", pin_memory=True
            )
        with torch.cuda.device(batch.invalid.device):
            self._record.copy_(batch.invalid, non_blocking=True)
            self._pending = torch.cuda.current_stream().record_event(), check

    def run(self) -> None:
        """Waits until the device has made the watched batch, and checks it."""
        if self._pending is None:
            return
        (made, check), self._pending = self._pending, None
        made.synchronize()
        assert self._record is not None
        check(self._record)
