"""Where backends run in tests, and how fast."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def device_of(backend: str) -> str:
    """The type of device: GPU backends run on the CPU where there is no GPU."""
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


def is_interpreted(backend: str) -> bool:
    """In Triton's interpreter a case takes seconds: it gets fewer of them."""
    return backend == "triton" and device_of(backend) == "cpu"


@contextmanager
def no_waiting() -> Iterator[None]:
    """Makes it an error that the host waits for the device."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*debug mode is a prototype feature")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
