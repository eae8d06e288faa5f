"""Which backends can run here, and the one place that chooses between them."""

import os
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

from nar_kernels.errors import BackendUnavailableError

cpp: ModuleType | None
try:
    from nar_kernels import _cpp as cpp  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    cpp, _import_error = None, str(error)

# What `backend="auto"` takes on each device, best first.
_PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")}

_has_triton = find_spec("triton") is not None


def _why_no_cpp() -> str:
    report = Path(__file__).with_name("_build_failure.txt")
    reason = report.read_text(encoding="utf-8").strip() if report.exists() else _import_error
    return (
        f"the C++ extension is not built ({reason}); install a C++17 compiler, then run "
        "`pip install --force-reinstall --no-deps --no-cache-dir nar-kernels`, or `make` in a "
        "checkout"
    )


def _triton_is_interpreted() -> bool:
    """Triton's own switch: its kernels then run on CPU tensors, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _why_no_triton() -> str:
    if not _has_triton:
        return "Triton is not installed; run `pip install 'nar-kernels[triton]'`"
    return "PyTorch sees no CUDA device"


def backends() -> dict[str, str]:
    """Every backend, with ``"available"`` or the reason why it is not.

    ``reference`` is plain PyTorch on any device; ``cpp`` is the C++ extension for CPU tensors;
    ``triton`` runs on CUDA devices.
    """
    triton = _has_triton and (_triton_is_interpreted() or torch.cuda.is_available())
    return {
        "reference": "available",
        "cpp": "available" if cpp is not None else _why_no_cpp(),
        "triton": "available" if triton else _why_no_triton(),
    }


def resolve_backend(
    backend: str, device: torch.device, among: tuple[str, ...] = ("reference", "cpp", "triton")
) -> str:
    """The backend to run on ``device``; ``"auto"`` takes the fastest one there is.

    ``among``: the backends that the operation has.

    Raises:
        ValueError: an unknown name, or one that does not serve this device.
        BackendUnavailableError: a backend asked for by name that cannot run here. Never falls back.
    """
    present = {"reference": True, "cpp": cpp is not None, "triton": _has_triton}
    if backend == "auto":
        wanted = _PREFERENCE.get(device.type, ("reference",))
        return next(name for name in wanted if name in among and present[name])
    if backend not in among:
        names = ", ".join(map(repr, among))
        raise ValueError(f"unknown backend {backend!r}: use 'auto', {names}")
    if backend == "reference":
        return backend
    needed = "cpu" if backend == "cpp" or _triton_is_interpreted() else "cuda"
    if device.type != needed:
        raise ValueError(
            f"backend {backend!r} runs on {needed.upper()} tensors, but these are on {device}; "
            "use 'auto'"
        )
    if not present[backend]:
        raise BackendUnavailableError(_why_no_cpp() if backend == "cpp" else _why_no_triton())
    return backend
