"""Which backends can run here, and the one place that chooses between them."""

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
_PREFERENCE = {"cpu": ("cpp", "reference")}


def _why_no_cpp() -> str:
    report = Path(__file__).with_name("_build_failure.txt")
    reason = report.read_text(encoding="utf-8").strip() if report.exists() else _import_error
    return (
        f"the C++ extension is not built ({reason}); install a C++17 compiler, then run "
        "`pip install --force-reinstall --no-deps --no-cache-dir nar-kernels`, or `make` in a "
        "checkout"
    )


def backends() -> dict[str, str]:
    """Every backend, with ``"available"`` or the reason why it is not.

    ``reference`` is plain PyTorch on any device; ``cpp`` is the C++ extension for CPU tensors.
    """
    return {
        "reference": "available",
        "cpp": "available" if cpp is not None else _why_no_cpp(),
    }


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend to run on ``device``; ``"auto"`` takes the fastest one there is.

    Raises:
        ValueError: an unknown name, or one that does not serve this device.
        BackendUnavailableError: a backend asked for by name that cannot run here. Never falls back.
    """
    if backend == "auto":
        for name in _PREFERENCE.get(device.type, ()):
            if name != "cpp" or cpp is not None:
                return name
        return "reference"
    if backend == "reference":
        return backend
    if backend != "cpp":
        names = ", ".join(map(repr, backends()))
        raise ValueError(f"unknown backend {backend!r}: use 'auto', {names}")
    if device.type != "cpu":
        raise ValueError(
            f"backend 'cpp' runs on CPU tensors, but these are on {device}; use 'auto'"
        )
    if cpp is None:
        raise BackendUnavailableError(_why_no_cpp())
    return backend
