"""For GPUs: where the corpus is stored, window prefetch, and deferred checks.

Shapes: B batch, L sequence length (``seq_len``), T corpus length in tokens.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor

from nar_kernels.data.stream import TokenStream
from nar_kernels.ops.corrupted import Corrupted

CorpusMemory = Literal["device", "pinned", "mapped"]

# What a corpus may take under "auto": of the free device memory when the loader is made, and of the
# free host memory, which is divided by the number of ranks.
_DEVICE_FRACTION, _HOST_FRACTION = 1 / 8, 1 / 4


def _free_host_bytes() -> int:
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def corpus_limits(free_on_device: int, free_on_host: int) -> tuple[int, int]:
    """The largest corpora, in bytes, that ``"auto"`` puts into device and into pinned memory."""
    return int(free_on_device * _DEVICE_FRACTION), int(free_on_host * _HOST_FRACTION)


def choose_memory(num_bytes: int, free_on_device: int, free_on_host: int) -> CorpusMemory:
    """Where ``"auto"`` puts a corpus of ``num_bytes``."""
    on_device, on_host = corpus_limits(free_on_device, free_on_host)
    if num_bytes <= on_device:
        return "device"
    return "pinned" if num_bytes <= on_host else "mapped"


def free_memory(device: torch.device, world_size: int) -> tuple[int, int]:
    """Free bytes of the device, and a rank's part of those of the host."""
    free_on_device, _ = torch.cuda.mem_get_info(device)
    return free_on_device, _free_host_bytes() // world_size


def choose_memory_here(num_bytes: int, device: torch.device, world_size: int) -> CorpusMemory:
    """:func:`choose_memory` with the free memory of this machine."""
    return choose_memory(num_bytes, *free_memory(device, world_size))


class Stager:
    """Prefetches windows of a corpus too large for memory to a device, or of its loss mask.

    They are copied in the corpus's dtype; uint16 is a quarter of int64. Double-buffered: a thread
    fills one staging buffer, pinned if the device is a GPU, and copies it on its own stream, while
    the windows of the other are in use. (PyTorch rounds the bytes of each up to a power of two: for
    64 windows of 1,000 uint16, 128,000 to 131,072.)

    Args:
        stream: the corpus.
        starts_of: from a step to the offsets of its windows, int64 ``[B]``.
        batch_size, seq_len: B and L.
        device: of the windows.
    """

    def __init__(
        self,
        stream: TokenStream,
        starts_of: Callable[[int], Tensor],
        batch_size: int,
        seq_len: int,
        device: torch.device,
    ) -> None:
        self._stream, self._starts_of = stream, starts_of
        self._on_gpu = device.type == "cuda"
        self._device, self._seq_len = device, seq_len
        self._staging = [
            torch.empty(
                (batch_size, seq_len), dtype=stream.dtype, device="cpu", pin_memory=self._on_gpu
            )
            for _ in range(2)
        ]
        self._buffer_index = 0
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._copies = torch.cuda.Stream(device) if self._on_gpu else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nar_kernels.Stager")
        self._prefetched: tuple[int, Future[Tensor]] | None = None

    def prefetch(self, step: int) -> None:
        """Starts to fetch a step's windows in the background."""
        self._prefetched = step, self._thread.submit(self._fetch, step)

    def windows(self, step: int) -> Tensor:
        """``[B, L]`` on the device, not validated; the current stream waits for the copy."""
        if self._prefetched is None or self._prefetched[0] != step:
            self.prefetch(step)
        assert self._prefetched is not None
        windows, self._prefetched = self._prefetched[1].result(), None
        if self._copies is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._copies)
            windows.record_stream(current)
        return windows

    def _fetch(self, step: int) -> Tensor:
        self._buffer_index ^= 1
        staging, copied = self._staging[self._buffer_index], self._copied[self._buffer_index]
        if copied is not None:
            copied.synchronize()
        self._stream.windows(self._starts_of(step), self._seq_len, staging)
        if self._copies is None:
            return staging.clone()
        with torch.cuda.device(self._device), torch.cuda.stream(self._copies):
            windows = staging.to(self._device, non_blocking=True)
            self._copied[self._buffer_index] = self._copies.record_event()
        return windows


class DeferredCheck:
    """Checks a batch only when the next one is requested, which avoids a sync in between.

    Threads may share it. Copies have nothing to check.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._record: Tensor | None = None
        self._pending: tuple[torch.cuda.Event, Callable[[Tensor], None]] | None = None

    def defer(self, batch: Corrupted, check: Callable[[Tensor], None]) -> None:
        """Makes :meth:`run` call ``check`` with the ``invalid`` record of ``batch``, on the CPU."""
        with self._lock:
            self.run()  # what another thread has deferred since
            if self._record is None:
                self._record = torch.empty(
                    batch.invalid.shape, dtype=torch.int64, device="cpu", pin_memory=True
                )
            with torch.cuda.device(batch.invalid.device):
                self._record.copy_(batch.invalid, non_blocking=True)
                self._pending = torch.cuda.current_stream().record_event(), check

    def run(self) -> None:
        """Synchronises with the deferred batch, if any, and checks it."""
        with self._lock:
            if self._pending is None:
                return
            (made, check), self._pending = self._pending, None
            made.synchronize()
            assert self._record is not None
            check(self._record)

    def __reduce__(self) -> tuple[Any, ...]:
        return DeferredCheck, ()
