"""Which backends can run here, and the one place that chooses between them."""

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

from nar_kernels.errors import BackendUnavailableError
from nar_kernels.extras import install_command

_BUILD_REPORT = Path(__file__).parent.parent / "_build_failure.txt"

_import_errors: dict[str, str] = {}


def _extension(name: str) -> ModuleType | None:
    try:
        return import_module(f"nar_kernels.{name}")
    except ImportError as error:
        _import_errors[name] = str(error)
        return None


cpp = _extension("_cpp")
cuda = _extension("_cuda")

BACKENDS = ("reference", "cpp", "triton", "cuda")

# What `backend="auto"` tries on each device, fastest first; then `reference`.
_PREFERENCE = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}

_has_triton = find_spec("triton") is not None
_present = {
    "reference": True,
    "cpp": cpp is not None,
    "triton": _has_triton,
    "cuda": cuda is not None,
}


def _why_not_built(name: str, needs: str, variable: str) -> str:
    lines = _BUILD_REPORT.read_text("utf-8").strip() if _BUILD_REPORT.exists() else ""
    _, here, reason = lines.partition(f"nar_kernels.{name}: ")
    if here:  # of the build, which may have been on another machine
        reason = "at the build: " + reason.partition("\nnar_kernels.")[0]
    else:
        reason = _import_errors[name]
    return (
        f"the extension nar_kernels.{name} is not built ({reason}); with {needs}, run "
        f"`{variable}=1 pip install .` or `{variable}=1 make` in a checkout of nar_kernels"
    )


def _why_absent(backend: str) -> str:
    if backend == "cpp":
        return _why_not_built("_cpp", "a C++17 compiler", "NAR_KERNELS_REQUIRE_CPP")
    if backend == "cuda":
        return _why_not_built("_cuda", "the CUDA toolkit (nvcc)", "NAR_KERNELS_CUDA")
    return (
        f"Triton is not installed; run `{install_command('triton')}` (there is one for Linux only)"
    )


def device_type(backend: str) -> str:
    """Where a compiled backend runs: ``"cpu"`` or ``"cuda"``.

    Tests run the GPU backends on the CPU: Triton in its interpreter (TRITON_INTERPRET), CUDA in a
    module compiled for the CPU.
    """
    if backend == "triton":
        return "cpu" if os.environ.get("TRITON_INTERPRET", "0") == "1" else "cuda"
    if backend == "cuda":
        return "cpu" if cuda is not None and cuda.architectures == "cpu" else "cuda"
    return "cpu"


def _status(backend: str) -> str:
    if not _present[backend]:
        return _why_absent(backend)
    if backend != "reference" and device_type(backend) == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return "available"


def backends() -> dict[str, str]:
    """Every backend, with ``"available"`` or the reason why it is not.

    ``reference`` is plain PyTorch on any device; ``cpp`` is the C++ extension for CPU tensors;
    ``triton`` and ``cuda`` run on CUDA devices, the latter where nvcc built it. A reason includes
    the command that fixes it.
    """
    return {name: _status(name) for name in BACKENDS}


def resolve_backend(backend: str, device: torch.device, among: tuple[str, ...] = BACKENDS) -> str:
    """The backend to run on ``device``; ``"auto"`` takes the fastest one there is.

    ``among``: the backends that the operation has.

    Raises:
        ValueError: an unknown name, or one that does not serve this device.
        BackendUnavailableError: a backend asked for by name that cannot run here. Never falls back.
    """
    if backend == "auto":
        for name in _PREFERENCE.get(device.type, ()):
            if name in among and _present[name]:
                return name
        return "reference"
    if backend not in among:
        names = ", ".join(map(repr, among))
        raise ValueError(f"unknown backend {backend!r}: use 'auto', {names}")
    if backend == "reference":
        return backend
    if not _present[backend]:
        raise BackendUnavailableError(_why_absent(backend))
    if device.type != device_type(backend):
        raise ValueError(
            f"backend {backend!r} runs on {device_type(backend).upper()} tensors, but these are on "
            f"{device}; use 'auto'"
        )
    return backend


# PyTorch has no public name for these two.
_CPU_MULTIPLIES_BF16 = any(
    getattr(torch.cpu, check, bool)()
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
)


def multiplies_in(dtype: torch.dtype) -> bool:
    """Whether this CPU has native matrix multiplication in a type."""
    if dtype == torch.bfloat16:
        return _CPU_MULTIPLIES_BF16
    return dtype != torch.float16
