"""Where backends run in tests, and how fast."""

import torch


def device_of(backend: str) -> str:
    """The type of device: GPU backends run on the CPU where there is no GPU."""
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


def is_interpreted(backend: str) -> bool:
    """In Triton's interpreter a case takes seconds: it gets fewer of them."""
    return backend == "triton" and device_of(backend) == "cpu"
