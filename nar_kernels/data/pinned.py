"""Pinned host memory of the size that is needed.

``Tensor.pin_memory`` takes its memory from PyTorch's allocator, which rounds up to the next power
of two (a corpus of 40 GB would take 64) and, when it is released, keeps it for the next tensor.
"""

import contextlib
import mmap
import weakref

import numpy as np
import torch
from torch import Tensor

from nar_kernels.data.stream import TokenStream
from nar_kernels.errors import PinnedMemoryError

# cudaHostRegisterPortable: for all devices; cudaHostRegisterMapped: kernels may read it.
_FLAGS = 1 | 2


def pinned_bytes(num_bytes: int) -> int:
    """What a pinned copy of so many bytes takes: whole pages."""
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def pin_exactly(stream: TokenStream, device: torch.device) -> Tensor:
    """A copy of a stream ``[T]``, at least one id, in pinned memory that kernels of a CUDA device
    can read.

    The memory is registered with CUDA, so ``is_pinned()`` holds, until the last tensor that uses it
    is released; that waits for the device, whose kernels may be reading.

    Kernels read it at the host's address. That is right on devices with CUDA's attribute
    CanUseHostPointerForRegisteredMem, as discrete GPUs under Linux have it; PyTorch has no way to
    ask. On others, such as some integrated GPUs, use ``corpus_memory="device"`` or ``"mapped"``.

    Raises:
        PinnedMemoryError: there is no memory, or CUDA cannot pin it.
    """
    size = pinned_bytes(stream.nbytes)
    try:
        memory = _whole_pages(size)
    except MemoryError as error:
        raise _cannot_pin(size, str(error)) from error
    _register(memory, device)
    pinned = torch.from_numpy(memory)[: stream.nbytes].view(stream.dtype)
    if not pinned.is_pinned():
        raise _cannot_pin(size, "registered memory is not pinned on this system")
    return stream.copy_to(pinned)


def _whole_pages(size: int) -> np.ndarray:
    """uint8 ``[size]``, from the beginning of a page on, in private memory."""
    memory = np.empty(size + mmap.PAGESIZE, np.uint8)
    first = -memory.ctypes.data % mmap.PAGESIZE
    return memory[first : first + size]


def _register(memory: np.ndarray, device: torch.device) -> None:
    """Pins the memory of an array for as long as that lives."""
    runtime, address = torch.cuda.cudart(), memory.ctypes.data
    with torch.cuda.device(device):
        result = runtime.cudaHostRegister(address, memory.nbytes, _FLAGS)
    if int(result) != 0:
        _forget_last_error(device)
        raise _cannot_pin(memory.nbytes, f"{runtime.cudaGetErrorString(result)} ({int(result)})")
    # The tensor keeps this array, and the array keeps the memory: it goes first. Not at exit: the
    # process returns all memory, and CUDA may be gone.
    weakref.finalize(memory, _unregister, address, device).atexit = False


def _unregister(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(address)


def _forget_last_error(device: torch.device) -> None:
    """CUDA keeps the error of a failed call for whoever asks next, which is PyTorch after a launch:
    that raises it once."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, dtype=torch.float32, device=device)


def _cannot_pin(size: int, why: str) -> PinnedMemoryError:
    return PinnedMemoryError(
        f"the corpus cannot be pinned for the GPU, {size} bytes ({size / 1e9:.3g} GB): {why}"
        f"{_limit(size)}; use corpus_memory='mapped', which leaves it where it is, or 'device' if "
        "GPU memory has room for it"
    )


def _limit(size: int) -> str:
    """The limit of locked memory, if it may be the reason."""
    try:
        import resource
    except ImportError:  # not on Windows
        return ""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY or limit >= size:
        return ""
    return f"; this process may lock {limit} bytes (`ulimit -l` is {limit // 1024})"
