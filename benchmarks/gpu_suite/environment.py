"""What this machine has: prints it, and writes it to a file."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

PACKAGES = (
    "torch triton numpy pytest pytest-xdist pytest-timeout setuptools pybind11 ninja"
    " x-transformers liger-kernel cut-cross-entropy attn-gym"
).split()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(*command: str) -> str | None:
    """Of what matches a version in the output of a program; None if it is not there."""
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "release" in line or "ersion" in line), None)


def describe() -> dict:
    import torch

    found: dict = {
        "gpu": None,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "nvcc": first_line("nvcc", "--version"),
        "compute_sanitizer": first_line("compute-sanitizer", "--version"),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "packages": {package: version(package) for package in PACKAGES},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="without a GPU")
    arguments = parser.parse_args()
    if not arguments.dry_run:
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
    found = describe()
    arguments.json.write_text(json.dumps(found))
    if found["gpu"] is None and not arguments.dry_run:
        sys.exit("PyTorch sees no CUDA device; --dry-run needs none")
    packages = found["packages"]
    print(json.dumps(found, indent=1))
    print(f"{found['gpu']}, torch {packages['torch']}, Triton {packages['triton']}")


if __name__ == "__main__":
    main()
